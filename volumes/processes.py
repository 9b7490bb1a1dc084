"""Processes: how a script meets its terminal, and those that work for another one."""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker

NO_MEMORY = 12  # exit status of a process that got no memory
# Schedulers send SIGTERM and SIGUSR1 before a job's time ends; SIGHUP says the terminal is gone.
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # Windows has the first two
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


# ---------------------------------------------------------------------------- a script's own


class Output:
    """A text stream that falls silent where nobody takes it any more: a closed terminal or pipe, a
    full disk. The work that says something is not to end for that."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self._try("write", text)
        return len(text)

    def flush(self):
        self._try("flush")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _try(self, method, *arguments):
        try:
            getattr(self.stream, method)(*arguments)
        except OSError as error:
            # What it still holds goes nowhere, too, or the interpreter would fail at its end.
            with contextlib.suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if error.errno == errno.ENOSPC:  # who closes a pipe or a terminal knows it
                print(f"standard output: {error.strerror}; it shows no more", file=sys.stderr)


def run_script(main):
    """Leave Python with the exit status that main() returns, which says what became of the work,
    whoever reads its output. A character that the terminal does not know is shown as an escape."""
    if sys.getfilesystemencoding() != "utf-8":  # the locale C: names of files would lose characters
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the process began
            stream = open(os.devnull, "w", encoding="utf-8")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Output(stream))
    sys.exit(main())


# ---------------------------------------------------------------------------- workers


def cores():
    """The CPU cores that this process may use; not every system tells them from all cores."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def start_worker(*_):
    """Called first in a spawned process: it ends with its parent, even if that is killed, and where
    memory runs out, the kernel kills it before the parent."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as file:
        file.write(b"500")


@contextlib.contextmanager
def signals_blocked(signals):
    """In this context signals do not reach this process, nor ever those that start in it.

    One that is sent to a whole process group is for the parent to handle. Where the system has no
    masks (Windows), nothing is changed.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        resource_tracker.ensure_running()  # when it starts, it unblocks SIGINT and SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def describe_death(code):
    """What an exit status says of how a process ended, for people: "was killed by SIGKILL"."""
    if code == NO_MEMORY:
        return "could not get the memory it asked for"
    if code >= 0:
        return f"ended with exit status {code}"
    names = {-number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(code, f'signal {-code}')}"
