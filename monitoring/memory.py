"""How much memory a process and its children take, and how much they may still take. Linux.

available().bytes        what may still be taken: of the host, and of every cgroup limit
rooms()                  the same, one limit after another
oom_kills()              how many processes of the cgroup the kernel has killed for memory
tree_memory()            what each process of the tree takes now, shared pages divided
resident_memory()        the same from cheaper numbers
shared_memory_free()     what is left of /dev/shm
anonymous_file()         memory that processes share, without /dev/shm
"""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import psutil

GB = 10**9


class MemoryLimit(NamedTuple):
    """One limit: bytes still free, bytes in all, and whose limit it is, for people."""

    free: int
    total: int
    what: str

    def __str__(self):
        return f"{format_bytes(self.free)} free of {format_bytes(self.total)}, {self.what}"


def format_bytes(size):
    """Bytes as people read them: 1.5 GB, 28 MB."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.0f} MB"


class Available(NamedTuple):
    """bytes: what may still be taken; reason: what sets that limit, for people."""

    bytes: int
    reason: str


def available(proc="/proc", cgroup="/sys/fs/cgroup"):
    """The `Available` of this process tree: the least of what the host and its cgroups leave."""
    least = min(rooms(proc, cgroup))
    return Available(least.free, str(least))


def rooms(proc="/proc", cgroup="/sys/fs/cgroup"):
    """The `MemoryLimit` of the host and of each cgroup around this process that has a limit.

    A cgroup leaves limit - usage, and its file cache on top: the kernel drops that before it kills.
    One that cannot be read is taken as none.
    """
    host = psutil.virtual_memory()
    found = [MemoryLimit(host.available, host.total, "memory of this machine")]
    for folder, read in _cgroups(Path(proc), Path(cgroup)):
        limit = read(folder)
        if limit is not None:
            found.append(MemoryLimit(*limit, "cgroup limit"))
    return found


def oom_kills(proc="/proc", cgroup="/sys/fs/cgroup"):
    """How many processes the kernel has killed since the cgroups of this process were made.

    None where no cgroup tells: outside of any, or by an old kernel.
    """
    files = {_v2_free: "memory.events", _v1_free: "memory.oom_control"}
    found = [
        count
        for folder, read in _cgroups(Path(proc), Path(cgroup))
        if (count := _statistics(folder / files[read], ("oom_kill",), None)) is not None
    ]
    return max(found, default=None)


def _cgroups(proc, root):
    """(folder, reader) of the cgroups that this process is in, those around them included."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.count(":") < 2:
            continue
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, read = root / "memory", _v1_free
        elif number == "0":
            # Beside version 1, version 2 is mounted one folder further down.
            mount, read = root / "unified" if (root / "unified").is_dir() else root, _v2_free
        else:
            continue
        # In a container the path may be the host's. Its folder is then missing here, and the
        # container's own limit stands in the root.
        inside = [part for part in path.split("/") if part]
        if ".." in inside:
            inside = []
        for depth in range(len(inside) + 1):
            yield mount.joinpath(*inside[:depth]), read


def _v2_free(folder):
    """(bytes free, limit) of a cgroup of version 2, or None where it has no limit."""
    # Above memory.high a process is not killed, but slowed until it all but stands.
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    limits = [limit for limit in limits if limit is not None]
    used = _number(folder / "memory.current")
    if not limits or used is None:
        return None
    cache = _statistics(folder / "memory.stat", ("inactive_file", "active_file"))
    return _free(min(limits), used, cache)


def _v1_free(folder):
    limit = _number(folder / "memory.limit_in_bytes")
    used = _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= 2**62:  # how version 1 says "no limit"
        return None
    names = ("total_inactive_file", "total_active_file")  # total: with the cgroups inside
    return _free(limit, used, _statistics(folder / "memory.stat", names))


def _free(limit, used, cache):
    return max(0, min(limit, limit - used + cache)), limit


def _number(path):
    """The number in a file; None where it says "max" or cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistics(path, names, otherwise=0):
    """Sum of some values of a file of lines "name value"; `otherwise` where there is none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return otherwise
    found = [words[1] for words in lines if len(words) == 2 and words[0] in names]
    found = [int(number) for number in found if number.isdecimal()]
    return sum(found) if found else otherwise


def tree_memory(pid=None, proc="/proc"):
    """{pid: bytes} of a process (default: this one) and all that descend from it.

    Proportional set size: a page that n processes map counts 1/n for each, so that the sum is what
    the tree takes. Where the kernel does not tell it (another user's process, another system) the
    resident size, which counts shared pages in full. Processes that have ended are left out.
    Takes some 10 ms per GB that is mapped.
    """
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    sizes = {process.pid: _memory(process, Path(proc)) for process in processes}
    return {number: size for number, size in sizes.items() if size is not None}


def _memory(process, proc):
    """Bytes of one process, None if it has ended."""
    try:
        lines = (proc / str(process.pid) / "smaps_rollup").read_text().splitlines()
    except ProcessLookupError:  # it ended between the opening and the reading
        return None
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return None


def resident_memory(pids=None):
    """Bytes that processes take together, from cheap numbers. pids: None for this one's tree.

    Each counts what it has for itself; what may be shared (libraries, the cache of `cache.py`,
    boxes on their way) counts once, as much as the process has that maps most of it. Takes
    microseconds per process, however large; finding those of the tree takes a millisecond.
    """
    own, shared = 0, 0
    for number in _tree() if pids is None else pids:
        try:
            found = psutil.Process(number).memory_info()
        except psutil.NoSuchProcess:
            continue
        mine = getattr(found, "shared", 0)  # Linux alone tells
        own, shared = own + found.rss - mine, max(shared, mine)
    return own + shared


def _tree():
    parent = psutil.Process()
    return [parent.pid, *(child.pid for child in parent.children(recursive=True))]


def shared_memory_free(path="/dev/shm"):
    """Bytes left in the file system of shared memory, None where there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def anonymous_file(size, name="lamina"):
    """Descriptor of a file in memory without a path, of zeros, there while any process has it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
