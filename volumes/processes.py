"""Processes that work for another one: how many, how they end with it, and how they died."""

import contextlib
import multiprocessing
import os
import signal
import threading

NO_MEMORY = 12  # exit status of a process that got no memory


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
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def describe_death(code):
    """What an exit status says of how a process ended, for people: "was killed by SIGKILL"."""
    if code == NO_MEMORY:
        return "could not get the memory it asked for"
    if code >= 0:
        return f"ended with exit status {code}"
    names = {-number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(code, f'signal {-code}')}"
