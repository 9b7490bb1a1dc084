"""What it costs to keep a run: time of saving and monitoring, memory over folds and over steps.

    python benchmarks/upkeep.py                     # 15 minutes
    python benchmarks/upkeep.py --only cost
    python benchmarks/upkeep.py --only folds steps

cost: of the network of configs/quickstart.yaml and of that of configs/exp001_full.yaml (33 million
parameters) with the optimiser's state, medians of several: copying the state, which the training
thread waits for, and writing it, which another thread does (its CPU time); a line of system.jsonl
with two workers alive; a look at signals and memory, once a second at most. As a share of the time
that passes from one to the next at the default settings, all of it counted as lost to training: an
epoch is 45 s in quickstart and was taken to be 2000 steps of 0.3 s in exp001_full. Then quickstart
with all of it and without, in turns: the median time of a step by the clock on the wall.

folds: three trainings one after another in one process; resident memory after each.
steps: 2000 steps of a small network with two workers, which save every 5 seconds, and resident
memory of the training process from step 200 on. Each part runs in a process of its own.

Exit status 1 if a bar is missed: cost above 2 %, folds off by more than 200 MB, steps by 50 MB.
"""

import argparse
import functools
import gc
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training_step

import model
import train
from monitoring import recorder
from runtime import checkpoint, config, log, memory_guard, signals
from runtime import run as run_module

ROOT = Path(__file__).resolve().parents[1]
QUICK = ROOT / "configs" / "quickstart.yaml"
FULL = ROOT / "configs" / "exp001_full.yaml"
MB = 1e6
MOST_COST, MOST_FOLDS, MOST_STEPS = 0.02, 200 * MB, 50 * MB
ROUNDS = 5


def row(what, value, most=None, unit=""):
    verdict = "" if most is None else "  ok" if value <= most else "  MISSED"
    bar = "" if most is None else f" (at most {most:g})"
    print(f"{what:58} {value:10.4g} {unit}{bar}{verdict}", flush=True)
    return verdict.endswith("MISSED")


# ---------------------------------------------------------------------------- time


def stateful(settings):
    """{name: what has a state_dict} of a network that has taken a step."""
    shape = settings.model.model_dump(exclude={"strides", "compile"})
    patch, stages = settings.sampling.patch, len(settings.model.multipliers)
    strides, kernels = model.fit(patch, (1, 1, 1), stages=stages)
    network = model.UNet3D(1, 1, strides=strides, kernels=kernels, **shape)
    optimizer = torch.optim.AdamW(network.parameters())
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return {"model": network, "ema": network, "optimizer": optimizer}


def timed(function, clock=time.perf_counter):
    started = clock()
    result = function()
    return clock() - started, result


def saving(settings, folder):
    """Medians of the seconds of copying a state and of CPU of writing it, and its bytes."""
    parts, copies, writes = stateful(settings), [], []
    rest = dict.fromkeys(("scheduler", "scaler", "config", "data", "versions"))
    for _ in range(ROUNDS):
        copying, copied = timed(
            lambda: checkpoint.snapshot({k: p.state_dict() for k, p in parts.items()})
        )
        state = {**rest, **copied, "rng": checkpoint.rng_state(), "loop": {"step": 0}}
        written = []

        def write(state=state, written=written):
            path = folder / "checkpoints" / "last.pt"
            written.append(timed(lambda: checkpoint.save(state, path), time.thread_time))

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        copies.append(copying)
        writes.append(written[0][0])
    return statistics.median(copies), statistics.median(writes), written[0][1].bytes


def monitoring(folder):
    """Seconds of CPU of a line of system.jsonl, with two other processes alive."""
    others = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in "ab"]
    roles = {os.getpid(): "training"} | {p.pid: f"worker {i}" for i, p in enumerate(others)}
    watch = recorder.SystemMonitor(folder, seconds=10, roles=lambda: roles, step=lambda: 0)
    seconds = []
    for _ in range(20):
        seconds.append(timed(lambda: watch._write(watch._line()), time.thread_time)[0])
        time.sleep(0.1)
    for process in others:
        process.kill()
        process.wait()
    return statistics.median(seconds)


class NoWorkers:
    workers = ()


def looking(folder):
    """Seconds of a look at signals and memory."""
    stop = signals.Stop()
    stop.look_for(folder / "stop")
    watch = memory_guard.MemoryGuard(None, limit=10**13, report=print)
    seconds = []
    for _ in range(50):
        stop.looked = watch.looked = 0.0
        seconds.append(timed(lambda: stop.reason() or watch.look(NoWorkers))[0])
    return statistics.median(seconds)


def cost(options, folder):
    missed = False
    line, look = monitoring(folder), looking(folder)
    row("a line of system.jsonl, every 10 s", line / 1e-3, unit="ms of CPU")
    row("a look at signals and memory, every second", look / 1e-3, unit="ms")
    for name, path, epoch in (("quickstart", QUICK, 45.0), ("exp001_full", FULL, 600.0)):
        copying, writing, size = saving(config.load(path), folder)
        row(f"{name}: copying its state", copying / 1e-3, unit="ms")
        row(f"{name}: writing it, {size / MB:.1f} MB", writing / 1e-3, unit="ms of CPU")
        # Once an epoch the state is written twice (before and after the evaluation) and best.pt.
        saves = (copying + 3 * writing) / epoch + (copying + writing) / 600
        share = saves + line / 10 + look
        missed |= row(f"{name}: share of the time", share, MOST_COST)
    ratio = with_and_without(options, folder)
    return row("quickstart, with all of it over without", ratio - 1, MOST_COST) or missed


def with_and_without(options, folder):
    """The ratio of the median wall time of a step, with monitor and saving over without."""
    without = ["monitor.seconds=1e9", "training.save_minutes=null"]
    seconds = {True: [], False: []}
    for number in range(2 * ROUNDS):
        on = number % 2 == 0
        run = quickstart(options, folder / f"ab{number}", *([] if on else without))
        assert train.main(run) == 0
        events = log.read_log(folder / f"ab{number}" / "q" / "log.jsonl")
        times = [e["time"] for e in events if e["event"] == "step"]
        seconds[on] += [(b - a) / run.monitor.log_every for a, b in itertools.pairwise(times)]
    row("a step by the clock on the wall", statistics.median(seconds[True]) / 1e-3, unit="ms")
    return statistics.median(seconds[True]) / statistics.median(seconds[False])


def quickstart(options, folder, *changes):
    fixed = [f"data.root={options.data}", "data.test=[]", f"run.folder={folder}", "run.name=q"]
    fixed += ["training.max_epochs=1", "training.train_iterations_per_epoch=40"]
    return config.load(QUICK, [*fixed, "monitor.log_every=5", "data.validation=[]", *changes])


# ---------------------------------------------------------------------------- memory


def small(options, folder, *changes):
    fixed = ["sampling.patch=[16,32,32]", "model.base=4", "model.multipliers=[1,2]"]
    fixed += ["run.threads=1", "training.workers=2"]
    return quickstart(options, folder, *fixed, *changes)


def folds(options, folder):
    after = []
    for fold in range(3):
        changes = ["data.validation=[]", "data.folds=3", f"data.fold={fold}"]
        assert train.main(small(options, folder / f"fold{fold}", *changes)) == 0
        gc.collect()
        after.append(training_step.resident_bytes())
        row(f"fold {fold}: resident memory after it", after[-1] / MB, unit="MB")
    off = max(abs(size - after[0]) for size in after)
    return row("folds: the most by which one is off the first", off / MB, MOST_FOLDS / MB, "MB")


def steps(options, folder):
    sizes, update = {}, model.update_ema

    def watched(ema, network, decay, step):
        update(ema, network, decay, step)
        if step % 50 == 0:
            sizes[step] = training_step.resident_bytes()

    changes = ["training.train_iterations_per_epoch=2000", f"training.save_minutes={5 / 60}"]
    model.update_ema = watched
    try:
        assert train.main(small(options, folder / "steps", *changes)) == 0
    finally:
        model.update_ema = update
    late = [size for step, size in sizes.items() if step >= 200]
    row("resident memory at step 200", sizes[200] / MB, unit="MB")
    row("resident memory at step 1950", sizes[1950] / MB, unit="MB")
    return row("steps 200 to 2000: spread", (max(late) - min(late)) / MB, MOST_STEPS / MB, "MB")


PARTS = {"cost": cost, "folds": folds, "steps": steps}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    if len(options.only) > 1:
        commands = [[sys.executable, __file__, "--only", part] for part in options.only]
        return max(subprocess.run(command).returncode for command in commands)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.data = folder / "data"
        made = ["--phantom", "scroll", "--cases", "8", "--shape", "80", "80", "80"]
        command = [sys.executable, str(ROOT / "prepare.py"), *made, "--out", str(options.data)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        run_module.Console = functools.partial(run_module.Console, quiet=True)
        return int(PARTS[options.only[0]](options, folder))


if __name__ == "__main__":
    sys.exit(main())
