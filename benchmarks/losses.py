"""The loss terms beside their peers: time, memory, leaks, and their share of a training step.

    python benchmarks/losses.py                  # 4 minutes on 2 cores; prints markdown tables
    python benchmarks/losses.py --repeats 21 --threads 8 --leak 0
    python benchmarks/losses.py --step           # and a training step, of a small network
    python benchmarks/losses.py --device cuda    # and a training step of configs/exp001_full.yaml

A time is that of forward and backward on one patch of 72 x 136 x 136 voxels in float32: smooth
random logits, and wavy sheets as target. Ours is measured with 40 % of the voxels unlabeled, which
the bars are about, and without a mask, as peers have none. In each round all take a turn, so that
what else the machine does meets them alike; the median of the rounds is told.

Exit status 1 if a bar is missed, else 0. The peers are in requirements-bench.txt; where they are
not installed their rows say so. Leaves nothing on disk.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contenders import (
    ALL,
    BOUNDARY,
    CLDICE,
    DICE,
    HAUSDORFF,
    NO_MASK,
    SCIPY,
    UNLABELED,
    make_patch,
    our_losses,
    peer_losses,
)

import model
from runtime import composite_loss, config, folder, sliding_window
from runtime.device_memory import out_of_memory

FULL_RUN = Path(__file__).resolve().parents[1] / "configs" / "exp001_full.yaml"
SMALL = (
    *("model.base=8", "model.multipliers=[1,2]", "model.blocks=1", "model.checkpointing=false"),
    "sampling.patch=[32,64,64]",
)
SHAPE = (72, 136, 136)

# Ours, the peer, how many times as long the peer must take at least. None: told, not judged.
COMPARISONS = (
    ("surface_distance", HAUSDORFF, 25.0),
    ("surface_distance", BOUNDARY, None),
    ("surface_distance", SCIPY, 6.0),
    ("cldice", CLDICE, 3.0),
    ("soft_dice", DICE, None),
    (ALL, HAUSDORFF, 1.0),
)
EQUAL = (("surface_distance" + NO_MASK, SCIPY), ("cldice" + NO_MASK, CLDICE), ("soft_dice", DICE))
MOST_MEMORY = 1 / 3  # of cldice, as a share of SoftclDiceLoss
MOST_GROWTH_MB = 20.0  # of the resident memory, from step 50 to the last of --leak
MOST_ADDED = 0.25  # by the other terms to a training step; beside a small network they weigh more
FIRST_STEPS = 50  # after which memory must stay
STEPS_AVERAGED = 16


class Row(NamedTuple):
    """One line of a table; verdict is "ok", "MISSED", or empty where nothing is judged."""

    what: str
    ours: str
    beside: str = ""
    theirs: str = ""
    ratio: str = ""
    bar: str = ""
    verdict: str = ""


# ---------------------------------------------------------------------------- time


def seconds_of(action, device):
    if device.type != "cuda":
        started = time.perf_counter()
        action()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    action()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000.0


def forward_and_backward(loss, logits):
    """The action to be measured; the leaf that takes the gradient is made beforehand."""
    leaf = logits.detach().clone().requires_grad_()
    return lambda: loss(leaf).backward()


def medians(functions, patch, device, repeats):
    """{name: seconds}, turn by turn; the round before the first is not counted."""
    seconds = {name: [] for name in functions}
    for number in range(-1, repeats):
        for name, loss in functions.items():
            took = seconds_of(forward_and_backward(loss, patch.logits), device)
            if number >= 0:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_rows(device, repeats):
    patch = make_patch(SHAPE, device)
    ours, peers = our_losses(patch), peer_losses(patch)
    took = medians({**ours, **peers}, patch, device, repeats)
    for name, peer, bar in COMPARISONS:
        for suffix in ("", NO_MASK):
            row = Row(name + suffix, milliseconds(took[name + suffix]), peer, "not installed")
            if peer in took:
                ratio = took[peer] / took[name + suffix]
                row = row._replace(theirs=milliseconds(took[peer]), ratio=f"{ratio:.1f}")
                if bar is not None and not suffix:
                    row = row._replace(bar=f">= {bar:g}", verdict=verdict(ratio >= bar))
            yield row
    yield from (Row(name, milliseconds(took[name])) for name in ours)
    for name, peer in EQUAL:
        if peer in peers:
            values = [f"{float(loss(patch.logits)):.6f}" for loss in (ours[name], peers[peer])]
            yield Row(f"{name}, its value", values[0], peer, values[1])


def milliseconds(seconds):
    return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"


# ---------------------------------------------------------------------------- memory


def in_a_fresh_process(what, arguments):
    """What `measure` finds, as a dict, in a process where nothing ran before."""
    command = [sys.executable, __file__, "--measure", what]
    for option in ("device", "threads", "leak"):
        command += [f"--{option}", str(getattr(arguments, option))]
    # The profiler of torch 2.13 writes two lines to stderr at every level below this.
    environment = {**os.environ, "KINETO_LOG_LEVEL": "99"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what, device, leak):
    if what == "leak":
        return growth(leak, device)
    small, patch = (make_patch(shape, device) for shape in ((16, 16, 16), SHAPE))
    functions = [{**our_losses(p), **peer_losses(p)}.get(what) for p in (small, patch)]
    if functions[0] is None:
        return {}
    forward_and_backward(functions[0], small.logits)()  # threads and libraries, once
    return peak_memory(forward_and_backward(functions[1], patch.logits), device)


def peak_memory(action, device):
    """{"tensors": bytes, "process": bytes} at the worst moment, above what is held before.

    process: resident memory by its high-water mark in /proc. That of getrusage would do only
    where no parent was larger, for a process inherits it. On a GPU tensors alone.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return {"tensors": torch.cuda.max_memory_allocated(device) - before}
    before = resident("VmRSS")
    action()
    return {"process": resident("VmHWM") - before, "tensors": peak_of_tensors(action)}


def peak_of_tensors(action):
    """Bytes of live tensors at the worst moment, from every allocation that torch makes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i) for i, e in enumerate(events) if e.name() == "[memory]")
    live = np.cumsum([events[i].nbytes() for _, i in changes])
    return int(live.max(initial=0))


def resident(key="VmRSS"):
    """Bytes of this process in memory now, or with VmHWM the most so far. Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def growth(steps, device):
    """{"early": bytes, "late": bytes} of resident memory, after FIRST_STEPS and after all steps."""
    patch = make_patch((32, 64, 64), device)
    loss, found = our_losses(patch)[ALL], {}
    for step in range(1, steps + 1):
        forward_and_backward(loss, patch.logits.roll(step, -1))()  # no two steps are the same
        if step in (FIRST_STEPS, steps):
            found["early" if step == FIRST_STEPS else "late"] = resident()
    return found


def memory_rows(arguments):
    ours, theirs = (in_a_fresh_process(name, arguments) for name in ("cldice", CLDICE))
    for kind in ours:
        row = Row(f"cldice, {kind}", megabytes(ours[kind]), CLDICE, "not installed")
        if theirs:
            share = ours[kind] / theirs[kind]
            row = row._replace(theirs=megabytes(theirs[kind]), ratio=f"{share:.2f}")
            holds = verdict(share <= MOST_MEMORY)
            row = row._replace(bar=f"<= {MOST_MEMORY:.2f}", verdict=holds)
        yield row


def leak_rows(arguments):
    found = in_a_fresh_process("leak", arguments)
    grown = (found["late"] - found["early"]) / 2**20
    yield Row(
        f"{ALL}, after {arguments.leak} steps",
        megabytes(found["late"]),
        f"after {FIRST_STEPS} steps",
        megabytes(found["early"]),
        f"{grown:+.1f} MB",
        f"within {MOST_GROWTH_MB:g} MB",
        verdict(abs(grown) <= MOST_GROWTH_MB),
    )


def megabytes(count):
    return f"{count / 2**20:.1f} MB"


# ---------------------------------------------------------------------------- training step


def step_rows(device):
    """BCE + Dice alone against the whole sum, at the settings of the full run."""
    on_gpu = device.type == "cuda"
    chosen = config.load(FULL_RUN, () if on_gpu else SMALL)
    for batch in (1, 2):
        row = Row(f"whole sum, batch {batch}", "out of memory")
        try:
            seconds, peaks = cost_of_steps(chosen, batch, device)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            yield row
            continue
        added = seconds["whole"] / seconds["base"] - 1.0
        times = (milliseconds(seconds["whole"]), "BCE + Dice alone", milliseconds(seconds["base"]))
        row = Row(row.what, *times, f"{100 * added:+.1f} %", f"<= {100 * MOST_ADDED:+g} %")
        yield row._replace(verdict=verdict(added <= MOST_ADDED) if on_gpu else "not judged")
        if on_gpu:
            whole, base = peaks["whole"], peaks["base"]
            yield Row(f"{row.what}, memory", megabytes(whole), row.beside, megabytes(base))


def cost_of_steps(chosen, batch, device):
    """({variant: mean seconds}, {variant: most bytes of GPU memory}) of a step, in turns."""
    whole = chosen.terms()
    variants = {"base": {n: whole[n] for n in ("weighted_bce", "soft_dice")}, "whole": whole}
    seconds, peaks = {name: [] for name in variants}, dict.fromkeys(variants, 0)
    step = training_step(chosen, batch, device)
    for terms in variants.values():  # a first time of every term
        step({name: {**term, "interval": 1} for name, term in terms.items()}, 0)
    for number in range(max(STEPS_AVERAGED, *(term["interval"] for term in whole.values()))):
        for name, terms in variants.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds[name].append(seconds_of(lambda t=terms, n=number: step(t, n), device))
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device))
    return {name: statistics.fmean(values) for name, values in seconds.items()}, peaks


def training_step(chosen, batch, device):
    """A function (terms, number of the step) that takes one step of train.py on made-up patches."""
    patch = chosen.sampling.patch
    strides = model.derive_strides(patch, (1, 1, 1), len(chosen.model.multipliers))
    kernels = model.derive_kernels(patch, (1, 1, 1), strides)
    plain = chosen.model.model_dump(exclude={"strides", "compile"})
    network = model.UNet3D(1, 1, strides=strides, kernels=kernels, **plain).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=chosen.optim.lr)
    made = [make_patch(patch, device, seed) for seed in range(batch)]
    _, target, valid, skeleton = (torch.cat(parts) for parts in zip(*made, strict=True))
    image = torch.randn(batch, 1, *patch, device=device)

    def step(terms, number):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outputs = network(image)
        total, _ = composite_loss.composite_loss(
            outputs, target, valid, terms, skeleton=skeleton, step=number
        )
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---------------------------------------------------------------------------- report


def verdict(holds):
    return "ok" if holds else "MISSED"


def show(title, rows):
    """Print a table, row by row; True unless a bar is missed in it."""
    head = " | ".join(Row._fields)
    print(f"## {title}\n\n| {head} |\n|{'---|' * len(Row._fields)}", flush=True)
    hold = True
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
        hold &= row.verdict != "MISSED"
    print()
    return hold


def show_machine(threads, device):
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    named = re.search(r"model name\s*: (.*)", text)
    cpu = named[1] if named else platform.processor()
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    versions = {**folder.versions(), "scipy": scipy.__version__, "monai": "not installed"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["monai"] = importlib.metadata.version("monai")
    print(f"device: {gpu}{cpu}, {os.cpu_count()} cores, {threads} threads")
    load = os.getloadavg()[0]
    if load + threads > os.cpu_count() + 0.5:  # two threads, one waiting for a core, lose it all
        print(f"load of other work: {load:.1f}; times are not to be trusted")
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"command: {shlex.join(['python', *sys.argv])}\n", flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:1")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--repeats", type=int, default=7, help="rounds of which the median is told")
    add("--leak", type=int, default=500, metavar="STEPS", help="of the leak test; 0: none")
    add("--step", action="store_true", help="time a training step on a CPU too")
    add("--measure", help=argparse.SUPPRESS)  # how the script calls itself
    arguments = parser.parse_args(argv)
    for name in ("threads", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(arguments, name)}")
    try:
        arguments.device, _ = sliding_window.resolve_device(arguments.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if 0 != arguments.leak <= FIRST_STEPS:
        parser.error(f"--leak: expected 0 or more than {FIRST_STEPS}, got {arguments.leak}")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, device, arguments.leak)))
        return 0
    show_machine(arguments.threads, device)
    shape, labeled = "×".join(map(str, SHAPE)), f"{100 - 100 * UNLABELED:g} % labeled"
    hold = show(
        f"Forward and backward, {shape}, {labeled} or no mask",
        time_rows(device, arguments.repeats),
    )
    hold &= show("Peak memory above the inputs", memory_rows(arguments))
    if arguments.leak:
        hold &= show("Resident memory over many steps", leak_rows(arguments))
    if device.type == "cuda" or arguments.step:
        of = (
            "configs/exp001_full.yaml"
            if device.type == "cuda"
            else f"a small network: {' '.join(SMALL)}"
        )
        hold &= show(f"Training step of {of}", step_rows(device))
    print("every bar measured holds" if hold else "a bar is MISSED")
    return 0 if hold else 1


if __name__ == "__main__":
    sys.exit(main())
