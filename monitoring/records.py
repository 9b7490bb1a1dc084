"""The files of a run folder, read while they grow, however long they have become.

Each line is looked at once. Of the many steps and readings an even sample is parsed and kept, and
the newest. Broken lines are passed over, and a missing file is an empty one.
"""

import contextlib
import json
import os
from collections import deque
from pathlib import Path

from monitoring.formatting import finite

RECENT = 100  # newest steps and readings that are kept
SAMPLE = 800  # steps and readings that stand for all there are, at most
STEP = b'{"event": "step"'  # how runtime/log.py begins the line of a step
LATEST = 1e11  # seconds since 1970: a time that is later is a broken one


class RunRecords:
    """What a run folder says, as of the last `refresh`; its files are only ever read.

    events           events of log.jsonl but steps, oldest first; evaluations without their "cases"
    start            the last "start" among them, {} without one
    steps            every n-th step event, n so that they are at most 800, and the newest
    recent_steps     the last 100 of them since the run was started, or resumed
    readings         lines of system.jsonl, sampled like steps
    recent_readings  its last 100 lines
    growth_time      when a line last came in after the first refresh, by our clock, or None
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.log = GrowingFile(self.folder / "log.jsonl")
        self.system = GrowingFile(self.folder / "system.jsonl")
        self._steps, self._readings = Sample(parse_event), Sample(parse)
        self.offsets = self.growth_time = None
        self.events, self.start, self.start_index = [], {}, 0

    def refresh(self, now):
        """Read what has come since the last time; now: seconds since 1970."""
        if self.log.replaced():  # a resumed run writes its log anew
            self._steps = Sample(parse_event)
            self.events, self.start, self.start_index = [], {}, 0
        for line in self.log.new_lines():
            self._add(line)
        if self.system.replaced():
            self._readings = Sample(parse)
        for line in self.system.new_lines():
            self._readings.add(line)
        offsets = self.log.offset, self.system.offset
        if self.offsets not in (None, offsets):
            self.growth_time = now
        self.offsets = offsets
        self.steps, self.recent_steps = self._steps.all(), self._steps.recent()
        self.readings, self.recent_readings = self._readings.all(), self._readings.recent()

    def _add(self, line):
        if line.startswith(STEP):
            self._steps.add(line)
        elif (event := parse_event(line)) is not None:
            event.pop("cases", None)  # many, and never shown
            self.events.append(event)
            if event["event"] == "start":
                self.start, self.start_index = event, len(self.events)
                self._steps.newest.clear()

    def since_start(self, *kinds):
        """The events of these kinds that came after the last start, oldest first."""
        return [event for event in self.events[self.start_index :] if event["event"] in kinds]

    @property
    def reading(self):
        """The last reading by the process of the last start, {} without one."""
        pid = self.start.get("pid")
        own = [r for r in self.recent_readings if pid is None or r.get("pid") == pid]
        return own[-1] if own else {}

    @property
    def evaluations(self):
        """[(step, {name: score})] of all evaluations that have scores, oldest first."""
        events = [e for e in self.events if e["event"] == "evaluation" and e.get("scores")]
        return [(e["step"], e["scores"]) for e in events if isinstance(e["scores"], dict)]

    def best(self, name):
        """(value, step) of the best of a score; (None, None) if the log says not what is better."""
        better = (self.start.get("better") or {}).get(name)
        pairs, measured = [], None
        for event in self.events:
            if event["event"] == "start" and event.get("measured") not in (None, measured):
                # From here on a score means something else than before, or is logged to.
                pairs, measured = pairs if measured is None else [], event["measured"]
            elif event["event"] == "evaluation" and isinstance(event.get("scores"), dict):
                pairs.append((finite(event["scores"].get(name)), event["step"]))
        pairs = [pair for pair in pairs if pair[0] is not None]
        if name != self.start.get("score"):  # an untrained network's mask of a few voxels is chance
            pairs = [pair for pair in pairs if pair[1] > 0] or pairs
        if better not in ("higher", "lower") or not pairs:
            return None, None
        return (max if better == "higher" else min)(pairs, key=lambda pair: pair[0])


def few_names(names, main):
    """Those of some names of scores that a person is shown, in their order.

    Of several classes the mean of each score (dice/mean), and the main one of every class, too.
    """
    base = str(main).partition("/")[0]
    return [
        name
        for name in names
        if name.partition("/")[0] == base
        or name.endswith("/mean")
        or f"{name.partition('/')[0]}/mean" not in names
    ]


class GrowingFile:
    """The whole lines of a file that others append to, or replace."""

    def __init__(self, path):
        self.path, self.identity, self.offset = path, None, 0

    def replaced(self):
        """Whether this is another file than before; `new_lines` then begins anew."""
        try:
            status = os.stat(self.path)
        except OSError:  # not there yet, or a server that is away for a while
            return False
        identity = (status.st_dev, status.st_ino)
        if identity == self.identity and status.st_size >= self.offset:
            return False
        self.identity, self.offset = identity, 0
        return True

    def new_lines(self):
        """Those that have come since the last call, as bytes; one without its end must wait."""
        with contextlib.suppress(OSError), open(self.path, "rb", buffering=2**20) as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield line


class Sample:
    """Every n-th of many lines, parsed, n as small as SAMPLE of them allow; and the newest."""

    def __init__(self, parse):
        self.parse, self.every, self.count = parse, 1, 0
        self.kept, self.newest = [], deque(maxlen=RECENT)

    def add(self, line):
        self.newest.append(line)
        if self.count % self.every == 0 and (content := self.parse(line)) is not None:
            self.kept.append(content)
            if len(self.kept) > SAMPLE:
                self.kept, self.every = self.kept[::2], 2 * self.every
        self.count += 1

    def recent(self):
        return [content for line in self.newest if (content := self.parse(line)) is not None]

    def all(self):
        newest = self.recent()[-1:]
        return self.kept if self.kept[-1:] == newest else self.kept + newest


def parse_event(line):
    """The event of a line of log.jsonl, None if it is broken; its "time" may be missing."""
    event = parse(line) or {}
    known = isinstance(event.get("event"), str) and isinstance(event.get("step"), int)
    return event if known else None


def parse(line):
    """The object of a line, None if it is broken; its "time" may be missing."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        content = json.loads(line)
        if 0 <= content.get("time", 0) < LATEST:
            return content


def read_lines(path):
    """The objects of all lines of a file; broken ones are left out, and no file is an empty one."""
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else ()
    return [content for content in map(parse, lines) if content is not None]


def append_line(file, content):
    """Append an object as a line to a file that is open for "a+b" without a buffer.

    OSError if the disk does not take it; the file then ends as before.
    """
    line = json.dumps(content).encode() + b"\n"
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read(1) not in (b"", b"\n"):
        line = b"\n" + line  # after one that a kill cut short
    try:
        while line:
            line = line[file.write(line) :]
    except OSError:
        file.truncate(end)  # a full disk takes a part of a line
        raise


def peaks(readings):
    """(bytes, bytes) of lines of system.jsonl: the most that all processes of the run had in
    memory, and by which the memory in use of a GPU grew most (None without a GPU or a reading)."""
    gpus = zip(*([gpu["used"] or 0 for gpu in r.get("gpus") or ()] for r in readings), strict=False)
    grown = max((max(used) - used[0] for used in gpus), default=None)
    return max((reading.get("tree") or 0 for reading in readings), default=None), grown
