"""A training step of configs/exp001_full.yaml on a GPU: time, memory, load, and who waits for data.

    python benchmarks/gpu.py                         # on the first GPU; prints markdown tables
    python benchmarks/gpu.py --batches 1 2 --steps 120
    python benchmarks/gpu.py --device cpu --small    # a tiny network anywhere; nothing is judged

Makes a few scroll phantoms of 320 x 320 x 320 in a temporary folder and trains on them as train.py
does, with the config's own network, losses, augmentation and workers. Times are medians of the
steps after a warm-up. "Without data" is the same step on one batch that lies on the device. The
last table sets the plain training steps of other packages beside it, with the same network, which
has an output for the background too, and without data: MONAI's (in requirements-bench.txt) and
nnU-Net's (`pip install nnunetv2`); the row of one that is not installed says so. The load is what
the driver tells through nvidia-ml-py, or through nvidia-smi where that is not installed.

Exit status 1 if a bar is missed, 2 without a GPU, else 0. Leaves nothing on disk.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plain_steps
import training_step

from runtime import build as planning
from runtime import config, sliding_window
from runtime import folder as runs
from runtime.device_memory import out_of_memory
from runtime.outputs import Outputs
from volumes import casefile, phantoms
from volumes.processes import cores

FULL_RUN = Path(__file__).resolve().parents[1] / "configs" / "exp001_full.yaml"
SIDE, SMALL_SIDE = 320, 40
SMALL = (
    *("model.base=4", "model.multipliers=[1,2]", "model.blocks=1", "model.checkpointing=false"),
    *("sampling.patch=[16,32,32]", "training.workers=1", "run.threads=1"),
)
BASE_TERMS = ("weighted_bce", "soft_dice")
WARM_UP = 8  # steps; the first ones choose convolutions and start the workers
LOAD_EVERY = 0.2  # seconds

# What is judged: (name, bar, whether the figure may be at most or must be at least the bar).
BARS = {
    "data wait": (0.05, "at most"),
    "GPU load": (0.90, "at least"),
    "step / step without data": (1.10, "at most"),
}


# ---------------------------------------------------------------------------- data


def make_root(folder, side, count):
    """A data set of scroll phantoms, for train.py's settings."""
    ids = [f"scroll_{number:03d}" for number in range(count)]
    for number, case_id in enumerate(ids):
        made = phantoms.scroll((side,) * 3, 0, number)
        casefile.write_case(
            folder / f"{case_id}.h5",
            made.image[None],
            made.label,
            spacing=made.spacing,
            unit=made.unit,
            affine=None,
            group=case_id,
            ignore_label=made.ignore_label,
            skeleton=False,  # which the config asks for in no term
        )
    about = {"ignore_label": made.ignore_label, "unit": made.unit, "case_ids": ids}
    casefile.write_dataset(folder, classes={"background": 0, "sheet": 1}, **about)


def settle(arguments, root, batch):
    changes = [f"data.root={root}", "data.folds=0", f"run.device={arguments.device}"]
    changes += [f"training.train_batch_size={batch}", *(SMALL if arguments.small else ())]
    return planning.resolve(config.load(FULL_RUN, changes))


# ---------------------------------------------------------------------------- load of the GPU


def load_reader(device):
    """A function that tells the load of a GPU, 0 to 1; None where nothing tells it."""
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("pynvml") is None:
        return _smi_reader(device)
    import pynvml

    try:
        torch.cuda.utilization(device)
    except (pynvml.NVMLError, RuntimeError):  # part of a GPU, or a driver that cannot be asked
        return None
    return lambda: torch.cuda.utilization(device) / 100


def _smi_reader(device):
    # By its own name: numbers of nvidia-smi know nothing of CUDA_VISIBLE_DEVICES.
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={name}", "--query-gpu=utilization.gpu"]
    command.append("--format=csv,noheader,nounits")

    def read():
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout) / 100

    try:
        read()
    except (OSError, subprocess.CalledProcessError, ValueError):  # not there, or it says "[N/A]"
        return None
    return read


# ---------------------------------------------------------------------------- our step


def measure(plan, steps, read_load):
    """(parts of a step with data, the same without, {figure: value}) of the full training step."""
    numbers = range(WARM_UP + steps)
    patches, load = planning.make_patches(plan), None
    with contextlib.closing(training_step.batches(plan, patches, len(numbers) + 1)) as source:
        with training_step.PeakMemory(plan.device) as peak:
            trainer = training_step.Trainer(plan)
            step = functools.partial(trainer.step, training_step.from_loader(plan, source))
            training_step.run_steps(step, numbers[:WARM_UP], plan.device)
            if read_load is None:
                real = training_step.run_steps(step, numbers[WARM_UP:], plan.device)
            else:
                with training_step.Sampler(read_load, LOAD_EVERY) as sampler:
                    real = training_step.run_steps(step, numbers[WARM_UP:], plan.device)
                load = statistics.fmean(sampler.values[1:-1] or sampler.values)
    drawn = planning.augment_batch(plan, [patches[0, i] for i in range(batch_of(plan))])
    synthetic = time_of(trainer, drawn, steps)
    parts = training_step.medians(real)
    figures = {
        "step": parts["step"],
        "voxels": voxels(plan) / parts["step"],
        "memory": peak.ram if peak.gpu is None else peak.gpu,
        "GPU load": load,
        "data wait": training_step.wait_share(real),
        "step / step without data": parts["step"] / synthetic["step"],
    }
    return parts, synthetic, figures


def time_of(trainer, drawn, steps):
    """{part: median seconds} of the step on one batch that is already drawn."""
    step = functools.partial(trainer.step, lambda ticks: drawn)
    return training_step.medians(
        training_step.run_steps(step, range(WARM_UP + steps), trainer.plan.device)[WARM_UP:]
    )


def batch_of(plan):
    return plan.settings.training.train_batch_size


def voxels(plan):
    """Of a batch."""
    return batch_of(plan) * math.prod(plan.settings.sampling.patch)


# ---------------------------------------------------------------------------- beside others


def contenders(plan, drawn, steps):
    """(name, (step seconds, peak bytes) or None) of our step and the others', all without data."""
    for name, terms in (
        ("Lamina, all terms of the config", None),
        ("Lamina, BCE + Dice", {term: plan.terms[term] for term in BASE_TERMS}),
    ):
        with training_step.PeakMemory(plan.device) as peak:
            took = time_of(training_step.Trainer(plan, terms), drawn, steps)["step"]
        yield name, (took, peak)
    for name, build in plain_steps.BUILDERS.items():
        with training_step.PeakMemory(plan.device) as peak:
            took = time_of_plain(plan, build, drawn, steps)
        yield name, None if took is None else (took, peak)


def time_of_plain(plan, build, drawn, steps):
    """Median seconds of a step of another package; None if it is not installed."""
    two_channels = Outputs({"foreground": (1,)}, exclusive=True)
    network = planning.make_network(dataclasses.replace(plan, outputs=two_channels))
    step = build(network, plan.device)
    if step is None:
        return None
    image, target, *_ = drawn
    with torch.no_grad(), plan.autocast():
        shapes = [out.shape[2:] for out in network(image)]
    targets = [F.interpolate(target.float(), size=shape) for shape in shapes]
    taken = training_step.run_steps(
        lambda number, ticks: step(image, targets, ticks), range(WARM_UP + steps), plan.device
    )
    return training_step.medians(taken[WARM_UP:])["step"]


# ---------------------------------------------------------------------------- report


def show(title, head, rows):
    """Print a markdown table row by row, and return its rows."""
    print(f"## {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    shown = []
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
        shown.append(row)
    print()
    return shown


def judged_rows(batch, figures, judge):
    """Rows (batch, what, measured, bar, verdict) of what was measured at one batch size."""
    yield (batch, "step", f"{1e3 * figures['step']:.1f} ms", "", "")
    yield (batch, "throughput", f"{figures['voxels'] / 1e6:.2f} million voxels/s", "", "")
    yield (batch, "peak memory", f"{figures['memory'] / 1e9:.2f} GB", "", "")
    for name, (bar, way) in BARS.items():
        value, plain = figures[name], name.startswith("step")
        text = "not measured" if value is None else f"{value:.3f}" if plain else f"{value:.1%}"
        limit = f"{way} {bar:.2f}" if plain else f"{way} {bar:.0%}"
        yield (batch, name, text, limit, verdict(value, bar, way) if judge else "not judged")


def verdict(value, bar, way):
    """ "ok" or "MISSED"; a figure that could not be measured is missed too."""
    if value is None:
        return "MISSED"
    return "ok" if (value <= bar if way == "at most" else value >= bar) else "MISSED"


def split_rows(batch, real, synthetic):
    """Rows (batch, part, ms, share of the step, ms without data)."""
    for part, seconds in real.items():
        share = "" if part == "step" else f"{seconds / real['step']:.1%}"
        without = f"{1e3 * synthetic[part]:.1f}" if part in synthetic else ""
        yield (batch, part, f"{1e3 * seconds:.1f}", share, without)


def beside_rows(batch, plan, measured):
    """Rows (batch, whose, step, throughput, peak memory, times the first row's step)."""
    first = None
    for name, found in measured:
        if found is None:
            yield (batch, name, "not installed", "", "", "")
            continue
        seconds, peak = found
        first = first or seconds
        memory = f"{(peak.ram if peak.gpu is None else peak.gpu) / 1e9:.2f} GB"
        speed = f"{voxels(plan) / seconds / 1e6:.2f}"
        yield (batch, name, f"{1e3 * seconds:.1f} ms", speed, memory, f"{seconds / first:.2f}")


def show_machine(arguments):
    gpu = arguments.device.type == "cuda"
    name = torch.cuda.get_device_name(arguments.device) if gpu else platform.processor() or "CPU"
    print(f"device: {name}, {cores()} CPU cores")
    versions = dict(runs.versions())
    for package in ("monai", "nnunetv2"):
        versions[package] = "not installed"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    print("versions: " + ", ".join(f"{key} {value}" for key, value in versions.items()))
    print(f"command: {shlex.join(['python', *sys.argv])}\n", flush=True)


def main(argv=None):
    arguments = parse(argv)
    judge = arguments.device.type == "cuda" and not arguments.small
    show_machine(arguments)
    with tempfile.TemporaryDirectory() as root:
        make_root(Path(root), SMALL_SIDE if arguments.small else SIDE, arguments.cases)
        found = {batch: run(arguments, root, batch, judge) for batch in arguments.batches}
    if not judge:
        print("a small network, or no GPU: no bar was judged")
        return 0
    missed = [batch for batch, holds in found.items() if not holds]
    print(f"a bar is MISSED at batch {missed}" if missed else "every bar holds")
    return 1 if missed else 0


def run(arguments, root, batch, judge):
    """Print the tables of one batch size; whether every bar holds."""
    plan, size = settle(arguments, root, batch), str(batch)
    torch.set_num_threads(plan.settings.run.threads or cores())
    try:
        real, synthetic, figures = measure(plan, arguments.steps, load_reader(plan.device))
        head = ("batch", "what", "measured", "bar", "verdict")
        rows = show("Training step with its data", head, judged_rows(size, figures, judge))
        head = ("batch", "part", "ms", "share", "ms without data")
        show("Where the time goes", head, split_rows(size, real, synthetic))
        drawn = planning.augment_batch(
            plan, [planning.make_patches(plan)[0, i] for i in range(batch)]
        )
        measured = contenders(plan, drawn, arguments.steps)
        head = ("batch", "step of", "time", "million voxels/s", "peak memory", "times ours")
        show("Beside plain steps, without data", head, beside_rows(size, plan, measured))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"\nbatch {batch}: out of memory\n")
        return False
    return all(row[-1] != "MISSED" for row in rows)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, or cpu with --small")
    add("--small", action="store_true", help="a tiny network and phantom; no bar is judged")
    add("--batches", type=int, nargs="+", default=[2, 4], metavar="N")
    add("--steps", type=int, default=60, metavar="N", help="measured of each kind; default 60")
    add("--cases", type=int, default=4, metavar="N", help="phantoms to train on; default 4")
    arguments = parser.parse_args(argv)
    if min(*arguments.batches, arguments.steps, arguments.cases) < 1:
        parser.error("--batches, --steps, --cases: expected numbers of 1 or more")
    if arguments.device == "cpu" and not arguments.small:
        parser.error("--device cpu: expected --small with it, got the full network")
    try:
        arguments.device, _ = sliding_window.resolve_device(arguments.device)
    except ValueError:
        parser.exit(2, "a GPU is needed, got none; --device cpu --small runs a tiny version\n")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
