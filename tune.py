"""Find the fastest settings, measure what a long run will cost, or see what augmentation does.

    python tune.py configs/vessels.yaml                        # then:
    python train.py configs/vessels.yaml tuned.yaml
    python tune.py configs/vessels.yaml training.workers=2 --steps 60 --out tuned_2.yaml
    python tune.py configs/exp001_full.yaml --benchmark
    python tune.py configs/vessels.yaml --benchmark --steps 60 --json costs.json training.workers=2
    python tune.py configs/vessels.yaml --contact-sheet augment.png augment.elastic=1

Without an option it tries workers, batch size, prefetching, precision and checkpointing, one after
the other, each by a short run of train.py: see runtime/tuning.py. It prints each decision and a
table, and writes tuned.yaml, a second config for train.py. A step that runs out of memory, is
killed or does not save time is taken back. The learning rate and the patches of a step stay.

--benchmark runs train.py for some steps on the config's training cases, without validation, and
reads its log; reading and prediction are measured directly. It prints a table: what was measured,
the figure it must stay under, and a verdict; --json writes the same. --contact-sheet shows each
transformation alone on a patch of the first training case.

No run folder is left. Exit status: 0 tuned, or all that was measured is under its figure; 1 no
settings work, or something is over; 2 the input is wrong (one sentence per fault, nothing written);
75 stopped early, and nothing was written.
"""

import argparse
import functools
import itertools
import json
import math
import os
import shlex
import statistics
import time
from pathlib import Path
from typing import NamedTuple

# Threads that wait spin for microseconds only, not for milliseconds: beside other work they would
# take the cores from those they wait for. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import h5py
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

import data
from monitoring.records import peaks
from patches import contact_sheet
from runtime import build, config, folder, sliding_window, tuning
from runtime.device_memory import out_of_memory
from runtime.ending import DONE, FAILED, STOPPED
from runtime.signals import CannotGoOn, Stopped
from runtime.threads import use_threads
from runtime.tuning import WARM_UP
from volumes.processes import command_of, cores, run_script

STEPS, FOLDS, FOLD_STEPS = 30, 3, 2
SLABS = 2  # of the prediction: with the second the slab has moved on, and memory is at its most
MS, MB, GB, PERCENT = 1e-3, 1e6, 1e9, 1e-2
PLAIN = {"highlight": False, "markup": False, "emoji": False}
console = Console(soft_wrap=True, **PLAIN)


class Figure(NamedTuple):
    """A row of the table. limit None: not judged; advice: what to change if it is over."""

    title: str
    unit: str
    limit: float | None = None
    advice: str = ""


class Measured(NamedTuple):
    """A value in its figure's unit, with a note; without a value the note says why."""

    value: float | None
    note: str = ""


NO_GPU, NO_MEMORY = Measured(None, "no GPU"), Measured(None, "ran out of memory")
WORKERS = "raise training.workers, then training.prefetch_factor and data.cache_gb"
SMALLER = "lower training.train_batch_size and raise training.accumulate"
RECOMPUTE = f"set model.checkpointing=true, or {SMALLER}"
FIGURES = {
    "fill": Figure("cache fill, first read", "s", 30, "put data.root on a faster disk"),
    "pass": Figure("epoch pass, a patch of every case", "s", 5, WORKERS),
    "transfer": Figure("transfer of a batch", "ms", 10, SMALLER),
    "augment": Figure("resampling and augmentation of a batch", "ms"),
    "step": Figure("step", "ms"),
    "wait": Figure("wait for data, share of the step", "%", 5, WORKERS),
    "gpu_training": Figure("GPU memory in training", "GB", 6, RECOMPUTE),
    "gpu_inference": Figure("GPU memory in inference", "GB", 7, "lower inference.batch or window"),
    "ram_training": Figure("RAM of all processes in training", "GB"),
    "folds": Figure("RAM across folds, difference to the first", "MB", 200, "lower data.cache_gb"),
}


# ---------------------------------------------------------------------------- reading, prediction


def measure_fill(plan, patches):
    """Read each training case once, so that the cache holds what it has room for."""
    for case in plan.split.train if hasattr(os, "posix_fadvise") else ():
        with open(case.path, "rb", buffering=0) as file:  # out of the system's file cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    for case in plan.split.train:
        patches.cache.read(case, (slice(0, 1),) * 3, patches.names)
    seconds, held = time.perf_counter() - started, patches.cache.counts()
    note = f"{held['bytes'] / GB:.3g} GB, {held['cases']} of {len(plan.split.train)} cases held"
    return {"fill": Measured(seconds, note)}


def measure_pass(plan, patches):
    """Read one patch of every training case with the workers of a run."""
    # Around background each case is sampled once before any is sampled again.
    patches = build.make_patches(plan, cache=patches.cache, foreground_share=0.0)
    training, count = plan.settings.training, len(plan.split.train)
    workers, batch = training.workers, training.train_batch_size
    batches = math.ceil(count / batch)
    # What is read while the workers start is not timed.
    warm_up = math.ceil(max(1, workers * training.prefetch_factor) / batches)
    loader = DataLoader(
        patches,
        batch,
        sampler=[(epoch, i) for epoch in range(warm_up + 1) for i in range(batches * batch)],
        num_workers=workers,
        prefetch_factor=training.prefetch_factor if workers else None,
        multiprocessing_context="spawn" if workers else None,
        collate_fn=len,  # boxes would go through /dev/shm, which may be small
    )
    ends = [time.perf_counter() for _ in loader]
    return {"pass": Measured(ends[-1] - ends[-1 - batches], f"{count} cases, {workers} workers")}


def measure_inference(plan):
    """GPU memory of a network that predicts the first slabs of the largest case."""
    if plan.device.type != "cuda":
        return {"gpu_inference": NO_GPU}
    torch.cuda.reset_peak_memory_stats(plan.device)
    reports = []
    try:
        _predict_slabs(plan, lambda kind, text, **_: reports.append(text))
    except (RuntimeError, CannotGoOn) as error:
        if not isinstance(error, CannotGoOn) and not out_of_memory(error):
            raise
        reports.append(str(error))
    peak = torch.cuda.max_memory_allocated(plan.device) / GB
    return {"gpu_inference": NO_MEMORY if reports else Measured(peak, "live tensors")}


def _predict_slabs(plan, report):
    settings, cases = plan.settings, itertools.chain(*vars(plan.split).values())
    case = max(cases, key=lambda case: math.prod(case.shape))
    with h5py.File(case.path, "r") as file:
        slabs = sliding_window.predict_case(
            build.make_network(plan).eval(),
            file["image"],
            case.spacing,
            case.intensity,
            wanted=settings.data.spacing,
            clip=settings.data.percentiles,
            channels=plan.outputs.channels,
            exclusive=plan.outputs.exclusive,
            device=plan.device,
            precision=plan.precision,
            report=report,
            **settings.window_arguments(),
        )
        list(itertools.islice(slabs, SLABS))


# ---------------------------------------------------------------------------- training


def run_training(plan, steps):
    """Run train.py for some steps. ValueError if it fails.

    Returns the lines of its log; the most bytes that all its processes had in memory; and those by
    which the memory in use of a GPU grew most (None without a reading).
    """
    run = tuning.run_training(plan, steps)
    if run.failure:
        raise ValueError(run.failure)
    return run.log, *peaks(run.readings)


def measure_training(plan, steps):
    """The step and its parts, and the memory of the run."""
    log, ram, gpu = run_training(plan, WARM_UP + steps)
    troubles = [line["text"] for line in log if line["event"] == "trouble"]
    for text in troubles:
        console.print(f"train.py   {text}")
    steps = [line for line in log if line["event"] == "step"][1:]  # after the warm-up
    training = plan.settings.training
    figures = step_figures(steps, training.accumulate)
    figures["ram_training"] = Measured(ram / GB, f"1 + {training.workers} workers")
    if plan.device.type != "cuda":
        return figures | {"transfer": NO_GPU, "gpu_training": NO_GPU}
    if any("ran out of memory" in text for text in troubles):
        return figures | {"gpu_training": NO_MEMORY}
    note = "no reading of the GPU" if gpu is None else "growth, with torch's reserve"
    return figures | {"gpu_training": Measured(None if gpu is None else gpu / GB, note)}


def step_figures(lines, accumulate):
    """Figures of the step lines of a log: medians of their means over WARM_UP steps."""
    names = lines[0]["seconds"]
    median = {n: statistics.median(line["seconds"][n] for line in lines) / MS for n in names}
    step = statistics.median(line["step_seconds"] for line in lines) / MS
    return {
        "transfer": Measured(median["transfer"] / accumulate),
        "augment": Measured(median["augment"] / accumulate),
        "step": Measured(step, ", ".join(f"{name} {ms:.1f}" for name, ms in median.items())),
        "wait": Measured(median["wait"] / step / PERCENT),
    }


def measure_folds(plan):
    """Memory of short runs of several folds, each a process of its own as in cross-validation."""
    sizes = []
    for fold in range(FOLDS):
        settings = plan.settings.model_copy(deep=True)
        settings.data.fold = fold % (settings.data.folds or 1)
        sizes.append(run_training(build.resolve(settings), FOLD_STEPS)[1] / MB)
    note = "each: " + ", ".join(f"{size:.0f}" for size in sizes)
    return {"folds": Measured(max(abs(size - sizes[0]) for size in sizes), note)}


# ---------------------------------------------------------------------------- report


def measure(plan, steps):
    """{name: Measured} of all figures."""
    patches = build.make_patches(plan)
    with console.status("measuring"):
        figures = measure_fill(plan, patches) | measure_pass(plan, patches)
        figures |= measure_inference(plan)
        try:
            return figures | measure_training(plan, steps) | measure_folds(plan)
        except ValueError as error:
            return dict.fromkeys(FIGURES, Measured(None, str(error))) | figures


def verdict(measured, limit):
    """ "ok", "over", "not measured: why", or "" where nothing is judged."""
    if measured.value is None:
        return "over" if measured == NO_MEMORY else f"not measured: {measured.note}"
    if limit is None:
        return ""
    return "ok" if measured.value < limit else "over"


def show(figures, verdicts):
    """Print all figures, and what to change for each that is over."""
    table = Table("what", "measured", "figure", "verdict", "of which")
    for name, figure in FIGURES.items():
        value, note = figures[name]
        measured = "" if value is None else f"{value:.4g} {figure.unit}"
        limit = "" if figure.limit is None else f"< {figure.limit} {figure.unit}"
        table.add_row(figure.title, measured, limit, verdicts[name], note if measured else "")
    Console(**PLAIN, width=None if console.is_terminal else 120).print(table)
    for name, figure in FIGURES.items():
        if verdicts[name] == "over":
            console.print(f"{figure.title} is over: {figure.advice}")


def device_name(plan):
    return torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu"


def benchmark(plan, *, steps=STEPS, json_file=None):
    """Measure what a plan will cost, over this many steps. Returns the exit status."""
    use_threads(plan.settings.run.threads)
    device = device_name(plan)
    console.print(f"device     {device}, {torch.get_num_threads()} CPU threads, {plan.precision}")
    console.print(f"data       {len(plan.split.train)} training cases of {plan.dataset.root}")
    figures = measure(plan, steps)
    verdicts = {name: verdict(figures[name], figure.limit) for name, figure in FIGURES.items()}
    show(figures, verdicts)
    if json_file is not None:
        content = {"device": device, "versions": folder.versions(), "steps": steps}
        content["figures"] = {
            name: {**figure._asdict(), **figures[name]._asdict(), "verdict": verdicts[name]}
            for name, figure in FIGURES.items()
        }
        content["settings"] = plan.settings.plain()
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if "over" in verdicts.values() else 0


def write_contact_sheet(plan, path):
    """Show each transformation of the settings on a patch of the first training case."""
    settings, case = plan.settings, plan.split.train[0]
    contact_sheet.write_sheet(
        path,
        case,
        settings.augment.model_dump(),
        patch=settings.sampling.patch,
        spacing=data.network_spacing(case.spacing, settings.data.spacing),
        scale=data.normalisation(case.intensity, settings.data.percentiles),
        regions=plan.outputs.regions,
        ignore_label=plan.dataset.ignore_label,
        seed=settings.run.seed,
        name=settings.run.name,
    )
    console.print(f"wrote {path}")


# ---------------------------------------------------------------------------- tuning


def tune(plan, words, *, steps=STEPS, out):
    """Try settings of a plan and write what was decided. Returns the exit status.

    words: the files and overrides that the plan comes from.
    """
    comments = [f"Decided by tune.py on {time.strftime('%Y-%m-%d')} for {' '.join(words)}"]
    comments.append(f"device     {device_name(plan)}, {cores()} CPU cores, {steps} steps a trial")
    console.print(comments[-1])

    def say(text):
        comments.append(text)
        console.print(text)

    tuner = tuning.Tuner(plan, functools.partial(tuning.measure, plan, steps), say)
    tuner.decide()
    table = Table("settings", *tuning.TITLES, "verdict")
    for trial, verdict in tuner.rows:
        table.add_row(tuning.named(trial.changes), *trial.cells(), verdict)
    Console(**PLAIN, width=None if console.is_terminal else 160).print(table)
    if tuner.best.fault:
        console.print("no settings that were tried work here; nothing is written")
        return FAILED
    if changes := tuning.named(tuner.best.changes):
        say(f"decision   {changes}: {tuner.best}; the config: {tuner.rows[0][0]}")
    else:
        say("decision   the config stays as it is")
    tuning.write_settings(out, tuner.decided, comments)
    kept = [word for word in words if word.partition("=")[0] not in tuner.decided]
    console.print(f"wrote {out}; next: {command_of('train.py')} {shlex.join([*kept, str(out)])}")
    return DONE


def cli(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, task = parser.add_argument, parser.add_mutually_exclusive_group()
    add("config", help="the YAML file of the run to come")
    add("more", nargs="*", metavar="MORE.yaml | group.key=value")
    task.add_argument("--benchmark", action="store_true", help="measure what the run will cost")
    task.add_argument("--contact-sheet", type=Path, metavar="FILE", help="a PNG to write")
    add("--steps", type=int, default=STEPS, metavar="N", help=f"to measure; default {STEPS}")
    add("--json", type=Path, metavar="FILE", help="where --benchmark writes its figures")
    add("--out", type=Path, metavar="FILE", help="the settings decided; default tuned.yaml")
    arguments = parser.parse_intermixed_args(argv)
    words = [arguments.config, *arguments.more]
    tunes = not (arguments.benchmark or arguments.contact_sheet)
    least = tuning.LEAST_STEPS if tunes else 1
    if arguments.steps < least:
        parser.error(f"--steps: expected {least} or more, got {arguments.steps}")
    if arguments.out and not tunes:
        parser.error("--out: expected neither --benchmark nor --contact-sheet with it")
    json_file, out = arguments.json, arguments.out or Path("tuned.yaml")
    try:
        plan = build.resolve(config.load(arguments.config, arguments.more))
        for option, path in (("--json", json_file), ("--out", out if tunes else None)):
            if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
                raise ValueError(f"{option}: expected a file in a folder to write to, got {path}")
        if tunes and out.resolve() in [Path(word).resolve() for word in words]:
            raise ValueError(f"--out: expected another file than those that are read, got {out}")
        if arguments.contact_sheet:
            write_contact_sheet(plan, arguments.contact_sheet)
            return DONE
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")
    try:
        if tunes:
            return tune(plan, words, steps=arguments.steps, out=out)
        return benchmark(plan, steps=arguments.steps, json_file=json_file)
    except (Stopped, KeyboardInterrupt) as stopped:
        console.print(f"stopped: {str(stopped) or 'interrupted'}; nothing is written")
        return STOPPED


if __name__ == "__main__":
    run_script(cli)
