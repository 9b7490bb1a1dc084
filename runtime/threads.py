"""How many CPU threads compute, and why."""

import psutil
import torch

from monitoring.machine import attempt
from volumes.processes import cores, cores_and_reason


def use_threads(asked, ranks=1):
    """Compute with `asked` threads (run.threads), or, if it is 0, share the cores that this process
    may use among the ranks of this machine.

    Others' load changes nothing: the same run would give other digits on another day.
    """
    torch.set_num_threads(asked or max(1, cores() // ranks))


def describe(asked, ranks):
    """How many threads there are, why, and whether others use the machine: a line for people."""
    (count, reason), load = cores_and_reason(), attempt(psutil.getloadavg)
    reason = "run.threads" if asked else f"{reason}, for {ranks} ranks" if ranks > 1 else reason
    text = f"threads    {torch.get_num_threads()} of the CPU ({reason})"
    if not asked and load and load[0] > count / 2:
        text += f"; other work keeps {load[0]:.1f} cores busy: a smaller run.threads may be faster"
    return text
