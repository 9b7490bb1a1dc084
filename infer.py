"""Segment volumes of any size with a trained network; a checkpoint is all it needs.

    python infer.py --ckpt runs/last.pt                               # the run's own test cases
    python infer.py --ckpt runs/last.pt --input scans/ --output out/  # NIfTI, TIFF, HDF5
    python infer.py --ckpt runs/vessels/checkpoints/best.pt --input a.nii.gz inference.flips=true
    python infer.py --ckpt runs/last.pt inference.threshold=0.4 postprocess.min_component_voxels=50
    python infer.py --ckpt runs/last.pt --input test_images/ --submission submission.zip

Leaves <output>/<id> in the format of the source, uint8 0 and 1 on the image's own grid with its
spacing and affine; with inference.save_probabilities=true also <output>/probabilities/<id>.
Without --output these go to the run's predictions/. --submission writes the masks a second time,
in the format of the Vesuvius Challenge, and reads them back. Every input is checked before the
first is predicted. Exit status: 0 done, 1 a result could not be made or written (it is named, the
others are there, but no submission), 2 the input is wrong (one sentence per fault, nothing
written).
"""

import argparse
import contextlib
import functools
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import data
import model
from runtime import checkpoint, config
from runtime.signals import CannotGoOn
from runtime.sliding_window import predict_case, resolve_device, resolve_precision
from scoring import postprocess
from volumes.files import write_volume
from volumes.inputs import check_inputs
from volumes.processes import cores, run_script
from volumes.submission import SubmissionError, open_submission, submission_faults
from volumes.volume import InputErrors, VolumeError, collect_errors

# All else that a config holds was decided by training and comes from the checkpoint.
DEVICE_KEYS = ("run.device", "run.threads", "training.precision")
SETTABLE = ("inference.", "postprocess.", "data.root", *DEVICE_KEYS)
SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


# ---------------------------------------------------------------------------- settings


def resolve_settings(state, overrides):
    """The run's settings with overrides; ValueError names every fault, a line each."""
    keys = {text.partition("=")[0] for text in overrides} & set(config.valid_keys())
    if fixed := sorted(key for key in keys if not key.startswith(SETTABLE)):
        sentence = (
            f"expected a setting of inference (those under {', '.join(SETTABLE)}), got one that "
            "training has decided; leave it out"
        )
        raise InputErrors(*(f"{key}: {sentence}" for key in fixed))
    settings = config.build(config.apply_overrides(state["config"], overrides))
    settings = settings.with_chosen(state["loop"]["evaluations"]["chosen"])
    window = settings.inference.window or settings.sampling.patch
    model.check_divides("inference.window", window, state["data"]["strides"])
    return settings


def build_network(state):
    """(network, which weights) of a checkpoint, in eval mode on the CPU."""
    metadata = state["data"]
    network = model.build_network(
        metadata["channels"],
        1,
        strides=metadata["strides"],
        kernels=metadata["kernels"],
        settings=config.build(state["config"]).model.model_dump(),
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


def prepare_to_predict(arguments):
    """(predictor, inputs, output, lines) of a command line; ValueError names every fault.

    predictor(volume, **how) is `predict` by the run; lines say what will happen and why.
    """
    state, faults = checkpoint.load(arguments.ckpt), []
    folder = Path(arguments.ckpt).resolve().parent
    run = folder.parent if folder.name == "checkpoints" else Path()
    output = Path(arguments.output or run / "predictions")
    roots = [t.partition("=")[2] for t in arguments.overrides if t.startswith("data.root=")]
    with collect_errors(faults):
        settings = resolve_settings(state, arguments.overrides)
        device, device_reason = resolve_device(settings.run.device)
        precision, precision_reason = resolve_precision(settings.training.precision, device)
    with collect_errors(faults):
        network, weights = build_network(state)
    with collect_errors(faults):
        root = [state["data"]["root"], *roots][-1]
        inputs, notes = check_inputs(arguments.input, state["data"], root, output)
        if arguments.submission:
            faults += submission_faults(arguments.submission, [volume.id for volume in inputs])
    for volume in inputs if not faults else ():
        if volume.spacing is not None:
            window = settings.inference.window or settings.sampling.patch
            grid = (volume.spacing, state["data"]["spacing"], volume.unit)
            faults += data.spacing_faults(volume.path, volume.shape, window, *grid)
    if faults:
        raise InputErrors(*faults)
    torch.set_num_threads(settings.run.threads or cores())
    # remembered: what memory the volumes before have needed, for all that follow.
    how = {"device": device, "precision": precision, "remembered": {}}
    predictor = functools.partial(predict, network.to(device), settings, state["data"], **how)
    inference, post = settings.inference, settings.postprocess.model_dump()
    steps = ", ".join(f"{key} {value}" for key, value in post.items() if value)
    lines = [
        f"checkpoint {arguments.ckpt}, step {state['loop']['step']}, {weights}",
        f"device     {device} ({device_reason}), precision {precision} ({precision_reason})",
        f"windows    {list(inference.window or settings.sampling.patch)}, overlap "
        f"{inference.overlap}, {'8 flips' if inference.flips else 'no flips'}, threshold "
        f"{inference.threshold}, {steps or 'no postprocessing'}",
    ]
    return predictor, inputs, output, lines + notes


# ---------------------------------------------------------------------------- prediction


def predict(network, settings, metadata, volume, **how):
    """(mask, probs) of an `Input`: mask (D, H, W) uint8 of 0 and 1; probs float32 or None.

    metadata: what the checkpoint says of the run's data; how: device, precision and more for
    predict_case. Memory: a byte per voxel beside the slab, four more if
    inference.save_probabilities asks for probs.
    """
    inference, post = settings.inference, settings.postprocess
    high = np.empty(volume.shape, bool)
    low = None if post.hysteresis is None else np.empty(volume.shape, bool)
    probs = np.empty(volume.shape, np.float32) if inference.save_probabilities else None
    how |= settings.window_arguments()
    how |= {"wanted": metadata["spacing"], "clip": settings.data.percentiles}
    how["typical"] = metadata.get("typical", False)  # not in checkpoints of older versions
    with volume.voxels() as image:
        for z0, planes in predict_case(network, image, volume.spacing, volume.intensity, **how):
            part = slice(z0, z0 + planes.shape[1])
            high[part] = planes[0] >= inference.threshold
            if low is not None:
                low[part] = planes[0] >= post.hysteresis
            if probs is not None:
                probs[part] = planes[0]
    mask = postprocess.apply(high, low, spacing=volume.spacing, **post.model_dump())
    return mask.astype(np.uint8), probs


def predict_and_write(predictor, volume, output, archive, console):
    """Predict an `Input` and write its results; returns a line about them, or CannotGoOn."""
    started = time.perf_counter()
    target = volume.prediction_path(output)
    grid = {key: getattr(volume, key) for key in ("spacing", "unit", "affine", "header")}
    try:
        with progress_of(volume, console) as progress:
            mask, probs = predictor(
                volume, progress=progress, report=lambda kind, text, **_: console.print(text)
            )
    except (CannotGoOn, VolumeError) as error:
        raise CannotGoOn(f"{volume.id}: {error}") from error
    except MemoryError as error:
        raise CannotGoOn(
            f"{volume.id}: memory ran out ({error}); end what else runs there"
        ) from error
    except Exception as error:  # what nobody expected does not cost the other volumes
        traceback.print_exc()
        raise CannotGoOn(f"{volume.id}: {type(error).__name__}, see above") from error
    try:
        if probs is not None:
            write_volume(output / "probabilities" / target.name, probs, **grid)
        write_volume(target, mask, **grid)
        if archive:
            archive.add(volume.id, mask)
    except Exception as error:  # each format's writer has its own
        raise CannotGoOn(f"{volume.id}: the prediction cannot be written ({error})") from error
    seconds, share = time.perf_counter() - started, 100 * mask.mean()
    size = "x".join(map(str, volume.shape))
    return f"{volume.id}: {size}, {seconds:.1f} s, {share:.2f} % foreground, {target}"


def predict_all(predictor, inputs, output, archive, console):
    """Predict and write every `Input`. What cannot be is named by a CannotGoOn at the end."""
    failures = []
    for number, volume in enumerate(inputs, start=1):
        try:
            complete = None if failures else archive
            line = predict_and_write(predictor, volume, output, complete, console)
        except CannotGoOn as error:
            line = str(error)
            failures.append(line)
        console.print(f"{number}/{len(inputs)} {line}")
    if failures and archive:
        failures.append("--submission: not written, for masks are missing")
    if failures:
        raise CannotGoOn("\n".join(failures))


@contextlib.contextmanager
def progress_of(volume, console):
    """A callable(done, total): a bar on a terminal, elsewhere a line now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(30), TimeRemainingColumn())
    last = time.perf_counter()

    def advance(done, total):
        nonlocal last
        bar.update(task, completed=done, total=total)
        if bar.disable and time.perf_counter() - last > SECONDS_BETWEEN_LINES:
            console.print(f"{volume.id}: {done} of {total} windows")
            last = time.perf_counter()

    disable = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(volume.id)
        yield advance


# ---------------------------------------------------------------------------- command line


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint that train.py wrote")
    what = "case files, prepared folders, volumes, folders or patterns of volumes"
    add("--input", nargs="+", action="extend", default=[], metavar="PATH", help=what)
    add("--output", help="folder; default: predictions/ of the checkpoint's run")
    add("--submission", metavar="FILE.zip", help="write the masks into this too")
    add("overrides", nargs="*", metavar="group.key=value")
    arguments = parser.parse_intermixed_args(argv)
    # argparse takes settings that follow --input for paths.
    keys = tuple(f"{key.split('.')[0]}." for key in config.valid_keys())
    late = [t for t in arguments.input if "=" in t and t.startswith(keys) and not Path(t).exists()]
    arguments.overrides += late
    arguments.input = [text for text in arguments.input if text not in late]
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    try:
        predictor, inputs, output, lines = prepare_to_predict(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console.print("\n".join(lines))
    torch.backends.cudnn.benchmark = True  # all windows have one shape; see train.py
    submission = arguments.submission
    try:
        with open_submission(submission) if submission else contextlib.nullcontext() as archive:
            predict_all(predictor, inputs, output, archive, console)
        if submission:
            console.print(f"{submission}: {len(inputs)} masks, read back and the same")
    except (CannotGoOn, SubmissionError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{submission}: the submission cannot be written ({error})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
