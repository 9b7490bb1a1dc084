"""What processes use of this machine, and how much they may still use: memory, load, GPUs.

Linux. On another system, outside of a container, or without sensors or a GPU, a reading is None or
an empty list; `Machine` never raises because something cannot be read.
"""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import psutil

from monitoring.formatting import format_bytes
from volumes.processes import cgroups

GB = 10**9


class MemoryLimit(NamedTuple):
    """One limit: bytes still free, bytes in all, and whose limit it is, for people."""

    free: int
    total: int
    what: str

    def __str__(self):
        return f"{format_bytes(self.free)} free of {format_bytes(self.total)}, {self.what}"


# Names of files of a memory cgroup: of its limits, usage, and events; of its cache in memory.stat.
# Above memory.high a process is not killed, but slowed until it nearly stands still.
MEMORY_FILES = {
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.oom_control",
        "total_inactive_file total_active_file",  # total: with the cgroups inside
    ),
    2: ("memory.max memory.high", "memory.current", "memory.events", "inactive_file active_file"),
}
UNLIMITED = 2**62  # from here on a number of version 1 means "no limit"


def available(proc="/proc", cgroup="/sys/fs/cgroup"):
    """The `MemoryLimit` of this process tree that leaves least, of the host and its cgroups."""
    return min(rooms(proc, cgroup))


def rooms(proc="/proc", cgroup="/sys/fs/cgroup"):
    """The `MemoryLimit` of the host and of each cgroup around this process that has a limit.

    A cgroup leaves limit - usage, and its file cache on top: the kernel drops that before it kills.
    A cgroup that cannot be read counts as none.
    """
    host = psutil.virtual_memory()
    limits = [MemoryLimit(host.available, host.total, "memory of this machine")]
    for folder, version in cgroups("memory", proc, cgroup):
        limit_names, usage, _, cache_names = MEMORY_FILES[version]
        total = min(_number(folder / name, UNLIMITED) for name in limit_names.split())
        used = _number(folder / usage, None)
        if total < UNLIMITED and used is not None:
            cache = _statistics(folder / "memory.stat", cache_names) or 0
            free = max(0, min(total, total - used + cache))
            limits.append(MemoryLimit(free, total, "cgroup limit"))
    return limits


def oom_kills(proc="/proc", cgroup="/sys/fs/cgroup"):
    """How many processes the kernel has killed since the cgroups of this process were made.

    None where no cgroup counts them: outside of any, or with an old kernel.
    """
    counts = [
        _statistics(folder / MEMORY_FILES[version][2], "oom_kill")
        for folder, version in cgroups("memory", proc, cgroup)
    ]
    return max((count for count in counts if count is not None), default=None)


def _number(path, otherwise):
    """The number in a file; `otherwise` where it says "max" or cannot be read."""
    number = attempt(lambda: int(path.read_text(encoding="ascii")))
    return otherwise if number is None else number


def _statistics(path, names):
    """Sum of some values of a file of lines "name value", None where there is none."""
    lines = [line.split() for line in (attempt(path.read_text) or "").splitlines()]
    values = [line[1] for line in lines if len(line) == 2 and line[0] in names.split()]
    numbers = [int(value) for value in values if value.isdecimal()]
    return sum(numbers) if numbers else None


def shared_memory_free(path="/dev/shm"):
    """Bytes left in the file system of shared memory, None where there is none."""
    space = attempt(_free_space, path)
    return None if space is None else space[0]


def resident_memory(pids=None):
    """Bytes that processes use together, from cheap numbers. pids: None for this one's tree.

    Each counts what it has for itself; what may be shared (libraries, the cache of case files)
    counts once, as much as the process has that maps most of it. Takes microseconds per process,
    however large; listing those of the tree takes a millisecond.
    """
    if pids is None:
        this = psutil.Process()
        pids = [process.pid for process in (this, *this.children(recursive=True))]
    own, shared = 0, 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            info = psutil.Process(pid).memory_info()
            own, shared = own + info.rss - _shared(info), max(shared, _shared(info))
    return own + shared


def peak_memory(proc="/proc"):
    """The most bytes that this process has used since it began; None where it is not known."""
    for line in (attempt(Path(proc, "self", "status").read_text) or "").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None


def _shared(info):
    return getattr(info, "shared", 0)  # Linux only


class Machine:
    """Readings of this machine, one after another; CPU percentages are since the one before.

    folder: of the file system that `disk` describes, None for none.
    """

    def __init__(self, folder=None):
        self.folder, self.known = folder, {}  # {pid: psutil.Process} of the last reading
        self.oom_kills_before = attempt(oom_kills)

    def read(self, roles, memory_limit=None):
        """What the machine does now. roles: {pid: name}; memory_limit: bytes that the run may use.

        processes      [{pid, role, rss: bytes, shared: those of them that others may use too, cpu:
                       percent of one core, None at first, status: a word of psutil}]
        tree           bytes that these processes use together; of none, this one and its children
        rooms          [bytes free, bytes in all, whose limit] of `rooms` and of memory_limit
        new_oom_kills  processes that the kernel has killed for memory since this object was made
        swap           [bytes used, in all]
        shm, disk      [bytes free, in all] of /dev/shm and of the folder's file system
        load, cores    means over 1, 5 and 15 minutes of processes that want the CPU; its cores
        gpus           see `gpus`
        """
        tree, kills = attempt(resident_memory, list(roles) or None), attempt(oom_kills)
        limits = [list(limit) for limit in attempt(rooms) or ()]
        if memory_limit is not None and tree is not None:
            limits.append([max(0, memory_limit - tree), memory_limit, "run.memory_gb"])
        return {
            "processes": self._processes(roles),
            "tree": tree,
            "rooms": limits,
            "new_oom_kills": None if kills is None else kills - (self.oom_kills_before or 0),
            "swap": attempt(lambda: [psutil.swap_memory().used, psutil.swap_memory().total]),
            "shm": attempt(_free_space, "/dev/shm"),
            "disk": self.folder and attempt(_free_space, self.folder),
            "load": attempt(lambda: [round(number, 2) for number in psutil.getloadavg()]),
            "cores": os.cpu_count(),
            "gpus": attempt(gpus) or [],
        }

    def _processes(self, roles):
        before, self.known, rows = self.known, {}, []
        for pid, role in roles.items():
            with contextlib.suppress(psutil.Error, OSError, ValueError):  # it has ended
                process = before.get(pid) or psutil.Process(pid)
                with process.oneshot():
                    info, cpu = process.memory_info(), round(process.cpu_percent(None), 1)
                    row = {"pid": pid, "role": role, "rss": info.rss, "shared": _shared(info)}
                    row |= {"cpu": cpu if pid in before else None, "status": process.status()}
                self.known[pid] = process
                rows.append(row)
        return rows


def gpus():
    """The GPUs of a process that uses CUDA, by CUDA's numbers; no value makes it use another one.

    A dict of each: index, name, used, total (bytes), load (%), temperature, power (W), and of this
    process alone the bytes that tensors take (allocated), have taken at most (max_allocated), and
    that it keeps for them (reserved). What a GPU does not report is None. torch reads used, load,
    temperature and power with nvidia-ml-py.
    """
    from torch import cuda

    readings = {
        "used": cuda.device_memory_used,
        "load": cuda.utilization,
        "temperature": cuda.temperature,
        "power": lambda index: round(cuda.power_draw(index) / 1000),  # of milliwatts
        "allocated": cuda.memory_allocated,
        "max_allocated": cuda.max_memory_allocated,
        "reserved": cuda.memory_reserved,
    }
    rows = []
    for index in range(cuda.device_count() if cuda.is_initialized() else 0):
        card = attempt(cuda.get_device_properties, index)
        row = {"index": index, "name": getattr(card, "name", None)}
        row["total"] = getattr(card, "total_memory", None)
        rows.append(row | {name: attempt(read, index) for name, read in readings.items()})
    return rows


def attempt(function, *arguments):
    """What a reading gives, None where it fails."""
    # Files and drivers that differ from machine to machine may raise anything.
    with contextlib.suppress(Exception):
        return function(*arguments)


def _free_space(path):
    usage = psutil.disk_usage(str(path))
    return [usage.free, usage.total]
