"""The files of a run folder, read while they grow, however long they have become.

    run = History("runs/exp001")
    run.refresh(time.time())                     # again and again: reads what is new
    run.events, run.steps, run.recent            # of log.jsonl
    run.lines, run.samples                       # of system.jsonl

Of log.jsonl every line is looked at, for any may tell of trouble, but of the many lines of steps a
sample is parsed; of system.jsonl the end and a sample are read. Lines that are broken or cut short
are left out, and a file that is missing is an empty one.
"""

import json
import math
import os
from collections import deque
from pathlib import Path

import yaml

RECENT = 100  # of the lines of steps, and of system.jsonl, the newest that are kept
SAMPLE = 800  # lines that stand for all there are, at most
TAIL = 2**18  # bytes at the end of system.jsonl that are read at first
STEP = b'{"event": "step"'  # how runlog.py begins the line of a step


class History:
    """What a run folder says, as of the last `refresh`; its files are only ever read.

    events    events of log.jsonl but steps, oldest first; evaluations without their "cases"
    start     the last "start" among them, {} without one
    steps     every n-th step event, n so that they are at most 800, and the newest
    recent    the last 100 of them since the run was started, or resumed
    lines     the last 100 lines of system.jsonl
    samples   lines of all of it, at most 1600
    config    config.yaml, nested dicts
    fault     the text of fault.txt, and fault_time, when it was written; "" and None without
    noticed   when a line last came in after the first refresh, by the clock of this machine, or
              None
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.log = Growing(self.folder / "log.jsonl")
        self.system = Growing(self.folder / "system.jsonl", tail=TAIL)
        self.noticed, self.complete = None, False
        self.lines, self.samples = deque(maxlen=RECENT), []
        self._forget()

    def _forget(self):
        self.events, self.start, self._begin, self.config = [], {}, 0, {}
        self._steps, self._recent, self.recent = Thinned(SAMPLE), deque(maxlen=RECENT), []

    def refresh(self, now):
        """Read what has come since the last time; now: seconds since 1970."""
        came = self._read_log() + self._read_system()
        if came and self.complete:
            self.noticed = now
        self.complete = True
        self.recent = [event for line in self._recent if (event := event_of(line)) is not None]
        self.config = self.config or _settings(self.folder / "config.yaml")
        self.fault, self.fault_time = _text(self.folder / "fault.txt")

    @property
    def steps(self):
        kept, newest = self._steps.kept, self.recent[-1:]
        return kept if kept[-1:] == newest else kept + newest

    def since_start(self, *kinds):
        """The events of these kinds that came after the last start, oldest first."""
        return [event for event in self.events[self._begin :] if event["event"] in kinds]

    def first_line(self):
        """The first line of system.jsonl that the process of the last start wrote, or None."""
        created = self.start.get("created") or self.start.get("time")
        line = None if created is None else first_since(self.system.path, created - 2)
        return line if line and line.get("pid") == self.start.get("pid") else None

    def _read_log(self):
        """How many lines there were to read."""
        if self.log.replaced():  # a resumed run writes its log anew
            self._forget()
        count = 0
        for line in self.log.lines():
            count += 1
            if line.startswith(STEP):
                self._steps.add(line)
                self._recent.append(line)
            elif (event := event_of(line)) is not None:
                self._note(event, line)
        return count

    def _note(self, event, line):
        if event["event"] == "step":  # in other words than usual
            self._steps.add(line)
            self._recent.append(line)
            return
        event.pop("cases", None)  # many, and nobody looks at them here
        self.events.append(event)
        if event["event"] == "start":
            self.start, self._begin = event, len(self.events)
            self._recent.clear()

    def _read_system(self):
        if fresh := self.system.replaced():
            self.lines.clear()
            self.samples = sample(self.system.path, SAMPLE)
        count = 0
        for line in self.system.lines():
            count += 1
            if (content := line_of(line)) is None:
                continue
            self.lines.append(content)
            if not fresh:
                self.samples.append(content)
        if len(self.samples) > 2 * SAMPLE:
            self.samples = self.samples[::2]
        return count


# ---------------------------------------------------------------------------- lines of JSON


class Growing:
    """The whole lines of a file that others append to.

    tail: begin so many bytes before the end that the file has at first.
    """

    def __init__(self, path, tail=None):
        self.path, self.tail = Path(path), tail
        self.identity, self.offset = None, 0

    def replaced(self):
        """Whether this is another file than before; `lines` then begins anew."""
        try:
            found = os.stat(self.path)
        except OSError:  # not there yet, or a server that is away for a while
            return False
        identity = (found.st_dev, found.st_ino)
        if identity == self.identity and found.st_size >= self.offset:
            return False
        self.identity, self.offset = identity, 0
        if self.tail is not None and found.st_size > self.tail:
            self.offset = found.st_size - self.tail  # the first line is cut, and left out
        return True

    def lines(self):
        """Those that have come since the last call, as bytes; one without its end is not one."""
        try:
            with open(self.path, "rb", buffering=2**20) as file:
                file.seek(self.offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self.offset += len(line)
                    yield line
        except OSError:
            return


class Thinned:
    """Every n-th event of many lines: the first, and n as small as `most` of them allow."""

    def __init__(self, most):
        self.most, self.every, self.seen, self.kept = most, 1, 0, []

    def add(self, line):
        if self.seen % self.every == 0 and (event := event_of(line)) is not None:
            self.kept.append(event)
            if len(self.kept) > self.most:
                self.kept, self.every = self.kept[::2], 2 * self.every
        self.seen += 1


def parse(line):
    """The JSON object of a line, None if there is none."""
    try:
        content = json.loads(line)
    except ValueError:  # broken, or no text
        return None
    return content if isinstance(content, dict) else None


def event_of(line):
    """The event of a line of log.jsonl, None if it is broken; only its "time" may be missing."""
    event = parse(line) or {}
    known = isinstance(event.get("event"), str) and isinstance(event.get("step"), int)
    return event if known and isinstance(event.get("time", 0), int | float) else None


def line_of(line):
    """The object of a line of system.jsonl, None if it is broken."""
    content = parse(line) or {}
    return content if isinstance(content.get("time"), int | float) else None


def sample(path, count):
    """Up to `count` objects of lines that lie evenly over a system.jsonl, the first included."""
    found, reached = [], -1
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for number in range(count):
                offset = size * number // count
                file.seek(offset)
                if offset:
                    file.readline()
                if file.tell() > reached:
                    reached = file.tell()
                    found.append(line_of(file.readline()))
    except OSError:
        pass
    return [content for content in found if content is not None]


def first_since(path, moment):
    """The first object of a file, in order of "time", that is of this moment or later; or None."""
    try:
        with open(path, "rb") as file:
            low, high = 0, file.seek(0, os.SEEK_END)
            while high - low > 2**14:  # down to a few lines
                middle = (low + high) // 2
                file.seek(middle)
                file.readline()  # the rest of a line
                start, found = _next_object(file, high)
                if found is not None and found["time"] < moment:
                    low = start
                else:
                    high = middle
            file.seek(low)
            found = {"time": -math.inf}
            while found is not None and found["time"] < moment:
                _, found = _next_object(file, math.inf)
            return found
    except OSError:
        return None


def _next_object(file, end):
    """(offset, object) of the next whole line before offset `end`; (end, None) without one."""
    while (start := file.tell()) < end and (line := file.readline()):
        if (content := line_of(line)) is not None:
            return start, content
    return end, None


# ---------------------------------------------------------------------------- other files


def _settings(path):
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(path):
    """(text, time of writing) of a small file; ("", None) if it is empty or missing."""
    try:
        with open(path, errors="replace") as file:
            text = file.read(2**14)
            return (text, os.fstat(file.fileno()).st_mtime) if text.strip() else ("", None)
    except OSError:
        return "", None
