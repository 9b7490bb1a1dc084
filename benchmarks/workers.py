"""Worker processes beside those of torch's DataLoader: speed, and what a killed worker does.

    python benchmarks/workers.py                      # 10 minutes
    python benchmarks/workers.py --kills 5

The same patches of 72 x 136 x 136, turned and zoomed, from phantoms of 160 x 160 x 160, in batches
of two, through two spawned workers that read four batches ahead each.

speed: seconds of a batch that is waited for, of one that is ready (the time that a training thread
loses), and from the start to the first batch; both in turns, medians.
kills: one of the workers is killed with SIGKILL at a random moment while a loop takes a batch every
30 ms. What may happen: the loop gets all its batches ("goes on"), the loader raises where a batch
is asked for ("raises"), it raises in the middle of what the loop does with a batch ("raises in
mid-step": an optimiser may have changed half of the weights), or nothing comes for 30 seconds
("hangs").
shm: the same loop, undisturbed, where /dev/shm has 4 MB, as some containers do; root alone can try.

Exit status 1 if our workers do not go on each time, or are slower, else 0.
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
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import loader
from patches import augment
from patches.cache import VolumeCache
from settings import Augment
from volumes import casefile as cases

ROOT = Path(__file__).resolve().parents[1]
PATCH = (72, 136, 136)
WORKERS, PREFETCH, BATCH = 2, 4, 2
WARM, TIMED = 20, 60
ROUNDS = 3
LOOP = 120  # batches of a loop in which one worker is killed
STEP = 0.03
PATIENCE = 30.0
GOES_ON, RAISES, IN_STEP, HANGS = "goes on", "raises", "raises in mid-step", "hangs"
KINDS = ("ours", "DataLoader")


def patches(folder):
    stored = list(cases.read_dataset(folder).cases.values())
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
        **augment.functions(Augment(rotation=1.0, scaling=1.0).model_dump()),
    )


class Plan:
    """The batch sampler of the DataLoader."""

    def __init__(self, count):
        self.count, self.plan = count, loader.PatchPlan(batches_per_epoch=count, batch_size=BATCH)

    def __len__(self):
        return self.count

    def __iter__(self):
        return (self.plan[number] for number in range(self.count))


@contextlib.contextmanager
def batches(kind, dataset, count):
    if kind == "ours":
        how = {"batches_per_epoch": count, "batch_size": BATCH}
        source = loader.Batches(dataset, 0, count, workers=WORKERS, prefetch=PREFETCH, **how)
        with contextlib.closing(source):
            yield source
        return
    source = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=Plan(count),
        collate_fn=list,
        num_workers=WORKERS,
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


def loop(kind, folder):
    """Take all batches, a short step after each; prints how far it is, and where it was stopped."""
    with batches(kind, patches(folder), LOOP) as source:
        for number in range(LOOP):
            try:
                next(source)
            except Exception as error:
                print(RAISES, type(error).__name__, flush=True)
                os._exit(1)
            print(number, flush=True)
            try:
                step_end = time.perf_counter() + STEP
                while time.perf_counter() < step_end:
                    pass
            except Exception as error:
                print(IN_STEP, type(error).__name__, flush=True)
                os._exit(1)
    print(GOES_ON, flush=True)
    os._exit(0)


def command(kind, options):
    return [sys.executable, __file__, "--loop", kind, "--data", str(options.data)]


def outcome(process, kill_at, chance):
    """How a loop ends one of whose workers is killed after batch kill_at; None: none is."""
    os.set_blocking(process.stdout.fileno(), False)
    said, heard = "", time.monotonic()
    while time.monotonic() - heard < PATIENCE:
        ended = process.poll() is not None
        text = process.stdout.read()  # None: nothing now
        if text:
            said, heard = said + text.decode(), time.monotonic()
        for ending in (GOES_ON, IN_STEP, RAISES):
            if ending in said:
                return ending
        if ended:
            return f"dies ({process.returncode})"
        if kill_at is not None and f"\n{kill_at}\n" in said:
            time.sleep(chance.uniform(0, 0.2))
            children = psutil.Process(process.pid).children()
            workers = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
            chance.choice(workers).send_signal(signal.SIGKILL)
            kill_at = None
        time.sleep(0.005)
    return HANGS


def kills(options):
    endings = {kind: collections.Counter() for kind in KINDS}
    chance = random.Random(0)
    for _ in range(options.kills):
        for kind in KINDS:
            process = subprocess.Popen(
                command(kind, options),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            endings[kind][outcome(process, chance.randrange(20, LOOP // 2), chance)] += 1
            end_tree(process)
    return endings


def end_tree(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.communicate()


def small_shm(options):
    """{kind: ending} where /dev/shm has 4 MB; {} if this user may not mount it."""
    mounting = "mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "
    endings = {}
    for kind in KINDS:
        shell = mounting + " ".join(command(kind, options))
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", shell],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        endings[kind] = outcome(process, None, None)
        end_tree(process)
        if kind == "ours" and endings[kind] != GOES_ON:
            return {}
    return endings


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--loop", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        return loop(options.loop, options.data)
    with tempfile.TemporaryDirectory() as name:
        options.data = Path(name) / "data"
        made = ["--phantom", "scroll", "--cases", "3", "--shape", "160", "160", "160"]
        script = [sys.executable, str(ROOT / "prepare.py"), *made, "--out", str(options.data)]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        dataset, figures = patches(options.data), {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):
            for kind in KINDS:
                figures[kind].append(speed(kind, dataset))
        medians = {
            k: [statistics.median(f) for f in zip(*v, strict=True)] for k, v in figures.items()
        }
        for kind, (first, waited, ready) in medians.items():
            print(
                f"{kind:12} first batch {first:.1f} s, one that is waited for "
                f"{1e3 * waited:.1f} ms, one that is ready {1e3 * ready:.2f} ms",
                flush=True,
            )
        endings = kills(options)
        for kind, found in endings.items():
            print(f"{kind:12} {options.kills} kills: {dict(found)}", flush=True)
        print("4 MB of /dev/shm:", small_shm(options) or "not tried")
    slower = medians["ours"][2] > medians["DataLoader"][2]
    return int(slower or endings["ours"][GOES_ON] < options.kills)


if __name__ == "__main__":
    sys.exit(main())
