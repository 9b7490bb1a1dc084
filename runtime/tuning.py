"""Which settings train fastest on this machine: one after the other is tried, and kept if it helps.

    tuner = Tuner(plan, functools.partial(measure, plan, steps), print)
    tuner.decide()
    tuner.best.changes, tuner.decided        # {group.key: value}

A trial is a short run of train.py in a process of its own. A setting is kept if the run came to
its end with memory to spare and its steps are shorter by more than noise; else the plan goes back
to the one before. A step stays one of the same patches at the same learning rate. Numbers change by
bf16 or fp16 in place of fp32, and a little by the size of batches, over which losses are averaged.
"""

import glob
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from monitoring import machine
from monitoring.formatting import format_bytes
from monitoring.records import peaks, read_lines
from patches import feed
from runtime import memory_guard, signals
from runtime.log import read_log
from runtime.precision import resolve_precision
from volumes import atomic
from volumes.processes import describe_death

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
WARM_UP = 5  # steps before those that are measured, and of a line of the log
LEAST_STEPS = 3 * WARM_UP  # that a noise can be told from
LEAST_GAIN = 0.02  # of the time of a step; below it nothing is worth a change
FAULTS = ("cuda memory", "memory", "worker died")  # kinds of trouble that end a trial's chances
WORKERS, PREFETCH = "training.workers", "training.prefetch_factor"
BATCH, ACCUMULATE = "training.train_batch_size", "training.accumulate"
PRECISION, CHECKPOINTING = "training.precision", "model.checkpointing"
KEYS = (WORKERS, BATCH, ACCUMULATE, PREFETCH, PRECISION, CHECKPOINTING)
TITLES = ("step", "noise", "wait", "RAM", "GPU memory", "GPU load")  # of the figures of a trial
LADDERS = {WORKERS: (0, 1, 2, 4, 6), BATCH: (1, 2, 4), PREFETCH: (2, 4, 8)}


# ---------------------------------------------------------------------------- a run of train.py


class ShortRun(NamedTuple):
    """What is left of a run. failure: why it did not come to its end, "" if it did."""

    failure: str
    log: list  # lines of log.jsonl
    readings: list  # lines of system.jsonl


def run_training(plan, steps, changes=None):
    """Run train.py for some steps, without validation, on the training cases of a plan.

    changes: {group.key: value} of its settings. No folder stays. `signals.Stopped` if a signal
    came, which also ends the run.
    """
    kills = machine.attempt(machine.oom_kills)
    with tempfile.TemporaryDirectory(prefix="lamina-tune-") as root:
        path, output = Path(root, "trial.yaml"), Path(root, "output")
        content = _short(plan, steps, changes or {}, root)
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        with open(output, "wb") as out, signals.Stop() as stop:
            command = [sys.executable, "-u", TRAIN, path]
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    if stop.why:
                        process.terminate()
                    time.sleep(0.1)
            finally:  # a second Ctrl-C
                process.kill()
                process.wait()
            if stop.why:
                raise signals.Stopped(stop.why)
        trial, failure = Path(root, "trial"), ""
        log, readings = read_log(trial / "log.jsonl"), read_lines(trial / "system.jsonl")
        if process.returncode:
            by_kernel = kills is not None and (machine.attempt(machine.oom_kills) or 0) > kills
            failure = f"train.py {describe_death(process.returncode)}"
            failure += ", by the kernel, for memory ran out" if by_kernel else ""
            if process.returncode > 0:
                failure += f": {_last_words(log, output)}"
        return ShortRun(failure, log, readings)


def _short(plan, steps, changes, root):
    """Nested dicts of the settings of a plan, changed, for a short run in a folder."""
    content = plan.settings.plain()
    ids = [glob.escape(case.id) for case in plan.split.train]
    content["run"] |= {"name": "trial", "folder": root}
    content["data"] |= {"train": ids, "validation": [], "test": [], "folds": 0, "fold": 0}
    content["training"] |= {"max_epochs": 1, "train_iterations_per_epoch": steps}
    content["training"] |= {"max_steps": None, "max_hours": None, "save_minutes": None}
    content["monitor"] |= {"log_every": WARM_UP, "seconds": 0.5}
    content["monitor"] |= {"tensorboard": False, "picture": False}
    for key, value in changes.items():
        group, name = key.split(".")
        content[group][name] = value
    return content


def _last_words(log, output):
    """Why a run ended, as its log says, or the last line that it printed."""
    for line in reversed(log):
        if line["event"] in ("stop", "crash"):
            return line.get("reason") or line["error"]
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


# ---------------------------------------------------------------------------- a trial


class Trial(NamedTuple):
    """What a short run says of settings. fault: why they are no good, "" if they are.

    seconds of a step, and their standard error; wait: share of the step; ram, gpu: bytes; load: of
    the GPU, percent. None: not known.
    """

    changes: dict  # {group.key: value}, from the settings of the plan
    seconds: float | None = None
    error: float | None = None
    wait: float | None = None
    ram: int | None = None
    gpu: int | None = None
    load: float | None = None
    fault: str = ""

    def cells(self):
        """Time, noise, wait, RAM, GPU memory and load as text; "" for what is not known."""
        return tuple(
            "" if value is None else show(value)
            for value, show in (
                (self.seconds, "{:.3f} s".format),
                (self.error, lambda error: f"{2 * error / self.seconds:.1%}"),
                (self.wait, "{:.1%}".format),
                (self.ram, format_bytes),
                (self.gpu, format_bytes),
                (self.load, "{:.0f} %".format),
            )
        )

    def __str__(self):
        pairs = zip(TITLES, self.cells(), strict=True)
        return ", ".join(f"{title} {text}" for title, text in pairs if text)


def measure(plan, steps, changes):
    """The `Trial` of a plan's settings with changes, over this many steps."""
    settings = _short(plan, steps, changes, "")["training"]
    # Batches that were read before the first step would make the reading look faster than it is.
    ahead = 2 * settings["workers"] * settings["prefetch_factor"] / settings["accumulate"]
    warm_up = WARM_UP * math.ceil(1 + ahead / WARM_UP)
    run = run_training(plan, warm_up + steps, changes)
    ram, gpu = peaks(run.readings)
    trial = Trial(changes, ram=ram, gpu=gpu, fault=fault_of(run, plan.device))
    lines = [e for e in run.log if e["event"] == "step" and e["step"] > warm_up]
    if trial.fault or len(lines) < 2:
        return trial._replace(fault=trial.fault or "train.py left no times of its steps")
    windows = [line["step_seconds"] for line in lines]
    seconds = statistics.mean(windows)
    steady = [reading for reading in run.readings if (reading.get("step") or 0) > warm_up]
    loads = [gpu["load"] for gpu in _gpus(steady, plan.device) if gpu["load"] is not None]
    return trial._replace(
        seconds=seconds,
        error=statistics.stdev(windows) / math.sqrt(len(windows)),
        wait=statistics.mean(line["seconds"]["wait"] for line in lines) / seconds,
        load=statistics.mean(loads) if loads else None,
    )


def fault_of(run, device):
    """Why the settings of a `ShortRun` are no good, one line, "" if they are."""
    if run.failure:
        return run.failure
    for event in run.log:
        if event["event"] == "trouble" and event["kind"] in FAULTS:
            return event["text"]
    limits = [machine.MemoryLimit(*room) for r in run.readings for room in r.get("rooms") or ()]
    for gpu in _gpus(run.readings, device):
        if None not in (gpu["used"], gpu["total"]):
            free = gpu["total"] - gpu["used"]
            limits.append(machine.MemoryLimit(free, gpu["total"], "memory of the GPU"))
    tight = memory_guard.nearly_used_up(limits)
    return "" if tight is None else f"memory is short: {tight}"


def _gpus(readings, device):
    """What was read of a device, if that is a GPU."""
    rows = [gpu for reading in readings for gpu in reading.get("gpus") or ()]
    return [gpu for gpu in rows if device.type == "cuda" and gpu["index"] == (device.index or 0)]


# ---------------------------------------------------------------------------- the plan


def named(changes):
    """{group.key: value} for people."""
    return " ".join(f"{key.split('.')[1]}={value}" for key, value in changes.items())


class Tuner:
    """Tries settings, a phase after the other, each from the best so far.

    measure(changes): the `Trial` of {group.key: value} on top of the plan's settings; say(text) is
    called with each decision. best: the last good `Trial`; rows: [(trial, verdict)] of all;
    decided: {group.key: value} of what was tried. Noise is two standard errors of a difference.
    """

    def __init__(self, plan, measure, say):
        self.plan, self.measure, self.say = plan, measure, say
        content = plan.settings.plain()
        self.config = {key: content[key.split(".")[0]][key.split(".")[1]] for key in KEYS}
        self.best, self.rows, self.tried, self.misfits = None, [], set(), []

    @property
    def decided(self):
        return {key: self.value(key) for key in KEYS if key in self.tried}

    def value(self, key):
        """Of a setting, as it is in the best trial so far."""
        return self.best.changes.get(key, self.config[key])

    def decide(self):
        """Go through all phases. Afterwards best.fault is "" if any settings were good."""
        self.best = self.measure({})
        self.rows.append((self.best, self.best.fault or "the config"))
        self.say(f"config     {named(self.config)}: {self.best.fault or self.best}")
        self.workers()
        self.batch()
        self.prefetch()
        self.precision()
        self.checkpointing()

    # ------------------------------------------------------------------------ phases

    def workers(self):
        if not feed.HAS_WORKERS:
            return self._skip("workers", "this system has none")
        self._climb("workers", *([{WORKERS: n} for n in side] for side in self._ladder(WORKERS)))

    def batch(self):
        """Larger or smaller batches of as many patches in a step."""
        patches = self.config[BATCH] * self.config[ACCUMULATE]
        sizes = [[n for n in side if patches % n == 0] for side in self._ladder(BATCH)]
        if not any(sizes):
            text = f"a step is of {patches} (batch x accumulate), and other batches would change it"
            return self._skip("batch", text)
        pairs = [[{BATCH: n, ACCUMULATE: patches // n} for n in side] for side in sizes]
        others = [n for n in LADDERS[BATCH] if patches % n]
        without = f", so not with batches of {', '.join(map(str, others))}" if others else ""
        self.say(f"batch      {patches} patches a step and the learning rate stay{without}")
        before = len(self.rows)
        self._climb("batch", *pairs)
        misfits = [trial.changes for trial, _ in self.rows[before:] if trial.fault]
        self.misfits = [{key: misfit[key] for key in (BATCH, ACCUMULATE)} for misfit in misfits]

    def prefetch(self):
        if not self.value(WORKERS):
            return self._skip("prefetch", "without workers nothing is read ahead")
        above, below = ([{PREFETCH: n} for n in side] for side in self._ladder(PREFETCH))
        # Fewer batches ahead need less memory; they never save time.
        self._climb("prefetch", above, below if self.best.fault else ())

    def precision(self):
        fast, reason = resolve_precision("auto", self.plan.device)
        if self.plan.precision != "fp32" or fast == "fp32":
            text = f"{self.plan.precision} is already the fast one"
            return self._skip("precision", f"{text} ({reason})" if fast == "fp32" else text)
        self._climb("precision", [{PRECISION: fast}])

    def checkpointing(self):
        if self.value(CHECKPOINTING):
            return self._climb("recompute", [{CHECKPOINTING: False}])
        # A batch that did not fit may fit with it: a larger one, or the first that does at all.
        steps = [{}, *self.misfits] if self.best.fault else self.misfits
        if not steps:
            return self._skip("recompute", "memory is not short, and it would only cost time")
        self._climb("recompute", (), [step | {CHECKPOINTING: True} for step in steps])

    # ------------------------------------------------------------------------ steps of a phase

    def _ladder(self, key):
        """(values above, values below) the one that is set, the nearest first."""
        now, ladder = self.value(key), LADDERS[key]
        return [n for n in ladder if n > now], [n for n in reversed(ladder) if n < now]

    def _climb(self, title, above, below=()):
        """Take steps up until one does not help; if none does, down."""
        helped = False
        for changes in above:
            if not self._step(title, changes):
                break
            helped = True
        for changes in () if helped else below:
            if not (self._step(title, changes) or self.best.fault):  # less may still fit
                break

    def _step(self, title, changes):
        """Try changes of the best settings; whether they are the best now."""
        trial = self.measure(self.best.changes | changes)
        taken, verdict = self._judge(trial)
        self.rows.append((trial, verdict))
        self.tried |= changes.keys()
        before = {key: self.value(key) for key in changes}
        figures = f"{trial}; " if str(trial) else ""
        back = "" if taken else f"; back to {named(before)}"
        self.say(f"{title:<11}{named(changes)}: {figures}{verdict}{back}")
        if taken:
            self.best = trial
        return taken

    def _judge(self, trial):
        """(whether a trial is better than the best, why)."""
        if trial.fault or self.best.fault:
            return not trial.fault, trial.fault or "taken: these settings work"
        gain, noise = compare(self.best, trial)
        if gain > noise:  # or what else this machine does has changed: that is seen by a repetition
            again = self.measure(self.best.changes)
            self.rows.append((again, "repeated"))
            if not again.fault:
                self.best = min(self.best, again, key=lambda trial: trial.seconds)
                gain, noise = compare(self.best, trial)
        change = f"{abs(gain):.1%} {'less' if gain > 0 else 'more'} time, noise {noise:.1%}"
        return gain > noise, f"{'taken' if gain > noise else 'no gain'}: {change}"

    def _skip(self, title, reason):
        self.say(f"{title:<11}not tried: {reason}")


def compare(before, after):
    """(gain, noise) of a trial against another, as shares of the time of its step."""
    noise = 2 * math.hypot(before.error, after.error) / before.seconds
    return 1 - after.seconds / before.seconds, max(noise, LEAST_GAIN)


def write_settings(path, decided, comments):
    """Write {group.key: value} as a config file, whole or not at all, with lines on top."""
    content = {}
    for key, value in decided.items():
        group, name = key.split(".")
        content.setdefault(group, {})[name] = value
    lines = [f"# {' '.join(line.split())}" for line in comments]
    with atomic.replacing(path) as partial:
        text = "\n".join([*lines, yaml.safe_dump(content, sort_keys=False)])
        partial.write_text(text, encoding="utf-8")
