"""The memory guard: near a limit, a run frees what it can do without before it is killed.

First the cache of case files, then one worker after the other, then the run stops with its state
saved. Limits are those of the machine, of every cgroup around the process, and `run.memory_gb`.
"""

import ctypes
import gc
import os
import time

from monitoring import machine

SHARE = 0.05  # of a limit that stays free,
MOST = machine.GB  # but not more than this
LOOK = 1.0  # seconds between two looks
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
ADVICE = (
    "lower data.cache_gb, training.workers, training.train_batch_size or sampling.patch, or give "
    "the run more memory"
)


class MemoryGuard:
    """Looks at the memory of a run and acts on it; see also `keep_freed`.

    cache: a `cache.VolumeCache`; limit: bytes that all processes of the run may take, or None;
    report(kind, text, **figures) is called with everything that is freed.
    """

    def __init__(self, cache, *, limit, report):
        self.cache, self.limit, self.report = cache, limit, report
        self.freed_cache, self.looked = False, 0.0
        keep_freed()

    def look(self, batches):
        """Why the run must stop, or None. At most once a second, some 0.3 ms.

        batches: a `data.Batches`, whose workers are dropped if that is needed.
        """
        if time.monotonic() - self.looked < LOOK:
            return None
        try:
            return self._relieve(batches)
        finally:
            self.looked = time.monotonic()

    def _relieve(self, batches):
        tight = self.tightest(batches)
        if tight is not None and not self.freed_cache:
            self.freed_cache = True
            freed = machine.format_bytes(self.cache.shrink(0))
            self._report(tight, f"the cache gives back {freed} and keeps nothing more")
            tight = self.tightest(batches)
        while tight is not None and batches.workers:
            batches.drop_worker()
            self._report(tight, f"one worker is ended, {len(batches.workers) or 'none'} left")
            tight = self.tightest(batches)
        if tight is not None:  # another process may take the memory, and only for a moment
            release()
            time.sleep(LOOK)
            tight = self.tightest(batches)
        return None if tight is None else f"memory is short: {tight}; {ADVICE}"

    def tightest(self, batches):
        """The `machine.MemoryLimit` that is nearly used up, the least of several, or None."""
        limits = machine.rooms()
        if self.limit is not None:
            pids = [os.getpid(), *(worker.pid for worker in batches.workers)]
            free = max(0, self.limit - machine.resident_memory(pids))
            limits.append(machine.MemoryLimit(free, self.limit, "run.memory_gb"))
        return nearly_used_up(limits)

    def _report(self, limit, text):
        text = f"memory is short: {limit}: {text}"
        self.report("memory", text, free=limit.free, limit=limit.total)


def nearly_used_up(limits):
    """The one of some `machine.MemoryLimit` that leaves least, of those that leave too little."""
    return min((x for x in limits if x.free < min(SHARE * x.total, MOST)), default=None)


def keep_freed():
    """Let memory that a step has freed be there for the next one, until `release` or the end.

    By default glibc gives most of it back to the system after each step, which clears it page by
    page when it is asked for again: 3 to 15 % of a step on a CPU.
    """
    set_option = getattr(_c_library(), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes: larger ones are mapped
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def release():
    """Give the system what Python and the C library keep for later, where they can be asked."""
    gc.collect()
    trim = getattr(_c_library(), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _c_library():
    return ctypes.CDLL(None) if os.name == "posix" else None
