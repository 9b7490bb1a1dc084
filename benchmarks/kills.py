"""A run that is killed again and again, beside the same run undisturbed.

    python benchmarks/kills.py                  # 30 kills with 0 workers and 30 with 2: 20 minutes
    python benchmarks/kills.py --kills 6 --workers 2 --epochs 1 --steps 40 run.threads=1
    python benchmarks/kills.py --ranks 2 --workers 0 --kills 10 run.threads=1

Prepares scroll phantoms and trains configs/quickstart.yaml on them, once straight through. Then the
same run again, killed with SIGKILL and resumed: at a random moment while it starts, at a random
moment somewhat further on, and in the middle of writing a checkpoint, in turn, evenly over the run.
It saves every two seconds, so that there is much to interrupt. With --ranks, torchrun with
--max-restarts runs it, and one rank or the other is killed, also while the ranks start.

At the end weights, averaged weights, optimiser, generators, the state of the loop and the best
checkpoint, and every line of the log about steps, epochs and evaluations, but for times, must be
equal bit for bit. Exit status 1 if anything differs, else 0. Leaves nothing.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime import checkpoint, log

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("time", "step_seconds", "seconds")  # of the log
CLOCKED = ("seconds", "lines")  # of the loop; lines are compared themselves
SIZE = ["--phantom", "scroll", "--cases", "8", "--shape", "80", "80", "80", "--seed", "0"]


def command(options, folder, workers):
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--max-restarts={options.kills + 1}",
    ]
    torchrun += [f"--nproc-per-node={options.ranks}"]
    return [
        sys.executable,
        *torchrun * (options.ranks > 1),
        str(ROOT / "train.py"),
        str(ROOT / "configs" / "quickstart.yaml"),
        "--resume",
        f"run.folder={folder}",
        f"data.root={options.data}",
        "data.test=[]",
        f"training.workers={workers}",
        f"training.max_epochs={options.epochs}",
        f"training.train_iterations_per_epoch={options.steps}",
        f"training.save_minutes={options.save_seconds / 60}",
        "monitor.log_every=3",
        *options.overrides,
    ]


def run(arguments, **named):
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **named
    )


def wait_until(condition, process):
    """Whether it came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def reached(folder, step):
    """Whether the log of the run in a folder of runs has come to a step."""
    for path in folder.glob("*/log.jsonl"):
        events = log.read_log(path)
        return any(e["event"] == "step" and e["step"] >= step for e in events[-3:])
    return False


def disturbed(options, folder, workers, chance):
    """Kill and resume; how many kills hit the process, how many of them a write."""
    hit, writes = 0, 0
    for number in range(options.kills):
        process = run(command(options, folder, workers))
        if number % 3 == 0:
            time.sleep(chance.uniform(0, options.start))
        else:
            step = options.epochs * options.steps * number / options.kills
            wait_until(lambda step=step: reached(folder, step), process)
            if number % 3 == 2:
                wait_until(lambda: any(folder.glob("*/checkpoints/.partial_*")), process)
            time.sleep(chance.uniform(0, 0.005 if number % 3 == 2 else 1.0))
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
        if not alive and process.returncode != 0:
            raise RuntimeError(f"it ended by itself with {process.returncode}: {errors[-2000:]}")
        hit += alive
        writes += alive and any(folder.glob("*/checkpoints/.partial_*"))
    return hit, writes


def ranks_of(process):
    """The processes that a torchrun has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children()
    return []


def disturbed_ranks(options, folder, workers, chance):
    """Kill ranks of one torchrun; as `disturbed`. RuntimeError if it does not end well."""
    log_file = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        command(options, folder, workers), stdout=subprocess.DEVNULL, stderr=log_file
    )
    hit, writes = 0, 0
    for number in range(options.kills):
        before = set()
        wait_until(lambda: len(ranks_of(process)) == options.ranks, process)
        if number % 3 == 0:
            time.sleep(chance.uniform(0, options.start))
        else:
            step = options.epochs * options.steps * number / options.kills
            wait_until(lambda step=step: reached(folder, step), process)
            time.sleep(chance.uniform(0, 1.0))
        if before := ranks_of(process):
            chance.choice(before).kill()
            hit += 1
            writes += any(folder.glob("*/checkpoints/.partial_*"))
        wait_until(lambda before=before: not set(ranks_of(process)) & set(before), process)
    if process.wait() != 0:
        log_file.seek(0)
        raise RuntimeError(f"torchrun ended with {process.returncode}: {log_file.read()[-3000:]}")
    return hit, writes


def straight(arguments):
    """Seconds that a run takes to its end. RuntimeError if it fails."""
    started = time.monotonic()
    process = run(arguments)
    errors = process.communicate()[1]
    if process.returncode != 0:
        raise RuntimeError(f"a run ended with {process.returncode}: {errors[-2000:]}")
    return time.monotonic() - started


# ---------------------------------------------------------------------------- what must be equal


def same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def lines(folder):
    """The lines of training in a run's log, without times, in the order of steps: scores are
    written down when the judge has them, steps after that which they are of."""
    events = log.read_log(folder / "log.jsonl")
    training = [event for event in events if event["event"] in log.TRAINING]
    training.sort(key=lambda event: (event["step"], event["event"]))
    return [{k: v for k, v in event.items() if k not in TIMES + ("cache",)} for event in training]


def differences(one, other):
    """What differs between two run folders, as a list of names."""
    found = []
    for name in ("last.pt", "best.pt"):
        a, b = (checkpoint.load(folder / "checkpoints" / name) for folder in (one, other))
        for state in (a, b):
            state["loop"] = {k: v for k, v in state["loop"].items() if k not in CLOCKED}
        compared = ("model", "ema", "optimizer", "scaler", "rng", "loop", "data")
        found += [f"{name}: {key}" for key in compared if not same(a[key], b[key])]
    first, second = lines(one), lines(other)
    if json.dumps(first) != json.dumps(second):
        found.append(f"log.jsonl: {len(first)} and {len(second)} lines of training")
    return found


def check(options, folder, workers, chance):
    """One straight run and one that is killed; the number of differences, which are printed."""
    undisturbed, killed = folder / f"straight{workers}", folder / f"killed{workers}"
    seconds = straight(command(options, undisturbed, workers))
    if options.ranks > 1:
        hit, writes = disturbed_ranks(options, killed, workers, chance)
    else:
        hit, writes = disturbed(options, killed, workers, chance)
        straight(command(options, killed, workers))
    (one,), (other,) = (list(f.glob("quickstart*/")) for f in (undisturbed, killed))
    found = differences(one, other)
    events = log.read_log(other / "log.jsonl")
    starts = [event for event in events if event["event"] == "start"]
    print(
        f"{options.ranks} ranks, {workers} workers: {hit} kills, {writes} in mid-write; "
        f"{sum(event['resumed'] for event in starts)} resumes, {len(lines(other))} lines of "
        f"training; straight run {seconds:.0f} s; " + ("; ".join(found) or "all equal"),
        flush=True,
    )
    return len(found)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80, help="of an epoch")
    parser.add_argument("--save-seconds", type=float, default=2.0)
    parser.add_argument("--start", type=float, default=8.0, help="seconds that starting takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="group.key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        options.data = Path(folder) / "data"
        made = [sys.executable, str(ROOT / "prepare.py"), *SIZE, "--out", str(options.data)]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        chance = random.Random(options.seed)
        counts = [check(options, Path(folder), n, chance) for n in options.workers]
    return 1 if any(counts) else 0


if __name__ == "__main__":
    sys.exit(main())
