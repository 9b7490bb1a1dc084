"""Distance transforms: time and error of each backend, and four processes that call scipy at once.

    python benchmarks/distance.py
    python benchmarks/distance.py --threads 1

The first table is of one mask of 72 x 136 x 136 voxels of each kind, medians of seven rounds in
which all backends take a turn; error is the largest difference from scipy's distances. The second
says how much memory one process and four together took above what they had before, and how many
were ever inside the transform at one time. Needs psutil: requirements-bench.txt.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from topology.distance import edt, truncated_edt
from volumes import phantoms

SHAPE = (72, 136, 136)
BIG = (96, 256, 256)
TOLERANCE = 2.0
ROUNDS = 7


def masks():
    for kind in ("scroll", "vessels"):
        yield f"{kind} phantom", torch.from_numpy(phantoms.PHANTOMS[kind](SHAPE, 0, 0).label == 1)
    corner = torch.zeros(SHAPE, dtype=torch.bool)
    corner[0, 0, 0] = True
    yield "one corner voxel", corner


def compare(mask):
    """{name: (median seconds, largest error)} on one mask."""
    truth = torch.from_numpy(ndimage.distance_transform_edt(~mask.numpy()))
    ways = {
        "scipy": lambda: edt(mask, backend="scipy"),
        "native": lambda: edt(mask),
        "downsampled": lambda: edt(mask, backend="downsampled"),
        f"truncated at {TOLERANCE:g}": lambda: truncated_edt(mask, TOLERANCE),
    }
    seconds, errors = {name: [] for name in ways}, {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            found = way()
            seconds[name].append(time.perf_counter() - started)
            limit = TOLERANCE if name.startswith("truncated") else float("inf")
            errors[name] = float((found - truth.clamp(max=limit)).abs().max())
    return {name: (statistics.median(seconds[name]), errors[name]) for name in ways}


def call_scipy(ready, inside, most, rounds):
    """What each process does: `inside` counts those within scipy's function."""
    torch.set_num_threads(1)
    transform = ndimage.distance_transform_edt

    def counted(*arguments, **options):
        with inside.get_lock():
            inside.value += 1
            most.value = max(most.value, inside.value)
        try:
            return transform(*arguments, **options)
        finally:
            with inside.get_lock():
                inside.value -= 1

    ndimage.distance_transform_edt = counted
    mask = torch.from_numpy(np.random.default_rng(0).random(BIG) > 0.999)
    ready.wait()
    ready.wait()
    for _ in range(rounds):
        edt(mask, backend="scipy")


def memory_of(count, rounds):
    """(MB above the start that `count` processes took together, most that were inside at once)."""
    context = multiprocessing.get_context("spawn")
    ready, inside, most = context.Barrier(count + 1), context.Value("i", 0), context.Value("i", 0)
    processes = [
        context.Process(target=call_scipy, args=(ready, inside, most, rounds)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    ready.wait()
    tree = [psutil.Process(process.pid) for process in processes]
    before = sum(process.memory_info().rss for process in tree)
    ready.wait()
    peak = before
    while any(process.is_alive() for process in processes):
        peak = max(peak, sum(p.memory_info().rss for p in tree if p.is_running()))
        time.sleep(0.002)
    return (peak - before) / 2**20, most.value


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {'x'.join(map(str, SHAPE))}\n")
    print(f"{'mask':18s}{'backend':16s}{'ms':>8s}{'error':>10s}")
    for kind, mask in masks():
        for name, (seconds, error) in compare(mask).items():
            print(f"{kind:18s}{name:16s}{1000 * seconds:8.1f}{error:10.6f}")
    print(f"\nscipy backend, {'x'.join(map(str, BIG))}")
    for count in (1, 4):
        taken, together = memory_of(count, rounds=3)
        print(f"{count} process(es): {taken:6.0f} MB above the start, at most {together} inside")


if __name__ == "__main__":
    main()
