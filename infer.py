"""Segment volumes of any size with a trained network; a checkpoint is all it needs.

    python infer.py --ckpt runs/best.pt                               # the run's own test cases
    python infer.py --ckpt runs/best.pt --input scans/ --output out/  # any format
    python infer.py --ckpt runs/vessels --input a.nii.gz inference.flips=true   # best.pt of a run
    python infer.py --ckpt runs/best.pt inference.threshold=0.4 postprocess.min_component_voxels=50
    python infer.py --ckpt runs/best.pt --input stacks/ --spacing 5 1 1   # TIFF states none
    python infer.py --ckpt runs/best.pt --input test_images/ --submission submission.zip
    python infer.py --ckpt fold0.pt fold1.pt --input scans/ --output out/   # or a sweep folder
    python infer.py --ckpt runs/best.pt --input scroll.zarr --output pred.zarr   # beyond memory
    torchrun --nproc-per-node=4 infer.py --ckpt runs/best.pt                # a part for each rank
    python infer.py --ckpt runs/best.pt --part 2/8                          # anywhere, at any time
    python infer.py --check-seams pred.zarr                                 # of shards and windows
    python infer.py --ckpt runs/best.pt --input a.tif --shift-consistency --bbox 32:96 99:163 99:163

Of several checkpoints the probabilities are averaged. Parts share out volumes and slabs of volumes;
the part that finds the last slab of a volume writes it, with the bits that one process gives.

Leaves <output>/<id> in the format of the source, on the image's own grid with its spacing and
affine: uint8 0 and 1, or the ids of the label where the network tells several classes apart.
predictions.jsonl beside them says which checkpoint each is of. With
inference.save_probabilities=true also <output>/probabilities/<id>, or <class>/<id> in there; with
inference.save_disagreement=true <output>/disagreement/<id> likewise: how much the flips and
networks that are averaged differ, in each voxel.
A .zarr is predicted box by box into <output>/<id>.zarr, or <output> itself if that ends in .zarr:
probabilities and a mask as OME-Zarr, with all that made them (docs/predicting-scrolls.md).
Without --output these go to the run's predictions/. --submission writes the masks a second time,
in the format of the Vesuvius Challenge, and reads them back. Every input is checked before the
first is predicted. Parts keep slabs in <output>/.parts/ and go on from there when started again.
--check-seams and --shift-consistency print figures and write nothing (docs/predicting-scrolls.md).
Exit status: 0 done, 1 a result could not be made or written (it is named, the others are there,
but no submission) or there are seams, 2 the input is wrong (one sentence per fault, nothing
written).
"""

import argparse
import functools
import glob
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Threads that wait spin for microseconds only, not for milliseconds: beside other work they would
# take the cores from those they wait for. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import data
from runtime import config, cuda, ensemble, memory_guard, outputs, parts, scrolls, seams
from runtime.console import PartConsole, attempt, progress_of, say_done
from runtime.members import read_members
from runtime.precision import resolve_precision
from runtime.signals import CannotGoOn
from runtime.sliding_window import resolve_device
from runtime.threads import use_threads
from runtime.window_transfer import is_asynchronous
from volumes import origins
from volumes.files import read_label, write_volume
from volumes.inputs import check_inputs, folder_of
from volumes.processes import run_script
from volumes.submission import SubmissionError, open_submission, submission_faults
from volumes.volume import InputErrors, VolumeError, collect_errors

# ---------------------------------------------------------------------------- settings


def output_folder(arguments, members):
    """Where predictions go: --output, or predictions/ of the run of the one checkpoint."""
    if arguments.output:
        return Path(arguments.output)
    if len(members) > 1:
        raise ValueError("--output: expected a folder for the predictions of several checkpoints")
    folder = Path(members[0].path).resolve().parent
    return (folder.parent if folder.name == "checkpoints" else Path()) / "predictions"


def prepare_to_predict(arguments, part):
    """(predictor, inputs, scrolls, output, lines) of a command line; ValueError names every fault.

    inputs: those that are predicted whole; lines say what will happen and why: the first of this
    process, the others of all parts.
    """
    members, faults = read_members(arguments.ckpt), []
    output, metadata = output_folder(arguments, members), ensemble.joint_metadata(members)
    roots = [t.partition("=")[2] for t in arguments.overrides if t.startswith("data.root=")]
    with collect_errors(faults):
        settings, joint_line = ensemble.joint_settings(members, arguments.overrides)
        device, device_reason = resolve_device(settings.run.device)
        device = part.device(device) if part else device
        precision, precision_reason = resolve_precision(settings.training.precision, device)
    with collect_errors(faults):
        root = [metadata["root"], *roots][-1]
        inputs, notes = check_inputs(arguments.input, metadata, root, output, arguments.spacing)
        if arguments.submission:
            regions = outputs.of_metadata(metadata).regions
            faults += submission_faults(arguments.submission, regions)
    for volume in inputs if not faults else ():
        if volume.spacing is not None:
            grid = (volume.spacing, metadata["spacing"], volume.unit)
            window = settings.inference.window
            faults += data.spacing_faults(volume.path, volume.shape, window, *grid)
    if faults:
        raise InputErrors(*faults)
    predictor = ensemble.Predictor(members, settings, metadata, device, precision)
    shifted, output = arguments.shift_consistency, folder_of(output)
    stored = [volume for volume in inputs if volume.is_stored and not shifted]
    inputs = [volume for volume in inputs if shifted or not volume.is_stored]
    opened = [] if shifted else scrolls.open_all(predictor, inputs, stored, output, arguments)
    lines = [
        f"device     {device} ({device_reason}), precision {precision} ({precision_reason})",
        *(f"checkpoint {m.path}, step {m.step} of run {m.run}, {m.weights}" for m in members),
        *(f"warning: {m.path} is of step 0, before any training" for m in members if not m.step),
        *([f"classes    {predictor.outputs.describe()}"] if predictor.outputs.several else []),
        *([joint_line] if joint_line else []),
        f"windows    {_describe(settings)}",
    ]
    return predictor, inputs, opened, output, lines + notes


def _describe(settings):
    """How windows become a mask, for people."""
    inference, words = settings.inference, []
    threshold = f"threshold {ensemble.in_words(inference.threshold)}"
    for key, value in settings.postprocess.model_dump().items():
        if any(value.values()) if isinstance(value, dict) else value:
            words.append(f"{key} {ensemble.in_words(value)}")
    return ", ".join(
        [
            f"{list(inference.window)}, overlap {inference.overlap}",
            "8 flips" if inference.flips else "no flips",
            "the most probable class" if inference.threshold is None else threshold,
            *(words or ["no postprocessing"]),
        ]
    )


# ---------------------------------------------------------------------------- prediction


def write_prediction(predictor, volume, whole, output):
    """Write the results of a volume from its whole layers: (files, a clause about them)."""
    target, several = volume.prediction_path(output), predictor.outputs.several
    grid = {key: getattr(volume, key) for key in ("spacing", "unit", "affine", "header")}
    kinds = "probabilities", "disagreement"
    maps, paths = {kind: predictor.regions_of(whole, kind) for kind in kinds}, [target]
    threshold = predictor.settle_threshold(whole)
    masks = predictor.masks(volume, whole)
    mask = predictor.outputs.paint(masks)
    shares = {name if several else "foreground": own.mean() for name, own in masks.items()}
    del masks
    try:
        for kind, regions in maps.items():
            for name, own in regions.items():
                paths.append(output / kind / (name if several else "") / target.name)
                write_volume(paths[-1], own, **grid)
        for kind in kinds:  # a map of an earlier prediction would be taken for one of this mask
            for old in (output / kind).rglob(glob.escape(target.name)):
                if old not in paths:
                    old.unlink()
        write_volume(target, mask, **grid)
        origins.write(target, [member.origin for member in predictor.members])
    except Exception as error:  # each format's writer has its own
        raise CannotGoOn(f"the prediction cannot be written ({error})") from error
    shares = ", ".join(f"{100 * share:.2f} % {name}" for name, share in shares.items())
    return paths, f"{threshold}{shares}, {target}"


def predict_whole(predictor, volume, console):
    """The whole layers of a volume."""
    with progress_of(volume, console) as how:
        return parts.assemble(volume.shape[0], predictor.slabs(volume, **how))


def predict_rows(predictor, volume, rows, store, output, console):
    """Predict those rows of windows whose slabs are not there, and join a volume that is complete
    then; a clause about it, None if it is not, or was joined before."""
    for run in parts.runs(store.missing(rows)):
        with progress_of(volume, console) as how:
            slabs = predictor.slabs(volume, rows=run, **how)
            for row, (z0, layers) in zip(run, slabs, strict=True):
                store.write(row, z0, layers)
    clause = None

    def join():
        nonlocal clause
        whole = parts.assemble(volume.shape[0], store.read())
        paths, clause = write_prediction(predictor, volume, whole, output)
        return paths

    if not store.missing():
        store.join(join)
    return clause


def predict_all(predictor, inputs, output, console):
    """Predict and write every `Input`; {id: sentence} of those that failed.

    A thread writes. Beside a GPU, which does not wait for it, the next volume is predicted
    meanwhile, so that two are in memory; a CPU has enough to do with one.
    """
    failures, writing = {}, None

    def write(volume, place, started, whole):
        do = functools.partial(write_prediction, predictor, volume, whole, output)
        if written := attempt(do, volume, place, failures, console):
            say_done(volume, place, started, written[1], console)

    with ThreadPoolExecutor(1) as pool:
        for number, volume in enumerate(inputs, start=1):
            place, started = f"{number}/{len(inputs)}", time.perf_counter()
            do = functools.partial(predict_whole, predictor, volume, console)
            whole = attempt(do, volume, place, failures, console)
            if writing:
                writing.result()
            if whole is not None:
                writing = pool.submit(write, volume, place, started, whole)
                del whole  # it is the thread's, which frees each layer that it has written
                if not is_asynchronous(predictor.device):
                    writing.result()
        if writing:
            writing.result()
    return failures


def predict_in_parts(predictor, inputs, output, part, console):
    """Predict a part's share, and write each `Input` whose slabs are all there then.

    ({id: sentence} of those that failed, what tells the predictions from others, or None while some
    are missing).
    """
    costs, failures, complete = [predictor.rows(volume) for volume in inputs], {}, True
    shares = parts.share(costs, part.count)

    @functools.cache
    def store(index):
        name = inputs[index].prediction_path(output).relative_to(output)
        return parts.SlabStore(output, name, predictor.fingerprint(inputs[index]), costs[index][0])

    def work(index, rows):
        volume = inputs[index]

        def predict():
            return predict_rows(predictor, volume, rows, store(index), output, console)

        place, started = f"{index + 1}/{len(inputs)}", time.perf_counter()
        if clause := attempt(predict, volume, place, failures, console):
            say_done(volume, place, started, clause, console)

    for index, rows in enumerate(shares[part.index]):
        if rows:
            work(index, rows)
    for index, volume in enumerate(inputs):
        if volume.id not in failures:
            work(index, range(0))  # which others have left complete, but not joined
        if volume.id not in failures and (missing := store(index).missing()):
            owners = [n for n, rows in enumerate(shares, start=1) if {*rows[index]} & {*missing}]
            names = ", ".join(f"part {n}/{part.count}" for n in owners)
            count, note = f"{len(missing)} of {costs[index][0]}", store(index).note
            console.print(f"{volume.id}: waits for {count} slabs, of {names}{note}")
            complete = False
    if failures or not complete:
        return failures, None
    digits = [store(index).record.fingerprint for index in range(len(inputs))]
    return failures, parts.fingerprint(digits)


def predict_scrolls(opened, part, console):
    """Predict a part's share of each `scrolls.Scroll`; {id: sentence} of those that failed."""
    failures = {}
    for number, scroll in enumerate(opened, start=1):
        volume, place, started = scroll.volume, f"{number}/{len(opened)}", time.perf_counter()

        def work():
            with progress_of(volume, console) as how:  # noqa: B023
                return scroll.work(part, how, console.print)  # noqa: B023

        if clause := attempt(work, volume, place, failures, console):
            say_done(volume, place, started, clause, console)
        elif volume.id not in failures:
            console.print(f"{volume.id}: {scroll.waits_for(part)}")
    return failures


def predict_and_submit(predictor, inputs, output, submission, part, console):
    """All that is done once the input is checked; sentences about what could not be."""
    if part:
        failures, digits = predict_in_parts(predictor, inputs, output, part, console)
    else:
        failures, digits = predict_all(predictor, inputs, output, console), None
    sentences = [*failures.values()]
    if not submission:
        return sentences
    if failures:
        return [*sentences, "--submission: not written, for masks are missing"]
    if part and digits is None:
        console.print(f"{submission}: is written by the part that ends last")
        return []

    def write():
        with open_submission(submission) as archive:
            for volume in inputs:
                archive.add(volume.id, read_label(volume.prediction_path(output)).array)
        return [submission]

    about = parts.fingerprint([digits, os.path.relpath(submission, output)])
    try:
        if parts.Record(output, Path(submission).name, about).once(write) if part else write():
            console.print(f"{submission}: {len(inputs)} masks, read back and the same")
    except (SubmissionError, VolumeError) as error:
        return [str(error)]
    except OSError as error:
        return [f"{submission}: the submission cannot be written ({error})"]
    return []


# ---------------------------------------------------------------------------- command line


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    several = {"nargs": "+", "action": "extend", "default": [], "metavar": "PATH"}
    what = "a checkpoint, or a run folder for its best; several, or a sweep folder: an ensemble"
    add("--ckpt", help=what, **several)
    what = "case files, prepared folders, volumes, folders or patterns of volumes"
    add("--input", help=what, **several)
    what = "voxel size of volumes that state none, in the unit of the training data"
    add("--spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help=what)
    add("--output", help="folder, or a .zarr; default: predictions/ of the checkpoint's run")
    what = "volume that is 0 where nothing is predicted; of predictions in .zarr"
    add("--mask", metavar="VOLUME", help=what)
    what = "voxels that are predicted alone; of predictions in .zarr, and --shift-consistency"
    add("--bbox", nargs=3, metavar=("Z0:Z1", "Y0:Y1", "X0:X1"), help=what)
    add("--submission", metavar="FILE.zip", help="write the masks into this too")
    add("--part", metavar="I/N", help="do part I of N, from 1; start the others where you like")
    what = "figures of the borders of shards and windows in a prediction; needs no --ckpt"
    add("--check-seams", metavar="PRED.zarr", help=what)
    what = "Dice of the masks of a box, of two grids of windows half a step apart"
    add("--shift-consistency", action="store_true", help=what)
    add("overrides", nargs="*", metavar="group.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.ckpt and not arguments.check_seams:
        parser.error("the following arguments are required: --ckpt")
    # argparse takes settings that follow --input or --ckpt for paths.
    keys = tuple(f"{key.split('.')[0]}." for key in config.valid_keys())
    for paths in (arguments.ckpt, arguments.input):
        late = [t for t in paths if "=" in t and t.startswith(keys) and not Path(t).exists()]
        arguments.overrides += late
        paths[:] = [text for text in paths if text not in late]
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    part, say, errors = None, PartConsole(None).print, PartConsole(None, stderr=True)
    try:
        if arguments.check_seams:
            return seams.print_seams(arguments.check_seams, say)
        part = parts.find_part(arguments.part)
        errors = PartConsole(part, stderr=True)
        predictor, inputs, opened, output, lines = prepare_to_predict(arguments, part)
        if arguments.shift_consistency:
            use_threads(predictor.settings.run.threads, 1)
            return seams.print_consistency(predictor, inputs, arguments.bbox, say)
    except ValueError as error:
        errors.print(error)
        return 2
    console, settings = PartConsole(part), predictor.settings
    is_rank = part is not None and part.local is not None
    ranks_here = part.local[1] if is_rank else 1
    # What concerns all ranks is said by the first.
    console.print("\n".join(lines[:1] if is_rank and part.index else lines))
    use_threads(settings.run.threads, ranks_here)
    cuda.set_deterministic(settings.run.deterministic, predictor.device)
    memory_guard.keep_freed()
    with parts.until_all_ranks_end(part):
        what = (predictor, inputs, output, arguments.submission)
        sentences = [*predict_scrolls(opened, part, console).values()]
        sentences += predict_and_submit(*what, part, console)
        if sentences:
            errors.print("\n".join(sentences))
    return 1 if sentences else 0


if __name__ == "__main__":
    run_script(main)
