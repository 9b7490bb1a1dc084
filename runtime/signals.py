"""Why a run stops early: a signal, a file named `stop` in its folder, or its time is up.

with Stop(max_hours=8) as stop:
    stop.look_for(run_folder / "stop")
    while training:
        ...                          # a step
        if stop.reason(): save and leave
"""

import contextlib
import signal
import threading
import time
from pathlib import Path

from volumes.processes import STOP_SIGNALS

LOOK = 1.0  # seconds between two looks for the file: in a shared folder each costs milliseconds


class Stopped(Exception):
    """The run must stop; the message says why."""


class CannotGoOn(Exception):
    """The run cannot go on, but its state is good and can be saved; the message says why."""


class Stop:
    """Records a reason to stop. As a context, in which the signals do no more than that.

    A second SIGINT (Ctrl-C) raises KeyboardInterrupt at once. SIGHUP stays ignored if it is, as
    under nohup. max_hours: counted from here; None: no limit. A Stop inside the context of another
    one knows the signals that came before it.
    """

    def __init__(self, max_hours=None):
        self.file, self.hours = None, max_hours
        self.started, self.looked = time.monotonic(), 0.0
        self.why, self.handlers = None, {}

    def look_for(self, file):
        """From now on a file of this name is a reason. One that is there already is removed."""
        self.file = Path(file)
        self.file.unlink(missing_ok=True)

    def reason(self):
        """Why the run must stop, or None; once there is a reason it stays."""
        now = time.monotonic()
        if self.why is None and self.hours and now - self.started > 3600 * self.hours:
            again = "counted anew after --resume, null: no limit"
            self.why = f"its time is up (training.max_hours={self.hours:g}, {again})"
        if self.why is None and self.file is not None and now - self.looked > LOOK:
            self.looked = now
            if self.file.exists():
                self.file.unlink(missing_ok=True)  # or it would stop the resumed run too
                self.why = f"the file {self.file} was there"
        return self.why

    def _note(self, number, frame):
        if number == signal.SIGINT and self.why is not None:
            raise KeyboardInterrupt
        self.why = self.why or f"signal {signal.Signals(number).name}"

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other may take signals
            for number in STOP_SIGNALS:
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (ignored and signal.Signals(number).name == "SIGHUP"):
                    self.handlers[number] = signal.signal(number, self._note)
            for handler in self.handlers.values():
                outer = getattr(handler, "__self__", None)
                self.why = self.why or (outer.why if isinstance(outer, Stop) else None)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def listening():
    """A context for a whole script, with Stops in it.

    A signal that comes early stops the run in good order; one that comes late, when the state is
    saved and the interpreter ends, does not change the exit status.
    """
    with Stop() as stop:
        try:
            yield
        finally:
            for number in stop.handlers.keys() - {signal.SIGINT}:
                stop.handlers[number] = signal.SIG_IGN  # any other is undone before the last moment
