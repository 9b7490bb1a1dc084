"""Whether a run is alive, its cause of death, how fast it goes and when it will be done.

All of it from what the run folder says (records.py). The process is looked up only if it was
started on this machine; on another the age of the last line decides. A value of another type than
the run writes counts as missing.
"""

import contextlib
import math
import re
import socket
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from monitoring.formatting import clock, duration, finite, format_share, mean
from volumes.processes import command_of

RUNNING, DONE, STOPPED = "running", "done", "stopped early"
CRASHED, DEAD, UNKNOWN = "crashed", "dead", "unknown"
SAME_PROCESS = 2.0  # seconds between two readings of when a process was created
SILENT = 3, 30.0  # intervals, and seconds, without a line before a run counts as dead
AHEAD = 60.0  # seconds by which another machine's clock may be ahead and still be believed
FULL, FULL_GPU = 0.9, 0.97  # shares of memory; between two lines a process uses what is left
FULL_DISK = 0.005  # share that is free


class Status(NamedTuple):
    """Whether a run is alive; for one that ended too early, notes: the causes, and what to do."""

    state: str  # one of the words above
    text: str
    notes: tuple = ()


class RunHealth:
    """Says whether a run is alive; remembers since when its process is missing."""

    def __init__(self, run):
        self.run, self.missing_since = run, None

    def look(self, now):
        """Read what is new, and give the `Status`."""
        self.run.refresh(now)
        if self.status(now).state == DEAD:  # it may have ended well after its files were read
            self.run.refresh(now)
        return self.status(now)

    def status(self, now):
        """The `Status` at a time, in seconds since 1970, by this machine's clock."""
        run = self.run
        endings = run.since_start("end", "stop", "crash")
        if endings:
            return _ended(run, endings[-1], now)
        alive, evidence = self._is_alive(now)
        if alive is not False:
            return Status(RUNNING if alive else UNKNOWN, evidence)
        notes = (*causes_of_death(run), advice(run))
        return Status(DEAD, f"ended without a last message; {evidence}", notes)

    def _is_alive(self, now):
        """(True, False or None if unknown; the evidence in words)."""
        run, reading = self.run, self.run.reading
        if not run.events and not run.steps and not reading:
            return None, "nothing has been logged yet"
        host, pid = (run.start.get(key) or reading.get(key) for key in ("host", "pid"))
        last, interval = last_line(run), finite(reading.get("seconds"))
        age = "no line has a time" if last is None else f"last line {duration(now - last)} ago"
        if host == socket.gethostname() and pid is not None:
            if _process_is_alive(pid, finite(run.start.get("created"))):
                self.missing_since = None
                return True, age
            self.missing_since = self.missing_since or now
            # A container may have the name of its machine, but numbers processes by itself.
            if (run.growth_time or 0) > self.missing_since:
                return True, f"{age}, of a process that cannot be seen from here"
            return False, f"there is no process {pid} on {host}, {age}"
        if interval is None or last is None:
            return None, f"{age}; how long silence is normal is not known"
        if last > now + AHEAD:
            return None, f"the clock of {host or 'its machine'} is {duration(last - now)} ahead"
        return now - last <= SILENT[0] * interval + SILENT[1], age


def _process_is_alive(pid, created):
    """Whether this machine has this process, created at `created` (seconds since 1970)."""
    try:
        process = psutil.Process(pid)
        same = created is None or abs(process.create_time() - created) <= SAME_PROCESS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, TypeError):
        return False


def last_line(run):
    """When the run last wrote a line into either file, None if no line has a time."""
    newest = [run.reading, *run.events[-1:], *run.recent_steps[-1:], {"time": run.growth_time}]
    return max((e["time"] for e in newest if e.get("time") is not None), default=None)


def _ended(run, event, now):
    when = f"at step {event['step']}, {clock(event.get('time'), now)}"
    if event["event"] == "end":
        return Status(DONE, f"all steps done {when}")
    if event["event"] == "stop":
        text = f"{event.get('reason', 'no reason given')}, {when}"
        return Status(STOPPED, text, (advice(run),))
    trace = [line for line in str(event.get("traceback")).splitlines() if "File " in line]
    where = [f"raised in {' '.join(line.split())}" for line in trace[-1:]]
    text = f"{event.get('error', 'no error given')}, {when}"
    return Status(CRASHED, text, (*where, advice(run)))


def advice(run):
    """How to go on with a run that ended too early, as a sentence."""
    saved = [e for e in run.events if e["event"] == "saved" and "last" in str(e.get("file"))]
    if not saved:
        return "no state was saved: start it again"
    step = saved[-1]["step"]
    return f"{command_of('train.py')} --resume {run.folder} goes on from step {step}"


def causes_of_death(run):
    """Of a run that wrote nothing about it: sentences, the surest first."""
    last, booted = last_line(run), psutil.boot_time()
    if run.start.get("host") == socket.gethostname() and last is not None and booted > last:
        when = clock(booted, last)
        return [f"the machine went down: it was started at {when}, after the last line"]
    causes = []
    for find in (_fault, _oom_killer, _full_disk, _full_gpus):
        with contextlib.suppress(OSError, TypeError, ValueError, LookupError, AttributeError):
            causes += find(run)  # a damaged reading, or no fault.txt, names no cause
    return causes or ["killed from outside (SIGKILL), or the machine went down"]


def _fault(run):
    """What faulthandler wrote, if it was since the last start."""
    path = run.folder / "fault.txt"
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text and path.stat().st_mtime >= run.start.get("time", 0):
        where = re.search(r"Current thread.*\s+(File .*)", text)
        yield f"{text.splitlines()[0]}{f', in {where[1]}' if where else ''} (fault.txt)"


def _oom_killer(run):
    """That it killed, or that the tightest limit was nearly reached, except run.memory_gb."""
    reading = run.reading
    if count := reading.get("new_oom_kills"):
        yield f"the kernel's OOM killer: processes of this cgroup killed since the start: {count}"
    limits = [room for room in reading.get("rooms") or () if room[2] != "run.memory_gb" and room[1]]
    free, total, what = min(limits, default=(1, 1, ""))
    tree = reading.get("tree") or 0
    if max(total - free, tree) >= FULL * total:
        yield (
            f"probably the kernel's OOM killer: {format_share(total - free, total)} were used "
            f"({what}), {format_share(tree, total)} by this run; fewer training.workers or a "
            "smaller data.cache_gb use less"
        )


def _full_disk(run):
    free, total = run.reading.get("disk") or (1, 1)
    if free < FULL_DISK * total:
        yield f"the disk was full: {format_share(free, total)} were free"


def _full_gpus(run):
    for gpu in run.reading.get("gpus") or ():
        used, total = gpu.get("used"), gpu.get("total")
        if used and total and used > FULL_GPU * total:
            yield f"memory of GPU {gpu['index']} was full: {format_share(used, total)}"


@dataclass
class Pace:
    """How far and how fast a run is; None for what the log does not say."""

    step: int  # done, of `steps` in the whole run
    steps: int | None
    step_seconds: float | None
    between_epochs: float | None  # seconds of an evaluation and whatever else comes there
    epoch: int | None = None  # from 1, of `epochs`
    epochs: int | None = None
    epoch_left: float | None = None  # seconds
    run_left: float | None = None


def pace(run, now):
    """The `Pace` of a run at a time, in seconds since 1970."""
    events = [*run.recent_steps[-1:], *run.since_start("epoch")[-1:]] or [run.start]
    newest = max(events, key=lambda event: event.get("time", 0))
    logged = newest.get("step", 0)
    done = max(logged, finite(run.reading.get("step")) or 0)
    steps, size = finite(run.start.get("steps")), finite(run.start.get("iterations"))
    pace = Pace(done, steps, step_seconds(run), between_epochs(run))
    if not (steps and size and size > 0):
        return pace
    pace.epochs = max(1, math.ceil(steps / size))
    pace.epoch = min(done // size + 1, pace.epochs)
    if pace.step_seconds and "time" in newest:
        at_end = newest is not run.start and logged > 0 and logged % size == 0  # not yet evaluated
        between = pace.between_epochs or 0.0
        # What should have come since the last line and has not is still ahead.
        log_every = finite(run.start.get("log_every")) or math.inf
        gone = min(max(0.0, now - newest["time"]), log_every * pace.step_seconds + at_end * between)
        pauses = (pace.epochs - logged // size + at_end) * between
        epoch_end = min(pace.epoch * size, steps)
        pace.run_left = max(0.0, (steps - logged) * pace.step_seconds + pauses - gone)
        pace.epoch_left = max(0.0, (epoch_end - logged) * pace.step_seconds - gone)
    return pace


def step_seconds(run):
    """Seconds per step, mean of the last 20 lines since the start; None before the first."""
    lengths = [e["step_seconds"] for e in run.recent_steps if finite(e.get("step_seconds"))]
    if len(lengths) > 2:
        lengths = lengths[1:]  # the first steps choose kernels, start workers and fill caches
    return mean(lengths[-20:])


def between_epochs(run):
    """Seconds from the end of an epoch to the last evaluation or saving there, since the start.

    The mean of the last 10 epochs, less one that is not over; None before the first.
    """
    ends = {e["step"]: e["time"] for e in run.since_start("epoch") if "time" in e}
    later = run.since_start("evaluation", "saved")
    last = {e["step"]: e["time"] for e in later if e["step"] in ends and "time" in e}
    trained = run.recent_steps[-1]["step"] if run.recent_steps else 0
    return mean([last.get(s, time) - time for s, time in ends.items() if s < trained][-10:])
