"""Segment volumes of any size with a trained network; a checkpoint is all it needs.

    python infer.py --ckpt runs/last.pt                               # the run's own test cases
    python infer.py --ckpt runs/last.pt --input scans/ --output out/  # NIfTI, TIFF, HDF5
    python infer.py --ckpt runs/vessels/checkpoints/best.pt --input a.nii.gz inference.flips=true
    python infer.py --ckpt runs/last.pt inference.threshold=0.4 postprocess.min_component_voxels=50

Leaves <output>/<id> in the format of the source, uint8 0 and 1 on the image's own grid with its
spacing and affine; with inference.save_probabilities=true also <output>/probabilities/<id>.
Without --output these go to the run's predictions/. Every input is checked before the first is
predicted. Exit status: 0 done, 1 a result could not be made or written, 2 the input is wrong (one
sentence per fault, nothing written).
"""

import argparse
import contextlib
import functools
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import boxes
import cases
import checkpoint
import config
import data
import intensity
import model
import postprocess
import runlog
import stopping
import volumes
import windows

# All else that a config holds was decided by training and comes from the checkpoint.
DEVICE_KEYS = ("run.device", "run.threads", "training.precision")
SETTABLE = ("inference.", "postprocess.", "data.root", *DEVICE_KEYS)
PHANTOM_SUFFIX = ".nii.gz"  # of cases that were made from no file
SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


@dataclass(frozen=True)
class Job:
    """One volume to predict, checked. path is a case file or what volumes.read_image takes."""

    id: str
    path: str
    is_case: bool
    sources: tuple[str, ...]  # the raw files that a case file was made from
    suffix: str  # of the prediction
    shape: tuple[int, int, int]
    channels: int
    spacing: tuple[float, float, float] | None
    unit: str
    affine: np.ndarray | None
    intensity: dict


# ---------------------------------------------------------------------------- settings


def resolve_settings(state, overrides):
    """The run's settings with overrides; ValueError names every fault, a line each."""
    keys = {text.partition("=")[0] for text in overrides} & set(config.valid_keys())
    faults = [
        f"{key}: expected a setting of inference (those under {', '.join(SETTABLE)}), got one that "
        "training has decided; leave it out"
        for key in sorted(keys)
        if not key.startswith(SETTABLE)
    ]
    if faults:
        raise ValueError("\n".join(faults))
    settings = config.build(config.apply_overrides(state["config"], overrides))
    settings = settings.with_chosen(state["loop"].get("chosen", {}))
    window = settings.inference.window or settings.sampling.patch
    model.check_divides("inference.window", window, state["data"]["strides"])
    return settings


def build_network(state):
    """(network, which weights) of a checkpoint, in eval mode on the CPU."""
    facts = state["data"]
    settings = config.build(state["config"]).model.model_dump(exclude={"strides", "compile"})
    network = model.UNet3D(
        facts["channels"], 1, strides=facts["strides"], kernels=facts["kernels"], **settings
    )
    averaged = state["ema"] is not None
    try:
        network.load_state_dict(state["ema"] if averaged else state["model"])
    except RuntimeError as error:
        raise ValueError(
            "expected the weights of the network that model.py builds, got those of another "
            "version; use the code in the run's source/ folder"
        ) from error
    return network.eval(), "averaged (EMA) weights" if averaged else "weights of the last step"


# ---------------------------------------------------------------------------- inputs


def default_inputs(facts, root):
    """(case files, why these) where no --input is given: the run's test cases, else validation."""
    for key in ("test", "validation"):
        if facts[key]:
            files = [str(Path(root) / f"{case_id}.h5") for case_id in facts[key]]
            return files, f"the run's {key} cases in {root}"
    raise ValueError("--input: expected volumes, for the run has no test or validation cases")


def expand(text):
    """The volumes that one --input names, as [(id, path)], and notes on what was left out."""
    index = Path(text) / cases.DATASET_FILE
    if index.is_file() and "lamina-dataset" in index.read_text(errors="replace"):
        return [(case.id, case.path) for case in cases.read_dataset(text).cases.values()], []
    sources = volumes.find_volumes(text)
    images = [s for s in sources if not volumes.is_label_name(s.path)]
    skipped = len(sources) - len(images)
    if not images or not skipped:
        return [(s.id, s.path) for s in sources], []
    return [(s.id, s.path) for s in images], [f"{text}: {skipped} files named as labels left out"]


def is_case_file(path):
    """Whether a path is an HDF5 file that prepare.py wrote, and not one of its datasets."""
    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return "intensity" in file.attrs and "image" in file


def inspect(case_id, path):
    """The `Job` of a case file or of any other volume, which is read whole for this."""
    if is_case_file(path):
        case = cases.read_case(path)
        with h5py.File(path, "r") as file:
            affine, source = file.attrs.get("affine"), str(file.attrs["source_image"])
            sources = (*source.split(", "), str(file.attrs["source_label"]))
        suffix = volumes.suffix_of(source) or PHANTOM_SUFFIX
        facts = (case.shape, case.channels, case.spacing, case.unit, affine, case.intensity)
        return Job(case.id, path, True, sources, suffix, *facts)
    volume = volumes.read_image(path)
    array = volume.array
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"{path}: expected finite voxels, got {int((~np.isfinite(array)).sum())} that are NaN "
            "or infinite; replace them, by 0 where nothing was measured"
        )
    intensity = cases.intensity_statistics(array)
    facts = (array.shape[1:], len(array), volume.spacing, volume.unit, volume.affine, intensity)
    return Job(case_id, path, False, (), volumes.suffix_of(path), *facts)


def run_faults(job, facts):
    """What keeps a network with these facts of its data from predicting a volume, as sentences."""
    if job.channels != facts["channels"]:
        yield (
            f"{job.path}: expected {facts['channels']} channels as in training, got "
            f"{job.channels}; store the same channels in one file"
        )
    if not any(facts["spacing"]):
        return
    if job.spacing is None or not all(np.isfinite(s) and s > 0 for s in job.spacing):
        got = "none" if job.spacing is None else list(job.spacing)
        yield (
            f"{job.path}: expected a spacing, because the run works at {facts['spacing']} "
            f"{facts['unit']}, got {got}; prepare the volume with prepare.py --spacing Z Y X"
        )
    elif job.unit and facts["unit"] and job.unit != facts["unit"]:
        yield (
            f"{job.path}: expected a spacing in {facts['unit']} as in training, got {job.unit}; "
            f"prepare the volume with prepare.py --spacing Z Y X --unit {facts['unit']}"
        )


def target_faults(jobs, output):
    """Predictions that cannot be written where they belong, as sentences."""
    targets = {job.path: target_path(job, output) for job in jobs}
    for target, count in Counter(targets.values()).items():
        if count > 1:
            paths = ", ".join(path for path, other in targets.items() if other == target)
            yield f"{target}: expected one input for this prediction, got {paths}; give one of them"
    read = [path for job in jobs for path in (job.path, *job.sources)]
    if volumes.suffix_of(output):
        yield f"--output {output}: expected a folder, got the name of a file"
    inputs = {Path(volumes.split_dataset(path)[0]).resolve() for path in read}
    for target in sorted(set(targets.values())):
        if target.resolve() in inputs:
            yield f"{target}: the prediction would overwrite an input; give another --output"
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"--output {output}: expected a folder that may be written; {existing} is none"


def target_path(job, output):
    return output / f"{job.id}{job.suffix}"


def default_output(ckpt):
    """The predictions/ of the run that a checkpoint lies in; else that of the working folder."""
    folder = Path(ckpt).resolve().parent
    return folder.parent / "predictions" if folder.name == "checkpoints" else Path("predictions")


def check_inputs(texts, state, root, output):
    """(jobs, notes) of all inputs; ValueError names every fault, a line each."""
    facts, faults, notes, found, jobs = state["data"], [], [], [], []
    with collected(faults):
        if texts:
            for text in texts:
                with collected(faults):
                    pairs, left_out = expand(text)
                    found, notes = found + pairs, notes + left_out
        else:
            files, why = default_inputs(facts, root)
            found, notes = [(Path(file).stem, file) for file in files], [f"inputs     {why}"]
    for case_id, path in dict.fromkeys(found):
        with collected(faults), readable(path):
            jobs.append(inspect(case_id, path))
            faults.extend(run_faults(jobs[-1], facts))
    faults.extend(target_faults(jobs, output))
    if faults:
        raise ValueError("\n".join(faults))
    return jobs, notes


@contextlib.contextmanager
def collected(faults):
    """Append the sentences of a ValueError to faults instead of raising it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        faults.extend(str(error).split("\n"))


@contextlib.contextmanager
def readable(path):
    """boxes.Unreadable, a sentence, for a file that is there and damaged."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise boxes.Unreadable(
            f"{path}: expected a volume that can be read, got {error}; copy or prepare it again"
        ) from error


# ---------------------------------------------------------------------------- prediction


@contextlib.contextmanager
def voxels(job):
    """(C, D, H, W) of a job: the dataset of a case file, which stays on disk, or an array."""
    if job.is_case:
        with h5py.File(job.path, "r") as file:
            yield file["image"]
    else:
        yield volumes.read_image(job.path).array


def predict(network, job, settings, spacing, **how):
    """(mask, probs) of a job: mask (D, H, W) uint8 of 0 and 1; probs float32 or None, as asked for.

    spacing: of the run, 0 or None where it takes an axis as stored; how: device, precision and
    more for windows.predict_slabs. Memory: a byte per voxel beside the slab, four more with
    probabilities.
    """
    inference, post = settings.inference, settings.postprocess
    high = np.empty(job.shape, bool)
    low = None if post.hysteresis is None else np.empty(job.shape, bool)
    probs = np.empty(job.shape, np.float32) if inference.save_probabilities else None
    ratio = (1.0, 1.0, 1.0)
    if job.spacing is not None:
        wanted = data.network_spacing(job.spacing, spacing)
        ratio = [w / s if w != s else 1.0 for w, s in zip(wanted, job.spacing, strict=True)]
    scale = data.normalisation(job.intensity, settings.data.percentiles)
    with voxels(job) as image:
        for z0, planes in windows.predict_slabs(
            network,
            image,
            ratio=ratio,
            normalize=functools.partial(intensity.normalise, **scale),
            **settings.window_arguments(),
            **how,
        ):
            part = slice(z0, z0 + planes.shape[1])
            high[part] = planes[0] >= inference.threshold
            if low is not None:
                low[part] = planes[0] >= post.hysteresis
            if probs is not None:
                probs[part] = planes[0]
    mask = postprocess.finish(high, low, spacing=job.spacing, **post.model_dump())
    return mask.astype(np.uint8), probs


def _masks(settings):
    """What else is done to a mask, for people."""
    on = {name: value for name, value in settings.postprocess.model_dump().items() if value}
    return ", ".join(f"{name} {value}" for name, value in on.items()) or "no postprocessing"


def write(job, output, mask, probs):
    """Write a job's results; returns where the mask lies."""
    target = target_path(job, output)
    about = {"spacing": job.spacing, "unit": job.unit, "affine": job.affine}
    if probs is not None:
        volumes.write_volume(output / "probabilities" / target.name, probs, **about)
    volumes.write_volume(target, mask, **about)
    return target


@contextlib.contextmanager
def progress_of(job, console):
    """A callable(done, total): a bar on a terminal, elsewhere a line now and then."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(30), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(job.id)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.perf_counter()

    def line(done, total):
        nonlocal last
        if time.perf_counter() - last > SECONDS_BETWEEN_LINES:
            console.print(f"{job.id}: {done} of {total} windows")
            last = time.perf_counter()

    yield line


# ---------------------------------------------------------------------------- command line


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="a checkpoint that train.py wrote")
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="case files, prepared folders, volumes, folders or patterns of volumes",
    )
    parser.add_argument("--output", help="folder; default: predictions/ of the checkpoint's run")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value")
    arguments = parser.parse_intermixed_args(argv)
    # After --input all that follows is taken for a path.
    keys = tuple(f"{key.split('.')[0]}." for key in config.valid_keys())
    late = [t for t in arguments.input if "=" in t and t.startswith(keys) and not Path(t).exists()]
    arguments.overrides += late
    arguments.input = [text for text in arguments.input if text not in late]
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    console = Console(file=runlog.Output(), highlight=False, soft_wrap=True, markup=False)

    # ------------------------------------------------------------------ everything is checked
    try:
        state = checkpoint.load(arguments.ckpt)
    except checkpoint.CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    faults = []
    output = Path(arguments.output or default_output(arguments.ckpt))
    given = [t.partition("=")[2] for t in arguments.overrides if t.startswith("data.root=")]
    root = given[-1] if given else state["data"]["root"]
    with collected(faults):
        settings = resolve_settings(state, arguments.overrides)
        device, device_reason = windows.resolve_device(settings.run.device)
        precision, precision_reason = windows.resolve_precision(settings.training.precision, device)
    with collected(faults):
        network, weights = build_network(state)
    with collected(faults):
        jobs, notes = check_inputs(arguments.input, state, root, output)
    if faults:
        print("\n".join(faults), file=sys.stderr)
        return 2

    # ------------------------------------------------------------------ what will happen, and why
    torch.set_num_threads(windows.resolve_threads(settings.run.threads))
    inference = settings.inference
    for line in [
        f"checkpoint {arguments.ckpt}, step {state['loop']['step']}, {weights}",
        f"device     {device} ({device_reason}), precision {precision} ({precision_reason})",
        f"windows    {list(inference.window or settings.sampling.patch)}, overlap "
        f"{inference.overlap}, {'8 flips' if inference.flips else 'no flips'}, threshold "
        f"{inference.threshold}, {_masks(settings)}",
        *notes,
    ]:
        console.print(line)

    # ------------------------------------------------------------------ one volume after another
    network.to(device)
    remembered = {}  # which sizes of volumes need what memory
    for number, job in enumerate(jobs, start=1):
        started = time.perf_counter()
        with progress_of(job, console) as progress:
            how = {"device": device, "precision": precision, "progress": progress}
            how |= {
                "remembered": remembered,
                "report": lambda kind, text, **figures: console.print(text),
            }
            try:
                with readable(job.path):
                    mask, probs = predict(network, job, settings, state["data"]["spacing"], **how)
            except (stopping.CannotGoOn, boxes.Unreadable) as fault:
                print(f"{job.id}: {fault}", file=sys.stderr)
                return 1
        try:
            target = write(job, output, mask, probs)
        except OSError as error:
            print(f"{job.id}: the prediction cannot be written ({error})", file=sys.stderr)
            return 1
        console.print(
            f"{number}/{len(jobs)} {job.id}: {'x'.join(map(str, job.shape))}, "
            f"{time.perf_counter() - started:.1f} s, {100 * mask.mean():.2f} % foreground, {target}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
