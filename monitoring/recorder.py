"""The thread by which a run records what its machine does, in <folder>/system.jsonl."""

import os
import socket
import threading
import time
from pathlib import Path

from monitoring.machine import Machine, attempt
from monitoring.records import append_line

LONGEST_CLOSE = 10.0  # seconds that leaving waits for a file system that does not answer


class SystemMonitor:
    """A thread that appends what the machine does to <folder>/<name>, as a context.

    A line at once, one every `seconds`, and one at the end: a JSON object of time (since 1970),
    host, pid, what step() gives, seconds, and `machine.Machine.read` of roles() and memory_limit.
    A value that cannot be read is null, a line that the disk does not accept is left out.
    ValueError if seconds is not above 0.
    """

    def __init__(self, folder, name="system.jsonl", *, seconds, roles, step, memory_limit=None):
        if not seconds > 0:
            raise ValueError(f"expected seconds between lines above 0, got {seconds}")
        self.path = Path(folder) / name
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
        attempt(lambda: self._write(self._line()))  # a monitor must not end a training
        while not self.closing.wait(self.seconds):
            attempt(lambda: self._write(self._line()))
        attempt(lambda: self._write(self._line()))

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
        # Opened anew: a disk that was full, or a server that was away, may be back.
        with open(self.path, "a+b", buffering=0) as file:
            append_line(file, content)
