"""Measure what a long run will cost before it is started: time, memory, and who waits for whom.

    python tune.py --benchmark configs/exp001_full.yaml
    python tune.py --benchmark configs/vessels.yaml training.workers=2 --steps 60
    python tune.py --benchmark configs/vessels.yaml --out vessels.json

Takes the config's own data, network, patch, batch and workers, on the device it would train on, and
prints a table: what was measured, the figure it must stay under, and a verdict. Times of steps are
medians after a warm-up. For the cache fill the training cases are taken out of the system's file
cache first, as far as it lets them go.

No run folder is written; --out writes all figures as JSON. Exit status: 0 all that was measured is
under its figure, 1 something is over, 2 the input is wrong (one sentence per fault, nothing
written).
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from runtime import build as planning
from runtime import config, costs
from runtime import folder as runs
from runtime import sliding_window as windows

STEPS = 30  # that are measured
WIDTH = 120  # of the table where it goes to a file
console = Console(highlight=False, soft_wrap=True)


class Figure(NamedTuple):
    """What is measured, in which unit, what it must stay under (None: it is told, not judged), and
    what to turn where it does not."""

    what: str
    unit: str
    limit: float | None = None
    advice: str = ""


FIGURES = {
    "fill": Figure(
        "cache fill, first read", "s", 30, "lower data.cache_gb, or put data.root on a faster disk"
    ),
    "pass": Figure(
        "epoch pass, a patch of every case",
        "s",
        5,
        "raise training.workers, and data.cache_gb where it does not hold all cases",
    ),
    "transfer": Figure(
        "transfer of a batch",
        "ms",
        10,
        "lower training.train_batch_size and raise training.accumulate",
    ),
    "draw": Figure("drawing of a batch", "ms"),
    "step": Figure("step", "ms"),
    "synthetic": Figure("step without data", "ms"),
    "ratio": Figure("step / step without data", ""),
    "wait": Figure(
        "wait for data, share of the step",
        "%",
        5,
        "raise training.workers, then training.prefetch_factor",
    ),
    "gpu_training": Figure(
        "GPU memory in training",
        "GB",
        6,
        "set model.checkpointing=true, or lower training.train_batch_size and raise "
        "training.accumulate",
    ),
    "gpu_inference": Figure(
        "GPU memory in inference", "GB", 7, "lower inference.batch, then inference.window"
    ),
    "ram_training": Figure("RAM in training", "GB"),
    "ram_inference": Figure("RAM in inference", "GB"),
    "tree": Figure("RAM of all processes", "GB"),
    "folds": Figure(
        f"RAM left by a fold, most of {costs.FOLDS}",
        "MB",
        200,
        "run each fold as a process of its own, for no setting gives this memory back",
    ),
}


# ---------------------------------------------------------------------------- report


def verdict(measured, limit):
    """ "ok", "over", "not measured: why", or "" where nothing is judged."""
    if measured.value is None:
        return f"not measured: {measured.note}"
    if limit is None:
        return ""
    return "ok" if measured.value < limit else "over"


def verdicts(found):
    """{name: verdict} for every figure; one that is missing had no memory left to be measured."""
    missing = costs.Measured(None, costs.NO_MEMORY)
    return {name: verdict(found.get(name, missing), f.limit) for name, f in FIGURES.items()}


def show(found):
    """Print all figures, and what to turn for each that is over."""
    judged = verdicts(found)
    table = Table("what", "measured", "figure", "verdict", "of which")
    for name, figure in FIGURES.items():
        value, note = found.get(name, costs.Measured(None))
        limit = "" if figure.limit is None else f"< {figure.limit} {figure.unit}"
        note = "" if value is None else note
        table.add_row(figure.what, _number(value, figure.unit), limit, judged[name], note)
    Console(highlight=False, width=None if console.is_terminal else WIDTH).print(table)
    for name, figure in FIGURES.items():
        if judged[name] == "over":
            console.print(f"{figure.what} is over: {figure.advice}")


def _number(value, unit):
    if value is None or math.isinf(value):
        return ""
    return f"{value:.3g} {unit}".strip() if value < 100 else f"{value:.0f} {unit}"


def report(plan, found, details, steps):
    """All figures as plain values for a JSON file; a value that is not finite becomes None."""
    judged = verdicts(found)
    figures = {}
    for name, figure in FIGURES.items():
        value, note = found.get(name, costs.Measured(None, costs.NO_MEMORY))
        finite = value is not None and math.isfinite(value)
        about = {"unit": figure.unit, "below": figure.limit, "verdict": judged[name], "note": note}
        figures[name] = {"value": value if finite else None, **about}
    return {
        "device": _device_name(plan.device),
        "versions": runs.versions(),
        "steps": steps,
        "workers": plan.settings.training.workers,
        "figures": figures,
        "seconds": details,
        "settings": plan.settings.plain(),
    }


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def write_json(path, content):
    """Write a JSON file whole: under a temporary name first, then renamed."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the script


def main(settings, *, steps=STEPS, out=None):
    """Measure what the settings say, over this many steps. Returns the exit status."""
    try:
        plan = planning.resolve(settings)
        if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
            raise ValueError(f"--out: expected a file in a folder to write to, got {out}")
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(windows.resolve_threads(settings.run.threads))
    for line in announcements(plan, steps):
        console.print(line)
    found, details = measure(plan, steps)
    show(found)
    if out is not None:
        write_json(out, report(plan, found, details, steps))
    return 1 if "over" in verdicts(found).values() else 0


def announcements(plan, steps):
    training, patch = plan.settings.training, plan.settings.sampling.patch
    return [
        f"device     {_device_name(plan.device)}, {torch.get_num_threads()} CPU threads, "
        f"{plan.precision}",
        f"data       {len(plan.split.train)} training cases of {plan.settings.data.root}, at "
        f"most {plan.cache_bytes / costs.MB:.1f} MB kept",
        f"training   {costs.WARM_UP} + {steps} steps of batch {training.train_batch_size} x "
        f"{training.accumulate}, patch {patch}, workers: {training.workers}",
        *plan.notes,
    ]


def measure(plan, steps):
    """({name: Measured}, details of `measure_training`) of all that is measured."""
    patches = planning.make_patches(plan)
    with console.status("cache fill"):
        found = costs.measure_fill(plan, patches)
    with console.status("epoch pass"):
        found |= costs.measure_pass(plan, patches)
    # Before training, which leaves more behind that would hide what inference takes.
    with console.status("inference"):
        found |= costs.measure_inference(plan)
    with console.status("training"):
        figures, details = costs.measure_training(plan, patches, steps)
    with console.status("folds"):
        found |= figures | costs.measure_folds(plan)
    return found, details


def cli(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--benchmark", required=True, metavar="CONFIG", help="the YAML file of the run to come")
    add("--steps", type=int, default=STEPS, metavar="N", help=f"to measure; default {STEPS}")
    add("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    add("overrides", nargs="*", metavar="group.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps: expected 1 or more, got {arguments.steps}")
    try:
        settings = config.load(arguments.benchmark, arguments.overrides)
    except config.ConfigError as error:
        parser.exit(2, f"{error}\n")
    return main(settings, steps=arguments.steps, out=arguments.out)


if __name__ == "__main__":
    sys.exit(cli())
