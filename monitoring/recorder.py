"""The thread by which a run records what its machine does.

with SystemMonitor(folder, seconds=10, roles=lambda: {pid: "training"}, step=lambda: step):
    ...                                         # a line in <folder>/system.jsonl every 10 s
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from monitoring.machine import Machine, attempt

LONGEST_CLOSE = 10.0  # seconds that leaving waits for a file system that does not answer


class SystemMonitor:
    """A thread that appends to <folder>/system.jsonl what the machine does, as a context.

    A line at once, one every `seconds`, and one when the context is left: a JSON object with

        time, host, pid    seconds since 1970; of the process that trains
        step               what step() gives
        seconds            from one line to the next: how long silence is normal
        ...                what `machine.Machine.read` says of roles() and memory_limit

    roles() and step() are called from the thread, and whatever goes wrong stays in it: a value that
    cannot be read is null, a line that the disk does not accept is left out. ValueError if seconds
    is not above 0.
    """

    def __init__(self, folder, *, seconds, roles, step, memory_limit=None):
        if not seconds > 0:
            raise ValueError(f"expected seconds between lines above 0, got {seconds}")
        self.path = Path(folder) / "system.jsonl"
        self.seconds, self.roles, self.step = seconds, roles, step
        self.memory_limit, self.machine = memory_limit, Machine(folder)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="system monitor", daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.thread.join(LONGEST_CLOSE)

    def _watch(self):
        self._write_line()
        while not self.closing.wait(self.seconds):
            self._write_line()
        self._write_line()

    def _write_line(self):
        with contextlib.suppress(Exception):  # a monitor must not end a training
            self._write(self._line())

    def _line(self):
        return {
            "time": round(time.time(), 3),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": attempt(self.step),
            **self.machine.read(attempt(self.roles) or {}, self.memory_limit),
            "seconds": self.seconds,
        }

    def _write(self, content):
        line = json.dumps(content).encode() + b"\n"
        # Opened anew: a disk that was full, or a server that was away, may be back.
        with open(self.path, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read(1) not in (b"", b"\n"):
                line = b"\n" + line  # after one that a crash of the machine cut short
            if file.write(line) != len(line):  # a disk that has become full accepts a part
                file.truncate(end)
