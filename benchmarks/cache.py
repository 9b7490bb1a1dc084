"""Memory and time of patches that come from a store larger than the cache.

    python benchmarks/cache.py                       # 70 cases, 4 GB of disk, some 10 minutes
    python benchmarks/cache.py --keep                # leaves the store for the next time
    python benchmarks/cache.py --compression none    # stored plain: nothing for the cache to hold
    python benchmarks/cache.py --cases 10 --side 144 --batches 300 --budget-gb 0.0185

Makes a store of scroll phantoms, image and label of 358 x 358 x 358 uint8 each, and streams batches
of two patches of 72 x 136 x 136, rotated and scaled, through four spawned workers: with a budget of
0, which is the base, and with --budget-gb. Memory is the proportional set size of the whole tree of
processes, the mean of ten looks in every 100 batches: boxes differ in size, and with them what is
on its way. An epoch pass is the time of as many patches as there are cases, in batches after those,
in which nobody looks. A fill reads every case once with a budget that holds all of them, 6.4 GB of
memory, after the system has dropped their pages (cold) and again (warm). The last rows replay the
order in which the cases were sampled, for two rules of what to hold.

The pages of programs and libraries are shared with whatever else runs Python: that moves the memory
of the tree by tens of MB when such a process starts or ends, so that its spread is judged without
them.

Exit status 1 if a bar is missed, 2 if the disk or the folder will not do, else 0. Leaves nothing
but what it writes to the folder, and that only with --keep. Needs psutil, and Linux.
"""

import argparse
import collections
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from monitoring import machine
from patches.cache import VolumeCache
from settings import Augment
from volumes import casefile, phantoms

PATCH = (72, 136, 136)
BATCH = 2
WORKERS = 4
PREFETCH = 2
WINDOW = 100  # batches
LOOK = 10  # batches from one look at memory to the next: more than are on their way
WARM, TIMED = 20, 300  # batches after those, in which nobody looks
FILLED = 2  # windows until every case was sampled
BASE_WINDOWS = 4
SPARE = 2**30  # bytes of disk that stay free
MB, GB = 10**6, 10**9
MOST_SPREAD = 50 * MB
MOST_FILL = 30.0  # seconds
MOST_PASS = 5.0


class Row(NamedTuple):
    """One line of the table; verdict is "ok", "MISSED", or empty where nothing is judged."""

    what: str
    found: str
    bar: str = ""
    verdict: str = ""


# ---------------------------------------------------------------------------- the store


def is_made(folder, count, side):
    """Whether the folder holds the store. ValueError if it holds another, or the disk is full."""
    if (folder / casefile.DATASET_FILE).exists():
        stored = casefile.read_dataset(folder).cases
        whole = list(stored) == [name_of(number) for number in range(count)]
        if whole and all(case.shape == (side,) * 3 for case in stored.values()):
            return True
        raise ValueError(
            f"{folder}: expected no data set, or one that this benchmark made of {count} cases of "
            f"side {side}, got another; choose another --folder"
        )
    needed, free = 2 * count * side**3 + SPARE, shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: expected {needed / GB:.1f} GB of free disk, got {free / GB:.1f} GB; choose "
            "another --folder, or fewer --cases"
        )
    return False


def make_store(folder, count, side, compression):
    phantom = phantoms.scroll((side,) * 3)
    settings = {"spacing": phantom.spacing, "unit": phantom.unit, "affine": None}
    for number in range(count):
        image, label = variation(phantom, number)
        casefile.write_case(
            folder / f"{name_of(number)}.h5",
            image[None],
            label,
            group=name_of(number),
            ignore_label=phantom.ignore_label,
            skeleton=False,
            compression=compression,
            **settings,
        )
    casefile.write_dataset(
        folder,
        classes={"background": 0, "sheet": 1},
        ignore_label=phantom.ignore_label,
        unit=phantom.unit,
        case_ids=[name_of(number) for number in range(count)],
    )


def name_of(number):
    return f"variation{number:03d}"


def variation(phantom, number):
    """(image, label) of a phantom, mirrored and with other noise: a case of its own at no cost."""
    axes = [axis for axis in range(3) if number >> axis & 1]
    noise = np.random.default_rng(number).integers(0, 6, phantom.image.shape, dtype=np.uint8)
    return np.flip(np.minimum(phantom.image, 249), axes) + noise, np.flip(phantom.label, axes)


def remove_store(folder, count):
    for name in [casefile.DATASET_FILE, *(f"{name_of(number)}.h5" for number in range(count))]:
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


# ---------------------------------------------------------------------------- measuring


def in_a_fresh_process(what, options, **changes):
    """What the function `what` finds, in a process where nothing ran before."""
    given = {**vars(options), **changes}
    command = [sys.executable, __file__, "--measure", what]
    for name in ("folder", "cases", "side", "batches", "budget_gb"):
        command += [f"--{name.replace('_', '-')}", str(given[name])]
    # Of four workers on fewer cores, which is meant.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:This DataLoader will create"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def patches_of(stored, budget):
    """(dataset, cache) of the patches that are streamed."""
    cache = VolumeCache(stored, budget)
    settings = Augment(rotation=1.0, scaling=1.0).model_dump()
    dataset = data.PatchDataset(
        stored,
        cache=cache,
        patch=PATCH,
        spacing=(0, 0, 0),
        foreground={1: 1.0},
        foreground_share=0.5,
        jitter=0.5,
        clip=(0.5, 99.5),
        seed=0,
        augment=settings,
    )
    return dataset, cache


def stream(options):
    """Batches through the workers: memory, times, counts and the order of the cases."""
    torch.set_num_threads(1)
    stored = list(casefile.read_dataset(options.folder).cases.values())
    dataset, cache = patches_of(stored, int(options.budget_gb * GB))
    plan = {"batches_per_epoch": max(1, len(stored) // BATCH), "batch_size": BATCH}
    run = {"workers": WORKERS, "prefetch": PREFETCH, "persistent": True, "pin": False}
    batches = data.Batches(dataset, 0, options.batches + WARM + TIMED, **plan, **run)

    folder = str(options.folder.resolve())
    order, looks, seconds, held = [], [], {}, -1
    started = time.perf_counter()
    for number, samples in enumerate(batches, 1):
        order += [sample["case"] for sample in samples]
        del samples
        now = time.perf_counter() - started
        seconds.setdefault("first batch", now)
        if number <= options.batches and cache.counts()["cases"] > held:
            held, seconds["last case held"] = cache.counts()["cases"], now
        if number <= options.batches and number % LOOK == 0:
            sizes = tree_memory()
            looks.append((sum(sizes.values()), sum(own_memory(pid, folder) for pid in sizes)))
        # What the workers had made ready while somebody looked is used up by then.
        if number == options.batches + WARM:
            timed_from = time.perf_counter()
    return {
        "tree": means([look[0] for look in looks]),
        "own": means([look[1] for look in looks]),
        "pass": (time.perf_counter() - timed_from) / TIMED * len(stored) / BATCH,
        "seconds": seconds,
        "counts": cache.counts(),
        "order": order,
    }


def tree_memory():
    """{pid: proportional set size} of this process and all that descend from it."""
    this = psutil.Process()
    return {p.pid: p.memory_full_info().pss for p in (this, *this.children(recursive=True))}


def own_memory(pid, folder):
    """Proportional set size of a process without the pages of programs and libraries.

    Those are shared with processes outside the tree too, and count for less when one starts.
    """
    total, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the head of a map: addresses, permissions, ..., file
            file = words[5] if len(words) > 5 else ""
            counts = not file.startswith("/") or file.startswith((folder, "/dev/shm/", "/memfd:"))
        elif words[0] == "Pss:" and counts:
            total += 1024 * int(words[1])
    return total


def means(looks):
    """The mean of each window of batches."""
    return np.reshape(looks, (-1, WINDOW // LOOK)).mean(axis=1).tolist()


def fill(options):
    """{"cold": seconds, "warm": seconds} to read all cases once, with room for all of them."""
    stored = list(casefile.read_dataset(options.folder).cases.values())
    drop_pages(stored)
    seconds = {}
    for name in ("cold", "warm"):
        cache, started = VolumeCache(stored, 2**62), time.perf_counter()
        for case in stored:
            cache.read(case, tuple(slice(0, 1) for _ in range(3)), ("image", "label"))
        seconds[name] = time.perf_counter() - started
    return seconds


def drop_pages(stored):
    """Have the system forget the pages of the case files, after they are on the disk."""
    for case in stored:
        with open(case.path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------------------- replay


def first_come_hits(order, room):
    """Share of samples whose case is held, if the first `room` cases stay for good."""
    held, hits = set(), 0
    for case in order:
        hits += case in held
        if len(held) < room:
            held.add(case)
    return hits / len(order)


def least_recent_hits(order, room):
    """The same if the case that was not used for longest makes room for a new one."""
    held, hits = collections.OrderedDict(), 0
    for case in order:
        hits += case in held
        held[case] = True
        held.move_to_end(case)
        if len(held) > room:
            held.popitem(last=False)
    return hits / len(order)


# ---------------------------------------------------------------------------- tables


def verdict(holds):
    return "ok" if holds else "MISSED"


def memory_rows(base, full, options):
    budget = options.budget_gb * GB
    lowest, highest = min(base["tree"]), max(base["tree"])
    yield Row(
        "base: budget 0, memory of the tree",
        f"{lowest / MB:.0f} to {highest / MB:.0f} MB over {WINDOW * len(base['tree'])} batches",
        "runs",
        verdict(len(base["tree"]) == BASE_WINDOWS),
    )
    most = max(full["tree"])
    yield Row(
        f"budget {options.budget_gb:g} GB, most memory of the tree",
        f"{most / MB:.0f} MB",
        f"<= {(highest + budget) / MB:.0f} MB: base + budget",
        verdict(most <= highest + budget),
    )
    for what, key in (("", "tree"), (", without libraries", "own")):
        windows = full[key][FILLED:]
        spread = max(windows) - min(windows)
        row = Row(
            f"spread over batches {WINDOW * FILLED} to {options.batches}{what}",
            f"{spread / MB:.0f} MB ({windows[0] / MB:.0f} first, {windows[-1] / MB:.0f} last)",
        )
        bar = (f"<= {MOST_SPREAD / MB:.0f} MB", verdict(spread <= MOST_SPREAD))
        yield row if key == "tree" else row._replace(bar=bar[0], verdict=bar[1])


def time_rows(base, full, filled, size):
    for name in ("cold", "warm"):
        yield Row(
            f"fill, all {size / GB:.1f} GB, {name}",
            f"{filled[name]:.1f} s ({size / GB / filled[name]:.1f} GB/s)",
            f"< {MOST_FILL:g} s",
            verdict(filled[name] < MOST_FILL),
        )
    for name, found in (("budget 0", base), ("budget given", full)):
        bar = (f"< {MOST_PASS:g} s", verdict(found["pass"] < MOST_PASS))
        yield Row(f"epoch pass, {name}", f"{found['pass']:.2f} s", *bar)
    for name, seconds in full["seconds"].items():
        yield Row(f"from the start of the workers to the {name}", f"{seconds:.1f} s")


def count_rows(full):
    counts = full["counts"]
    reads = counts["hits"] + counts["misses"]
    yield Row("cases held", f"{counts['cases']}, {counts['bytes'] / MB:.0f} MB")
    yield Row("hits", f"{counts['hits']} of {reads}: {100 * counts['hits'] / reads:.1f} %")
    yield Row("evictions", str(counts["evictions"]))
    for name, hits in (("first come stays", first_come_hits), ("LRU", least_recent_hits)):
        share = hits(full["order"], counts["cases"])
        yield Row(f"hits in a replay, {name}", f"{100 * share:.1f} %")


def measure_all(options):
    """Print the tables; exit status."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {machine.available()}; torch "
        f"{torch.__version__}, numpy {np.__version__}; {options.cases} cases of side "
        f"{options.side}, compression {options.compression}, {WORKERS} workers, batch {BATCH}, "
        f"{options.batches} batches\n",
        flush=True,
    )
    stored = casefile.read_dataset(options.folder).cases.values()
    size = sum(2 * math.prod(case.shape) for case in stored)  # image and label, uint8
    filled = in_a_fresh_process("fill", options)
    base = in_a_fresh_process("stream", options, budget_gb=0, batches=BASE_WINDOWS * WINDOW)
    full = in_a_fresh_process("stream", options)
    rows = [*memory_rows(base, full, options), *time_rows(base, full, filled, size)]
    rows += count_rows(full)
    print("| what | found | bar | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return int(any(row.verdict == "MISSED" for row in rows))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(tempfile.gettempdir()) / "lamina_cache_store"
    parser.add_argument("--folder", type=Path, default=default, help="where the store is made")
    parser.add_argument("--cases", type=int, default=70)
    parser.add_argument("--side", type=int, default=358, help="voxels of a case, along each axis")
    parser.add_argument("--batches", type=int, default=3000, help="a multiple of 100, 300 or more")
    parser.add_argument("--budget-gb", type=float, default=2.0)
    parser.add_argument("--compression", choices=("none", "lzf", "gzip"), default="lzf")
    parser.add_argument("--keep", action="store_true", help="leave the store")
    parser.add_argument("--measure", choices=sorted(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batches % WINDOW or options.batches <= WINDOW * FILLED:
        parser.error(f"--batches: expected a multiple of {WINDOW} above {WINDOW * FILLED}")
    return options


MEASURES = {"fill": fill, "stream": stream}


def main():
    options = parse()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options)))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        made = is_made(options.folder, options.cases, options.side)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if not made:
            compression = None if options.compression == "none" else options.compression
            make_store(options.folder, options.cases, options.side, compression)
        return measure_all(options)
    finally:
        if not options.keep:
            remove_store(options.folder, options.cases)


if __name__ == "__main__":
    sys.exit(main())
