"""Whether a run lives, of what it died, how fast it goes and when it will be done.

All of it from what the run folder says (history.py), for a person. The process is looked for only
if it was started on this machine; on another the age of the last line tells.
"""

import socket
from typing import NamedTuple

import psutil

from monitoring.formatting import clock, duration, sizes

RUNNING, DONE, STOPPED = "running", "done", "stopped early"
CRASHED, DEAD, UNKNOWN = "crashed", "dead", "unknown"
SAME_PROCESS = 2.0  # seconds between two readings of when a process was created
SILENT = 3, 30.0  # intervals, and seconds, without a line before a run counts as dead
AHEAD = 60.0  # seconds by which another machine's clock may be ahead and still be believed
FULL = 0.9  # of memory; between two lines a process takes what is left
RESUME = "python train.py {} --resume"


class Verdict(NamedTuple):
    """What is known of a run's life.

    state: one of the words above; text: a sentence; notes: more of them, for a run that ended too
    early: of what, and what to do.
    """

    state: str
    text: str
    notes: tuple = ()


class RunHealth:
    """Tells whether a run lives; remembers since when its process is missing."""

    def __init__(self, run):
        self.run, self.missing_since = run, None

    def verdict(self, now):
        """The `Verdict` at a time, in seconds since 1970, by this machine's clock."""
        run = self.run
        endings = run.since_start("end", "stop", "crash")
        if endings:
            return _ended(run, endings[-1], now)
        lives, sign = self._lives(now)
        if lives is None:
            return Verdict(UNKNOWN, sign)
        if lives:
            return Verdict(RUNNING, sign)
        return Verdict(DEAD, f"ended without a word; {sign}", (*causes(run), *_advice(run, now)))

    def _lives(self, now):
        """(True, False or None, in words what tells)."""
        run, last = self.run, last_line(self.run)
        host = run.start.get("host") or last.get("host")
        pid = run.start.get("pid") or last.get("pid")
        sign = max((t for t in (last_sign(run), run.noticed) if t is not None), default=None)
        if pid is None and sign is None:
            logged = run.events or run.steps
            missing = "the log tells neither time nor process"
            return None, missing if logged else "nothing has been logged yet"
        silence = "–" if sign is None else duration(now - sign)
        interval = last.get("seconds") or (run.config.get("monitor") or {}).get("seconds")
        if host == socket.gethostname() and pid is not None:
            if _process_lives(pid, run.start.get("created")):
                self.missing_since = None
                return True, f"last line {silence} ago"
            self.missing_since = self.missing_since or now
            # A container may have the name of its machine, but numbers processes by itself.
            if run.noticed is not None and run.noticed > self.missing_since:
                return True, f"last line {silence} ago, of a process that is not seen from here"
            return False, f"there is no process {pid} on {host}, last line {silence} ago"
        if interval is None or sign is None:
            return None, f"last line {silence} ago; nothing tells how long silence is normal"
        if sign > now + AHEAD:
            return None, f"the clock of {host or 'its machine'} is {duration(sign - now)} ahead"
        if now - sign > SILENT[0] * interval + SILENT[1]:
            return False, f"no sign of life for {silence}"
        return True, f"last line {silence} ago"


def _process_lives(pid, created):
    """Whether there is this process, made at `created` (seconds since 1970), on this machine."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return created is None or abs(process.create_time() - created) <= SAME_PROCESS
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError):
        return False


def last_line(run):
    """The last line of system.jsonl that the started process wrote, {} without one."""
    pid = run.start.get("pid")
    mine = [line for line in run.lines if pid is None or line.get("pid") == pid]
    return mine[-1] if mine else {}


def last_sign(run):
    """When the run last wrote a line into either file, None if no line tells its time."""
    newest = [last_line(run), *run.events[-1:], *run.recent[-1:]]
    return max((e["time"] for e in newest if e.get("time") is not None), default=None)


# ---------------------------------------------------------------------------- how it ended


def _ended(run, event, now):
    when = f"at step {event.get('step', '–')}, {clock(event.get('time'), now)}"
    if event["event"] == "end":
        return Verdict(DONE, f"all steps done {when}")
    if event["event"] == "stop":
        text = f"{event.get('reason', 'no reason given')}, {when}"
        return Verdict(STOPPED, text, _advice(run, now))
    trace = [line for line in str(event.get("traceback") or "").splitlines() if "File " in line]
    where = (f"raised in {' '.join(trace[-1].split())}",) if trace else ()
    text = f"{event.get('error', 'no error given')}, {when}"
    return Verdict(CRASHED, text, (*where, *_advice(run, now)))


def _advice(run, now):
    """What to do, as a sentence in a tuple."""
    command = RESUME.format(run.folder / "config.yaml")
    saved = [e for e in run.events if e["event"] == "saved" and "last" in str(e.get("file"))]
    if saved:
        when = clock(saved[-1].get("time"), now)
        return (f"{command} goes on from step {saved[-1].get('step')}, saved {when}",)
    try:
        written = (run.folder / "checkpoints" / "last.pt").stat().st_mtime
    except OSError:
        return ("no state was saved: start it again",)
    return (f"{command} goes on from the state of {clock(written, now)}",)


def causes(run):
    """Of what a run probably died that wrote nothing about it: sentences, the surest first."""
    last = last_line(run)
    found = [*_fault(run), *_killer(run, last), *_memory(last), *_disk(run, last), *_gpus(last)]
    found = _restart(run) or found
    return found or ["killed from outside (SIGKILL), or the machine went down"]


def _restart(run):
    """That this machine, if it is the run's, was started after the run's last line."""
    sign, booted = last_sign(run), psutil.boot_time()
    if run.start.get("host") != socket.gethostname() or sign is None or booted <= sign:
        return []
    return [f"the machine went down: it was started at {clock(booted, sign)}, after the last line"]


def _fault(run):
    """What faulthandler wrote, if it was since the last start."""
    if not run.fault or (run.fault_time or 0) < (run.start.get("time") or 0):
        return []
    lines = [line.strip() for line in run.fault.splitlines() if line.strip()]
    current = next((i for i, line in enumerate(lines) if line.startswith("Current thread")), 0)
    where = next((line for line in lines[current:] if line.startswith("File ")), None)
    return [lines[0] + (f", in {where}" if where else "") + " (fault.txt)"]


def _killer(run, last):
    first = run.first_line() or {}
    before, after = first.get("oom_kills"), last.get("oom_kills")
    if before is None or after is None or after <= before:
        return []
    many = "a process" if after - before == 1 else f"{after - before} processes"
    return [f"the kernel's OOM killer: it has ended {many} of this cgroup since the start"]


def _memory(last):
    """That a limit was all but reached; run.memory_gb is none for which the kernel kills."""
    rooms = [room for room in last.get("rooms") or () if room[2] != "run.memory_gb" and room[1]]
    if not rooms:
        return []
    free, total, what = min(rooms, key=lambda room: room[0])
    if total - free < FULL * total and (last.get("tree") or 0) < FULL * total:
        return []
    taken, tree = sizes(total - free, total), sizes(last.get("tree"), total)
    return [
        f"probably the kernel's OOM killer: {taken} were taken ({what}), {tree} by this run; "
        "fewer training.workers or a smaller data.cache_gb take less"
    ]


def _disk(run, last):
    free, total = last.get("disk") or (None, None)
    told = [e for e in run.since_start("trouble")[-3:] if e.get("kind") == "disk"]
    if told:
        return [f"the disk: {told[-1].get('text', 'trouble with it')}"]
    if free is not None and free < 0.005 * total:
        return [f"the disk was full: {sizes(free, total)} were free"]
    return []


def _gpus(last):
    return [
        f"memory of GPU {gpu.get('index')} was full: {sizes(gpu['used'], gpu['total'])}"
        for gpu in last.get("gpus") or ()
        if gpu.get("used") and gpu.get("total") and gpu["used"] > 0.97 * gpu["total"]
    ]


# ---------------------------------------------------------------------------- how fast it goes


class Pace(NamedTuple):
    """Steps and seconds; None for what the log does not tell.

    step of steps: done of the whole run; in_epoch of iterations: of this epoch; epoch of epochs,
    counted from 1; seconds: of a step; epoch_left, run_left: seconds; between: of an evaluation
    and whatever else comes between two epochs, which run_left counts.
    """

    step: int
    steps: int | None
    in_epoch: int | None
    iterations: int | None
    epoch: int | None
    epochs: int | None
    seconds: float | None
    epoch_left: float | None
    run_left: float | None
    between: float | None


def pace(run, now):
    """The `Pace` of a run at a time, in seconds since 1970."""
    logged, moment, at_end = _position(run)
    step = max(logged, last_line(run).get("step") or 0)
    steps, iterations = _planned(run)
    seconds, between = step_seconds(run), between_epochs(run)
    epoch = in_epoch = epochs = epoch_left = run_left = None
    if iterations:
        epochs = None if steps is None else max(1, -(-steps // iterations))
        epoch = min(step // iterations + 1, epochs or step // iterations + 1)
        in_epoch = step - (epoch - 1) * iterations
    if steps and epochs and seconds and moment:
        ends = epochs - logged // iterations + at_end
        gone = max(0.0, now - moment)
        if run.start.get("log_every"):  # what should have come by now and has not is still ahead
            gone = min(gone, run.start["log_every"] * seconds + at_end * (between or 0.0))
        run_left = max(0.0, (steps - logged) * seconds + ends * (between or 0.0) - gone)
        epoch_left = max(0.0, (min(epoch * iterations, steps) - logged) * seconds - gone)
    return Pace(
        step, steps, in_epoch, iterations, epoch, epochs, seconds, epoch_left, run_left, between
    )


def _position(run):
    """(step, time, whether an epoch ended there) of the newest line of a step or an epoch."""
    trained, ended = run.recent[-1:] or [{}], run.since_start("epoch")[-1:] or [{}]
    newest = max(trained[0], ended[0], key=lambda e: e.get("time") or 0) or run.start
    step, (_, iterations) = newest.get("step") or 0, _planned(run)
    at_end = bool(iterations and step and step % iterations == 0)
    return step, newest.get("time"), at_end and newest is not run.start


def _planned(run):
    """(steps in all, steps of an epoch) by the log, else by the settings; None if unknown."""
    training = run.config.get("training") or {}
    iterations = run.start.get("iterations") or training.get("train_iterations_per_epoch")
    steps = run.start.get("steps")
    if steps is None and iterations and training.get("max_epochs"):
        steps = training["max_epochs"] * iterations
        if training.get("max_steps") is not None:
            steps = min(steps, training["max_steps"])
    return steps, iterations


def step_seconds(run):
    """Seconds per step, mean of the last 20 lines since the start; None before the first."""
    lengths = [e["step_seconds"] for e in run.recent if e.get("step_seconds") is not None]
    if len(lengths) > 2:
        lengths = lengths[1:]  # the first steps choose kernels, start workers and fill caches
    lengths = lengths[-20:]
    return sum(lengths) / len(lengths) if lengths else None


def between_epochs(run):
    """Seconds from the end of an epoch to the last evaluation or saving there.

    The mean of the last 10 epochs, less one that is not over; None before the first.
    """
    lengths, ended = [], {}
    for event in run.events:
        if event.get("time") is None:
            continue
        if event["event"] == "epoch":
            lengths.append(0.0)
            ended = event
        elif event["event"] in ("evaluation", "saved") and event["step"] == ended.get("step"):
            lengths[-1] = event["time"] - ended["time"]
        elif event["event"] == "start":
            ended = {}
    trained = run.recent[-1]["step"] if run.recent else 0
    if ended and trained <= ended["step"]:
        lengths = lengths[:-1]
    return sum(lengths[-10:]) / len(lengths[-10:]) if lengths else None


# ---------------------------------------------------------------------------- how good it is


def evaluations(run):
    """[(step, {name: score})] of all evaluations that have scores, oldest first."""
    found = [e for e in run.events if e["event"] == "evaluation" and e.get("scores")]
    return [(e.get("step"), e["scores"]) for e in found if isinstance(e["scores"], dict)]


def best_score(run, name):
    """(value, step) of the best among all evaluations, by what is better of that score.

    (None, None) where there is none, as for counts.
    """
    end = better_end(name)
    found = [(scores.get(name), step) for step, scores in evaluations(run)]
    found = [pair for pair in found if isinstance(pair[0], int | float)]
    if end is None or not found:
        return None, None
    return (min if end == "lower" else max)(found, key=lambda pair: pair[0])


def better_end(name):
    """Which end of a score or loss is better, higher or lower; None: neither."""
    from scoring import metrics  # late: nothing else here needs it

    if name.endswith("_loss"):
        return "lower"
    try:
        return metrics.entry(name)[0].better
    except ValueError:  # of another version
        return "higher"
