"""What a run writes down: log.jsonl, TensorBoard, and lines for the terminal.

    runs/<name>/log.jsonl       one JSON object per line, each with "event", "time" (seconds since
                                1970), "step" and "epoch"
    runs/<name>/tensorboard/    the numbers of steps, epochs and evaluations as scalars

Events of training, which a resumed run writes again from where its state was saved:

    step         loss: components, means since the line before; lr; step_seconds; seconds: of each
                 part of a step; skipped: steps without an update
    epoch        loss: means over the epoch; patches: shares of them; cache: what it holds,
                 and how often it was hit since the start
    evaluation   scores: means; cases: those of each; chosen: threshold and size of components, of
                 several regions {region: number}, and steps of postprocess.py that were taken;
                 steps: means before and after each that is on; tried: which of them were tried,
                 with their effect, see `evaluator.evaluate`; unread: cases left out

Events of the run's history, which stay:

    start        pid, host, created (of the process, seconds since 1970), steps, iterations (per
                 epoch), log_every, score (the metric that picks the best), better ({score:
                 higher, lower or null}), resumed, versions, notes
    saved        file, seconds (of writing), bytes
    trouble      kind, text, and figures of that kind: see the modules that report it
    stop         reason, status: left early, with its state saved or the last one kept
    crash        error, traceback: an exception that nobody expected
    end          all steps done
"""

import json
import math
import os
import shutil
import socket
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from monitoring.records import append_line, read_lines
from volumes import atomic

TRAINING = ("step", "epoch", "evaluation")
SECONDS_BETWEEN_LINES = 10  # of what takes long, where there is no terminal


class RunLog:
    """Appends events to log.jsonl, and those of training to TensorBoard.

    keep: lines of training to keep, as the resumed state counts them; later lines, which a run
    wrote after its last saved state, are removed. None starts a new log. step: of that state.

    lines: how many lines of training there are. OSError if the disk is full; the log then ends with
    the last whole line.
    """

    def __init__(self, folder, *, tensorboard, keep=None, step=0):
        self.path, self.lines = Path(folder) / "log.jsonl", 0
        if keep is None:  # a run that died before it saved anything may have left these
            self.path.unlink(missing_ok=True)
            shutil.rmtree(Path(folder) / "tensorboard", ignore_errors=True)
        elif self.path.exists():
            self.lines = _cut(self.path, keep)
        self.file = self.path.open("a+b", buffering=0)
        purge = None if keep is None else step + 1
        self.scalars = Scalars(Path(folder) / "tensorboard", purge) if tensorboard else None

    def write(self, event, *, step, epoch, **fields):
        """One line, with the system when this returns. NaN and infinity are written as null."""
        content = {"event": event, "time": round(time.time(), 3), "step": step, "epoch": epoch}
        append_line(self.file, _finite({**content, **fields}))
        if event in TRAINING:
            self.lines += 1
            if self.scalars is not None:
                self.scalars.write(event, fields, step)

    def sync(self):
        """All lines are on disk when this returns, as those must be that a saved state counts."""
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.scalars is not None:
            self.scalars.close()


class Scalars:
    """A TensorBoard event file, written at once: what was logged is there after a crash.

    torch's SummaryWriter keeps up to two minutes of it on a thread, and takes two seconds to
    import. purge_step: TensorBoard forgets what earlier files hold from this step on.
    """

    def __init__(self, folder, purge_step=None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(open(folder / name, "ab", buffering=0))
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, event, fields, step):
        """Every number in the fields of an event, as `event/key/inner key`."""
        values = [
            self.summary.Value(tag=f"{event}/{key}", simple_value=value)
            for key, value in _numbers(fields)
        ]
        self._add(step=step, summary=self.summary(value=values))

    def _add(self, **content):
        self.records.write(self.event(wall_time=time.time(), **content).SerializeToString())

    def close(self):
        self.records.close()


def _cut(path, keep):
    """Remove the lines of training after the first `keep` from a log; how many are left."""
    events, lines = [], 0
    for event in read_log(path):
        lines += event["event"] in TRAINING
        if event["event"] not in TRAINING or lines <= keep:
            events.append(event)
    with atomic.replacing(path) as partial:
        partial.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return min(lines, keep)


def read_log(path):
    """The events of a log.jsonl; lines that a crash cut short or damaged are left out."""
    return [event for event in read_lines(path) if "event" in event]


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(fields, prefix=""):
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


# ---------------------------------------------------------------------------- means of many steps


class Means:
    """Means of loss components and of shares of patches: of a line of the log, and of an epoch.

    A term that acts on some steps only is the mean over those. foreground: the mean share of
    foreground in the patches of all lines so far; None before the first.
    """

    def __init__(self):
        self.line, self.epoch, self.run = _empty(), _empty(), {}

    def state_dict(self):
        return {"line": self.line, "epoch": self.epoch, "run": self.run}

    def load_state_dict(self, state):
        self.line, self.epoch = state["line"], state["epoch"]
        self.run = state.get("run", {})  # not in states of older versions

    @property
    def foreground(self):
        return _means_of(self.run).get("foreground")

    def add(self, components, shares, weight):
        """Add a batch: {name: scalar} of its loss, which counts `weight`, and of its patches."""
        _add(self.line["loss"], components, weight)
        _add(self.line["patches"], shares, 1.0)

    def take_line(self):
        """{name: mean} of the loss since the last line; {} if no step had an update. Waits for the
        device."""
        means = {kind: _means_of(sums) for kind, sums in self.line.items()}
        for kind, sums in self.line.items():
            for name, (_, count) in sums.items():
                _add(self.epoch[kind], {name: means[kind][name]}, count)
                if name == "foreground":
                    _add(self.run, {name: means[kind][name]}, count)
        self.line = _empty()
        return means["loss"]

    def take_epoch(self):
        """{"loss": means, "patches": shares} of the epoch so far, which begins anew."""
        means = {kind: _means_of(sums) for kind, sums in self.epoch.items()}
        self.epoch = _empty()
        return means


def _empty():
    return {"loss": {}, "patches": {}}


def _add(sums, values, weight):
    """Add to {name: (sum, count)}."""
    for name, value in values.items():
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = (total + weight * value, count + weight)


def _means_of(sums):
    names = sorted(sums, key=lambda name: (name == "total", name))
    return {name: float(sums[name][0]) / sums[name][1] for name in names}


# ---------------------------------------------------------------------------- terminal


class ProgressLine:
    """A progress bar on a terminal, plain lines elsewhere; a context. `print` prints above it."""

    def __init__(self, console, total, done):
        self.console = console
        columns = (BarColumn(30), TextColumn("{task.completed}/{task.total}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(
            *columns, *times, TextColumn("{task.description}"), console=self.console
        )
        self.total, self.short, self.said = total, "", time.monotonic()
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error):
        if self.console.is_terminal:
            self.bar.stop()

    def print(self, text):
        self.console.print(text)
        self.said = time.monotonic()
        self.bar.update(self.task, description=self.short)

    def meanwhile(self, text):
        """text: what goes on between two steps; beside the bar, elsewhere a line now and then."""
        self.bar.update(self.task, description=text)
        if not self.console.is_terminal and time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.print(text)

    def advance(self, step, text, short):
        """text: a plain line of its own; short: what a bar has room for."""
        self.short = short
        self.bar.update(self.task, completed=step, description=short)
        if not self.console.is_terminal:
            self.print(f"step {step}/{self.total} {text}")
