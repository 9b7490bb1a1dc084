"""Our batches beside those of a plain torch DataLoader: speed, and what a killed worker does.

    python benchmarks/workers.py                      # 25 minutes on 2 cores
    python benchmarks/workers.py --kills 4 --rounds 1

The same patches of 72 x 136 x 136, turned and zoomed, from phantoms of 160 x 160 x 160, in batches
of two, through two spawned workers that read four batches ahead each.

speed: seconds of a batch that is waited for, of one that is ready (the time that a training thread
loses), and from the start to the first batch; both in turns, medians.
kills: workers are killed with SIGKILL at random moments, also while they start, until none is left,
while a loop takes a batch every 30 ms. What may happen: the loop gets all its batches, each as one
process would read it ("goes on"), or others ("differs"); the loader raises where a batch is asked
for ("raises"), or in the middle of what the loop does with a batch ("raises in mid-step": an
optimizer may have changed half of the weights); or nothing comes for 2 minutes ("hangs").
shm: the same where /dev/shm has 4 MB, as in some containers; only root can try.

Exit status 1 if our batches do not go on each time, or are slower when ready, else 0.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from patches.cache import VolumeCache
from patches.feed import PatchPlan
from settings import Augment
from volumes import casefile

ROOT = Path(__file__).resolve().parents[1]
PATCH = (72, 136, 136)
WORKERS, PREFETCH, BATCH = 2, 4, 2
WARM, TIMED = 20, 60
LOOP = 120  # batches of a loop in which workers are killed
STEP = 0.03
PATIENCE = 120.0
GOES_ON, DIFFERS, RAISES = "goes on", "differs", "raises"
IN_STEP, HANGS = "raises in mid-step", "hangs"
KINDS = ("ours", "DataLoader")
NAMES = ("image", "label")


def patches(folder):
    stored = list(casefile.read_dataset(folder).cases.values())
    return data.PatchDataset(
        stored,
        cache=VolumeCache(stored, 10**9),
        patch=PATCH,
        spacing=(0, 0, 0),
        foreground={1: 1.0},
        foreground_share=0.5,
        jitter=0.5,
        clip=(0.5, 99.5),
        seed=0,
        augment=Augment(rotation=1.0, scaling=1.0).model_dump(),
    )


class Sampler:
    """The batch sampler of the plain DataLoader."""

    def __init__(self, count):
        self.count, self.plan = count, PatchPlan(batches_per_epoch=count, batch_size=BATCH)

    def __len__(self):
        return self.count

    def __iter__(self):
        return map(self.plan.sample_indices, range(self.count))


@contextlib.contextmanager
def batches(kind, dataset, count, workers=WORKERS):
    if kind == "ours":
        how = {"batches_per_epoch": count, "batch_size": BATCH}
        source = data.Batches(dataset, 0, count, workers=workers, prefetch=PREFETCH, **how)
        with contextlib.closing(source):
            yield source
        return
    source = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=Sampler(count),
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context="spawn",
    )
    iterator = iter(source)
    yield iterator
    # Or they are aborted when this process ends. One that aborts here is raised here.
    with contextlib.suppress(RuntimeError):
        iterator._shutdown_workers()


# ---------------------------------------------------------------------------- speed


def speed(kind, dataset):
    """Seconds to the first batch, of a batch that is waited for, of one that is ready."""
    started = time.perf_counter()
    with batches(kind, dataset, WARM + 2 * TIMED) as source:
        next(source)
        first = time.perf_counter() - started
        for _ in range(WARM - 1):
            next(source)
        started = time.perf_counter()
        for _ in range(TIMED):
            next(source)
        waited, ready = (time.perf_counter() - started) / TIMED, []
        for _ in range(TIMED // 2):
            time.sleep(0.1)
            started = time.perf_counter()
            next(source)
            ready.append(time.perf_counter() - started)
    return first, waited, statistics.median(ready)


# ---------------------------------------------------------------------------- kills


def digest(samples):
    """A number that differs where any voxel does."""
    return zlib.crc32(b"".join(s[name].numpy().tobytes() for s in samples for name in NAMES))


def loop(kind, folder, workers):
    """Take all batches, a short step after each; prints each one's digest, and how it ended."""
    with batches(kind, patches(folder), LOOP, workers) as source:
        for number in range(LOOP):
            try:
                samples = next(source)
            except Exception as error:
                print(RAISES, type(error).__name__, flush=True)
                os._exit(1)
            try:
                print(number, digest(samples), flush=True)
                step_end = time.perf_counter() + STEP
                while time.perf_counter() < step_end:
                    pass
            except Exception as error:
                print(IN_STEP, type(error).__name__, flush=True)
                os._exit(1)
    print(GOES_ON, flush=True)
    os._exit(0)


def outcome(process, kills, chance, expected):
    """(how a loop ended, kills): up to `kills` times one of its workers is killed."""
    os.set_blocking(process.stdout.fileno(), False)
    output, heard, killed, kill_at = "", time.monotonic(), 0, chance.randrange(30)
    while time.monotonic() - heard < PATIENCE:
        ended = process.poll() is not None
        text = process.stdout.read()  # None: nothing now
        if text:
            output, heard = output + text.decode(), time.monotonic()
        for ending in (IN_STEP, RAISES):
            if ending in output:
                return ending, killed
        if GOES_ON in output:
            *lines, _ = output.splitlines()
            return GOES_ON if lines == expected else DIFFERS, killed
        if ended:
            return f"dies ({process.returncode})", killed
        if killed < kills and output.count("\n") >= kill_at:
            time.sleep(chance.uniform(0, 0.2))
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children()
                workers = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
                if workers:
                    chance.choice(workers).send_signal(signal.SIGKILL)
                    killed, kill_at = killed + 1, output.count("\n") + chance.randrange(20)
        time.sleep(0.002)
    return HANGS, killed


def start(kind, folder, workers, small_shm=False):
    command = [sys.executable, __file__, "--loop", kind, "--data", folder, "--workers", workers]
    if small_shm:
        shell = 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", shell, "sh", *command]
    command = [str(word) for word in command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def end_tree(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.communicate()


def endings(kind, options, workers, kills, expected, small_shm=False):
    """{ending: loops} of loops in which `kills` workers are killed in all; 0: of one loop."""
    counts, killed, chance = collections.Counter(), 0, random.Random(workers)
    while killed < kills or not counts:
        process = start(kind, options.data, workers, small_shm)
        ending, more = outcome(process, min(workers, kills - killed), chance, expected)
        end_tree(process)
        counts[ending], killed = counts[ending] + 1, killed + more
    return dict(counts), killed


def may_mount():
    trial = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=4m tmpfs /dev/shm"]
    with contextlib.suppress(OSError):
        return subprocess.run(trial, capture_output=True).returncode == 0
    return False


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        return loop(options.loop, options.data, options.workers)
    with tempfile.TemporaryDirectory() as name:
        options.data = Path(name) / "data"
        made = ["--phantom", "scroll", "--cases", "3", "--shape", "160", "160", "160"]
        script = [sys.executable, str(ROOT / "prepare.py"), *made, "--out", str(options.data)]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        return compare(options)


def compare(options):
    dataset, figures = patches(options.data), {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:
            figures[kind].append(speed(kind, dataset))
    ready = {}
    for kind, rows in figures.items():
        first, waited, ready[kind] = (statistics.median(row) for row in zip(*rows, strict=True))
        print(
            f"{kind:12} first batch {first:.1f} s, one that is waited for {1e3 * waited:.1f} ms "
            f"({1 / waited:.0f} a second), one that is ready {1e3 * ready[kind]:.2f} ms",
            flush=True,
        )
    with batches("ours", dataset, LOOP, workers=0) as source:
        expected, size = [], 0
        for number, samples in enumerate(source):
            expected.append(f"{number} {digest(samples)}")
            size += sum(s[name].nbytes for s in samples for name in NAMES)
    print(f"batches of {size / LOOP / 1e6:.1f} MB on average", flush=True)
    trials = [("ours", n, options.kills) for n in (1, 2, 4)] + [("DataLoader", 2, 6)]
    failures = 0
    for shm in [False, True] if may_mount() else [False]:
        for kind, workers, kills in trials:
            kills = min(kills, options.kills) if kind == "ours" or not shm else 0
            counts, killed = endings(kind, options, workers, kills, expected, shm)
            failures += kind == "ours" and counts.keys() != {GOES_ON}
            where = ", 4 MB of /dev/shm" if shm else ""
            print(
                f"{kind:12} {workers} workers{where}: {killed} kills, loops: {counts}", flush=True
            )
    return int(failures > 0 or ready["ours"] > ready["DataLoader"])


if __name__ == "__main__":
    sys.exit(main())
