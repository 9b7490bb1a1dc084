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
first is predicted. Exit status: 0 done, 1 a result could not be made or written, 2 the input is
wrong (one sentence per fault, nothing written).
"""

import argparse
import contextlib
import functools
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import data
import model
from patches import intensity
from runtime import checkpoint, config
from runtime import log as runlog
from runtime import signals as stopping
from runtime import sliding_window as windows
from scoring import postprocess
from volumes import boxes, submission
from volumes import files as volumes
from volumes.inputs import check_inputs, collected, readable, target_path

# All else that a config holds was decided by training and comes from the checkpoint.
DEVICE_KEYS = ("run.device", "run.threads", "training.precision")
SETTABLE = ("inference.", "postprocess.", "data.root", *DEVICE_KEYS)
SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


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
    mask = postprocess.apply(high, low, spacing=job.spacing, **post.model_dump())
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


def default_output(ckpt):
    """The predictions/ of the run that a checkpoint lies in; else that of the working folder."""
    folder = Path(ckpt).resolve().parent
    return folder.parent / "predictions" if folder.name == "checkpoints" else Path("predictions")


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
    parser.add_argument("--submission", metavar="FILE.zip", help="write the masks into this too")
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
        if arguments.submission:
            faults += submission.faults_of(arguments.submission, [job.id for job in jobs])
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
    how = {
        "device": device,
        "precision": precision,
        "remembered": {},  # which sizes of volumes need what memory
        "report": lambda kind, text, **figures: console.print(text),
    }
    network.to(device)
    with contextlib.ExitStack() as stack:
        archive = None
        try:
            if arguments.submission:
                archive = stack.enter_context(submission.Submission(arguments.submission))
            for number, job in enumerate(jobs, start=1):
                started = time.perf_counter()
                with progress_of(job, console) as progress, readable(job.path):
                    mask, probs = predict(
                        network, job, settings, state["data"]["spacing"], progress=progress, **how
                    )
                target = write(job, output, mask, probs)
                if archive:
                    archive.add(job.id, mask)
                console.print(
                    f"{number}/{len(jobs)} {job.id}: {'x'.join(map(str, job.shape))}, "
                    f"{time.perf_counter() - started:.1f} s, {100 * mask.mean():.2f} % foreground, "
                    f"{target}"
                )
            if archive:
                archive.finish()
                console.print(f"{arguments.submission}: {len(jobs)} masks, read back and the same")
        except (stopping.CannotGoOn, boxes.Unreadable) as fault:
            return _failed(f"{job.id}: {fault}")
        except OSError as error:
            return _failed(f"{job.id}: the prediction cannot be written ({error})")
        except submission.SubmissionError as error:
            return _failed(error)
    return 0


def _failed(text):
    print(text, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
