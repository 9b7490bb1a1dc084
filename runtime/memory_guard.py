"""The memory guard: near a limit, a run gives back what it can do without before it is killed.

First the cache of case files, then one worker after the other, then it leaves with its state saved.
Limits are those of the machine, of every cgroup around the process, and `run.memory_gb`.
"""

import ctypes
import gc
import os
import time

from monitoring import memory

SHARE = 0.05  # of a limit that stays free,
MOST = memory.GB  # but not more than this
LOOK = 1.0  # seconds from one look to the next, and until it is believed that nothing helped
SETTING = "run.memory_gb"
ADVICE = (
    "lower data.cache_gb, training.workers, training.train_batch_size or sampling.patch, or give "
    "the run more memory"
)


class MemoryGuard:
    """Looks at the memory of a run and acts on it.

    cache: a `cache.VolumeCache`; limit: bytes that all processes of the run may take, or None;
    report(kind, text, **figures) is told of everything that is given back.
    """

    def __init__(self, cache, *, limit, report):
        self.cache, self.limit, self.report = cache, limit, report
        self.gave_back, self.looked = False, 0.0

    def look(self, batches):
        """Why the run must leave, or None. At most once a second, some 0.3 ms.

        batches: a `data.Batches`, whose workers are dropped if that is needed.
        """
        if time.monotonic() - self.looked < LOOK:
            return None
        try:
            return self._relieve(batches)
        finally:
            self.looked = time.monotonic()

    def _relieve(self, batches):
        room = self.tightest(batches)
        if room is not None and not self.gave_back:
            self.gave_back = True
            freed = self.cache.shrink(0)
            self._tell(
                room, f"the cache gives back {memory.format_bytes(freed)} and keeps nothing more"
            )
            room = self.tightest(batches)
        while room is not None and batches.workers:
            batches.drop_worker()
            left = len(batches.workers)
            self._tell(room, f"one worker is ended, {left or 'none'} left")
            room = self.tightest(batches)
        if room is not None:  # it may be somebody else's, and short
            release()
            time.sleep(LOOK)
            room = self.tightest(batches)
        return None if room is None else f"memory is short: {room}; {ADVICE}"

    def tightest(self, batches):
        """The `memory.MemoryLimit` that is nearly used up, the least of several; None if there is none."""
        rooms = memory.rooms()
        if self.limit is not None:
            pids = [os.getpid(), *(worker.pid for worker in batches.workers)]
            used = memory.resident_memory(pids)
            rooms.append(memory.MemoryLimit(max(0, self.limit - used), self.limit, SETTING))
        tight = [room for room in rooms if room.free < min(SHARE * room.total, MOST)]
        return min(tight, default=None)

    def _tell(self, room, what):
        self.report("memory", f"memory is short: {room}: {what}", free=room.free, limit=room.total)


def release():
    """Give the system what Python and the C library keep for later, where they can be asked."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
