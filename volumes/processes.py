"""Processes: how a script meets its terminal, and those that work for another one."""

import contextlib
import errno
import math
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from multiprocessing import resource_tracker
from pathlib import Path

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


def command_of(script):
    """How to start a script of ours from the current folder, by the path of the running one."""
    root = Path(__file__).resolve().parents[1]
    folder = next(f for f in (Path(), Path(sys.argv[0]).parent, root) if f.resolve() == root)
    return f"python {shlex.quote(str(folder / script))}"


# ---------------------------------------------------------------------------- workers


def cores():
    """The CPU cores that this process may use."""
    return cores_and_reason()[0]


def cores_and_reason(proc="/proc", cgroup="/sys/fs/cgroup"):
    """(cores that this process may use, why so many): of the machine, those that its affinity
    allows, and the time that a quota of its cgroups leaves (of a container or a job)."""
    machine = os.cpu_count() or 1
    choices = [(machine, f"all {machine} cores")]
    if hasattr(os, "sched_getaffinity"):
        choices.append((len(os.sched_getaffinity(0)), f"CPU affinity, of {machine} cores"))
    for folder, version in cgroups("cpu", proc, cgroup):
        quota = _quota(folder, version)
        if quota is not None:
            choices.append((max(1, math.ceil(quota)), f"cgroup quota, of {machine} cores"))
    return min(choices, key=lambda choice: choice[0])  # of equal ones the first


def _quota(folder, version):
    """CPU seconds per second that a cgroup may use; None: no limit, or it cannot be read."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
            quota, period = ((folder / name).read_text(encoding="ascii") for name in names)
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None


def cgroups(controller, proc="/proc", root="/sys/fs/cgroup"):
    """(folder, 1 or 2) of the cgroups that this process is in, those around them included, with
    the version of the interface. controller: "memory" or "cpu". None where there are none."""
    try:
        lines = (Path(proc) / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    root = Path(root)
    for line in lines:
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controller in controllers.split(","):
            mount, version = root / controller, 1
        elif number == "0" and path:
            # Beside version 1, version 2 is mounted one folder further down.
            mount, version = root / "unified" if (root / "unified").is_dir() else root, 2
        else:
            continue
        # In a container the path may be the host's. Its folder is then missing here, and the
        # container's own limit stands in the root.
        names = [] if ".." in path.split("/") else path.strip("/").split("/")
        for depth in range(len(names) + 1):
            yield mount.joinpath(*names[:depth]), version


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
