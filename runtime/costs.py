"""What a run costs, measured before it: the time and the memory of each of its parts.

Each measure_ function returns Measured, by the names and in the units of `tune.FIGURES`.
"""

import contextlib
import functools
import gc
import itertools
import math
import os
import statistics
import time
from typing import NamedTuple

import h5py
import torch

import data
from monitoring import memory
from patches import intensity, transfer
from runtime import build as planning
from runtime import sliding_window as windows
from runtime import trial

WARM_UP = 3  # steps before those that are measured
FOLDS, FOLD_STEPS = 3, 2
COPIES = 10  # of a batch to the device
SLABS = 2  # of the inference: with the second the slab has moved on, and memory is at its most
NO_GPU, NO_MEMORY = "no GPU", "out of memory"
MS, MB, GB, PERCENT = 1e-3, 1e6, 1e9, 1e-2


class Measured(NamedTuple):
    """A value in its figure's unit, with a note; without a value the note says why."""

    value: float | None
    note: str = ""


# ---------------------------------------------------------------------------- data


def measure_fill(plan, patches):
    """Read each training case once, so that the cache keeps what it has room for."""
    for case in plan.split.train:
        _forget_pages(case.path)
    started = time.perf_counter()
    for case in plan.split.train:
        patches.cache.read(case, (slice(0, 1),) * 3, patches.names)
    seconds = time.perf_counter() - started
    kept = patches.cache.counts()
    of = f"{kept['bytes'] / GB:.3g} GB, {kept['cases']} of {len(plan.split.train)} cases kept"
    return {"fill": Measured(seconds, of)}


def _forget_pages(path):
    """Ask the system to drop a file from its cache; what another process maps, it keeps."""
    if not hasattr(os, "posix_fadvise"):
        return
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_pass(plan, patches):
    """One patch of every training case through the workers, boxes only."""
    # Around background each case is drawn once before any is drawn again.
    patches = planning.make_patches(plan, cache=patches.cache, foreground_share=0.0)
    count, training = len(plan.split.train), plan.settings.training
    per_epoch = math.ceil(count / training.train_batch_size)
    # What workers made while the last of them still started is no measure of their speed.
    early = math.ceil(max(1, training.workers * training.prefetch_factor) / per_epoch)
    source = trial.batches(plan, patches, (early + 1) * per_epoch, per_epoch)
    with contextlib.closing(source):
        _take(source, early * per_epoch)
        started = time.perf_counter()
        _take(source, per_epoch)
        seconds = time.perf_counter() - started
    return {"pass": Measured(seconds, f"{count} cases, {training.workers} workers")}


def _take(source, count):
    """Up to `count` items of an iterator, dropped; its end, where workers are stopped, is left."""
    for _ in itertools.islice(source, count):
        pass


# ---------------------------------------------------------------------------- inference


def measure_inference(plan):
    """Memory of a network alone that predicts the first slabs of the largest case."""
    try:
        with trial.PeakMemory(plan.device) as peak:
            _predict_slabs(plan, planning.make_network(plan).eval())
    except torch.OutOfMemoryError:
        return _over("inference")
    return _memory("inference", peak)


def _predict_slabs(plan, network):
    case = max(itertools.chain(*vars(plan.split).values()), key=lambda case: math.prod(case.shape))
    wanted = data.network_spacing(case.spacing, plan.settings.data.spacing)
    scale = data.normalisation(case.intensity, plan.settings.data.percentiles)
    with h5py.File(case.path, "r") as file:
        slabs = windows.predict_slabs(
            network,
            file["image"],
            ratio=[w / s for w, s in zip(wanted, case.spacing, strict=True)],
            normalize=functools.partial(intensity.normalise, **scale),
            device=plan.device,
            precision=plan.precision,
            **plan.settings.window_arguments(),
        )
        _take(slabs, SLABS)


def _memory(phase, peak):
    found = {f"ram_{phase}": Measured(peak.ram / GB, "growth of this process")}
    if peak.gpu is None:
        return found | {f"gpu_{phase}": Measured(None, NO_GPU)}
    held = f"{peak.reserved / GB:.2f} GB with what torch keeps in reserve"
    return found | {f"gpu_{phase}": Measured(peak.gpu / GB, held)}


def _over(phase):
    return {f"gpu_{phase}": Measured(math.inf, NO_MEMORY)}


# ---------------------------------------------------------------------------- training


def measure_training(plan, patches, steps):
    """(figures, details): the step with its data and without, and the memory of it all.

    details: seconds of each part of a step, {"real": {part: median}, "synthetic": the same}.
    """
    numbers = range(WARM_UP + steps)
    needed = len(numbers) * plan.settings.training.accumulate + 1  # one is for the copies
    with contextlib.closing(trial.batches(plan, patches, needed)) as source:
        try:
            with trial.PeakMemory(plan.device) as peak:
                trainer = trial.Trainer(plan)
                real = _steps(trainer, trial.from_loader(plan, source), numbers)
            tree = sum(memory.tree_memory().values())
            samples = next(source)
            drawn = planning.draw(plan, samples)
            synthetic = _steps(trainer, lambda ticks: drawn, numbers)
        except torch.OutOfMemoryError:
            return _over("training"), {}
        transfer = measure_transfer(plan.device, samples)
    details = {"real": trial.medians(real), "synthetic": trial.medians(synthetic)}
    found = step_figures(**details, accumulate=plan.settings.training.accumulate)
    found["wait"] = Measured(trial.wait_share(real) / PERCENT)
    workers = plan.settings.training.workers
    found["tree"] = Measured(tree / GB, f"1 + {workers} workers, shared pages once")
    return found | {"transfer": transfer} | _memory("training", peak), details


def _steps(trainer, fetch, numbers):
    step = functools.partial(trainer.step, fetch)
    return trial.run_steps(step, numbers, trainer.plan.device)[WARM_UP:]


def measure_transfer(device, samples):
    """Median time of copying a batch, as the loader gives it, to the device."""
    if device.type != "cuda":
        return Measured(None, NO_GPU)
    stream, seconds = transfer.copy_stream(device), []
    for _ in range(COPIES):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        transfer.to_device(samples, device, stream)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return Measured(statistics.median(seconds) / MS)


def step_figures(real, synthetic, accumulate):
    """Figures of the step from medians of its parts, with data and without."""
    parts = ", ".join(f"{n} {s / MS:.1f}" for n, s in real.items() if n not in ("step", "draw"))
    return {
        "draw": Measured(real["draw"] / accumulate / MS),
        "step": Measured(real["step"] / MS, parts),
        "synthetic": Measured(synthetic["step"] / MS, "one batch, drawn once"),
        "ratio": Measured(real["step"] / synthetic["step"]),
    }


# ---------------------------------------------------------------------------- folds


def measure_folds(plan):
    """Resident memory of this process after each of several trainings, one after the other."""
    after = []
    for _ in range(FOLDS):
        try:
            _one_fold(plan)
        except torch.OutOfMemoryError:
            return {"folds": Measured(None, NO_MEMORY)}
        gc.collect()
        after.append(trial.resident_bytes())
    return {"folds": fold_figure(after)}


def _one_fold(plan):
    count = FOLD_STEPS * plan.settings.training.accumulate
    with contextlib.closing(trial.batches(plan, planning.make_patches(plan), count)) as source:
        trainer = trial.Trainer(plan)
        step = functools.partial(trainer.step, trial.from_loader(plan, source))
        trial.run_steps(step, range(FOLD_STEPS), plan.device)


def fold_figure(after):
    """The figure of resident bytes after each fold: the most by which one is off the first."""
    off = max(abs(size - after[0]) for size in after)
    return Measured(off / MB, "after each: " + ", ".join(f"{size / MB:.0f}" for size in after))
