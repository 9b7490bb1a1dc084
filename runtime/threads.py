"""How many CPU threads compute, and why."""

import os

import psutil
import torch

from monitoring.machine import attempt
from volumes.processes import cores, cores_and_reason


def use_threads(asked, ranks=1):
    """Compute with `asked` threads (run.threads), or, if it is 0, with OMP_NUM_THREADS, or share
    the cores that this process may use among the ranks of this machine.

    Others' load changes nothing: the same run would give other digits on another day.
    """
    torch.set_num_threads(asked or of_environment(ranks) or max(1, cores() // ranks))


def of_environment(ranks=1):
    """OMP_NUM_THREADS as a number, 0 if it says nothing; not the 1 that torchrun gives to ranks."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # of nested levels
    number = int(text) if text.isdecimal() else 0
    return 0 if ranks > 1 and number == 1 else number


def describe(asked, ranks):
    """How many threads there are, why, and whether others use the machine: a line for people."""
    (count, reason), load = cores_and_reason(), attempt(psutil.getloadavg)
    reason = f"{reason}, for {ranks} ranks" if ranks > 1 else reason
    if given := asked or of_environment(ranks):
        reason = "run.threads" if asked else "OMP_NUM_THREADS"
    text = f"threads    {torch.get_num_threads()} of the CPU ({reason})"
    if not given and load and load[0] > count / 2:
        text += f"; other work keeps {load[0]:.1f} cores busy: a smaller run.threads may be faster"
    return text
