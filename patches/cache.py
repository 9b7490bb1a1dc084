"""Boxes of voxels from case files, for several workers, within one budget of memory for all.

A volume that is not compressed is read through a memory map, from the system's file cache.

Of the compressed ones those of the smallest cases are held, as many as fit the budget. Cases are
sampled equally often, so that no other choice has more hits (benchmarks/cache.py: 30 %, where least
recently used has 19 %). The first process that reads a held volume decodes it into memory that all
share: anonymous memory and not /dev/shm, of which a container has 64 MB.

There is no lock. Every volume has its own place, and a flag that says it is complete. Two processes
that decode it at once write the same bytes; one that is killed on the way leaves the flag unset.
"""

import math
import mmap
import os
import tempfile
import threading
import weakref
from multiprocessing import context, reduction
from typing import NamedTuple

import numpy as np

from volumes import casefile

COUNTERS = 1024  # each thread counts for itself; ids of threads side by side differ modulo this


class Place(NamedTuple):
    """Where a decoded volume lies in the shared memory; it is held if the budget reaches `end`."""

    number: int  # of its flag
    start: int
    end: int
    shape: tuple
    dtype: np.dtype  # as stored: decoding then writes each byte once, as it stays


def _lay_out(cases, names):
    """({(path, name): Place} of the compressed volumes, smallest cases first; bytes of all)."""
    places, end = {}, 0
    for case in sorted(cases, key=lambda case: case.channels * math.prod(case.shape)):
        for name in names:
            if name in case.layout and case.layout[name] is None:
                shape = (case.channels, *case.shape) if name == "image" else case.shape
                dtype = np.dtype(case.dtype if name == "image" else np.uint8)
                pages = math.ceil(math.prod(shape) * dtype.itemsize / mmap.PAGESIZE)
                start, end = end, end + pages * mmap.PAGESIZE
                places[case.path, name] = Place(len(places), start, end, shape, dtype)
    return places, end


def default_budget(cases, available_bytes, names=casefile.VOLUMES):
    """Bytes to hold: half of what is available, at most what the cases take when decoded."""
    return min(int(available_bytes) // 2, _lay_out(cases, names)[1])


class VolumeCache:
    """Reads boxes from case files and holds decoded volumes, up to `budget` bytes in all.

    cases: list of `Case`; budget: bytes for all processes together, 0 holds nothing; names: of the
    volumes that will be read. Threads may share one, and so may spawned processes: they share what
    is held and counted. Pickled otherwise, the copy starts empty and on its own. Reading raises
    `casefile.Unreadable` where a file is missing, damaged, or not the one that `read_case` saw.
    """

    def __init__(self, cases, budget, names=casefile.VOLUMES):
        places, total = _lay_out(cases, names)
        self._attach(places, total, int(min(_checked(budget), total)))

    def read(self, case, box, names):
        """{name: array} of a box: image (C, d, h, w), label and skeleton (d, h, w).

        box: three slices z, y, x, inside the volume; names: of `image`, `label`, `skeleton`.
        The arrays are copies, C-contiguous, of the stored dtype in this machine's byte order.
        """
        if not all(0 <= s.start <= s.stop <= n for s, n in zip(box, case.shape, strict=True)):
            raise ValueError(f"case {case.id}: expected a box inside {case.shape}, got {box}")
        casefile.check_unchanged(case)
        arrays, hit = {}, 1
        for name in names:
            selection = (slice(None), *box) if name == "image" else box
            arrays[name], without_decoding = self._read(case, name, selection)
            hit &= without_decoding
        self._reads[threading.get_native_id() % COUNTERS, hit] += 1
        return arrays

    def _read(self, case, name, selection):
        """(array, 1 if nothing had to be decoded for it, else 0)."""
        place = self._places.get((case.path, name))
        if place is None or place.end > self._budget[0]:
            array = casefile.read_array(case, name, selection)
            return array, int(case.layout[name] is not None)
        volume = np.ndarray(place.shape, place.dtype, self._memory, self._header + place.start)
        was_held = int(self._ready[place.number])
        if not was_held:
            with casefile.opened(case) as file:
                file[name].read_direct(volume)
            self._ready[place.number] = 1
        array = casefile.native(volume[selection])
        if place.end > self._budget[0]:
            # Given back meanwhile: the copy may hold zeros, and decoding may have taken it again.
            self._give_back(place.start, place.end)
            return casefile.read_array(case, name, selection), 0
        return array, was_held

    def row(self, case, key, i):
        """Row i of the coordinates of a class id or of "background": (3,) int32."""
        casefile.check_unchanged(case)
        name = key if key == "background" else f"foreground/{key}"
        length = case.counts.get(key, 0)
        if not 0 <= i < length:
            raise ValueError(f"case {case.id}: expected a row of {name} below {length}, got {i}")
        return casefile.read_array(case, name, i).astype(np.int32)

    def announce(self, reason):
        """For people: how much may be held, of how much, by what reason; or why nothing is."""
        if not self._total:
            return "not needed, for the case files are not compressed"
        budget, total = self._budget[0] / 1e6, self._total / 1e6
        return f"{budget:,.1f} MB for all workers, of {total:,.1f} MB of decoded volumes ({reason})"

    def counts(self):
        """What all processes did together: cases and bytes held, budget, hits, misses, evictions.

        A miss is a read that had to decode, a hit any other; evictions counts cases given back.
        """
        held = {
            key: place.end - place.start
            for key, place in self._places.items()
            if self._ready[place.number] and place.end <= self._budget[0]
        }
        misses, hits = self._reads.sum(axis=0).tolist()
        return {
            "cases": len({path for path, _ in held}),
            "bytes": sum(held.values()),
            "budget": int(self._budget[0]),
            "hits": hits,
            "misses": misses,
            "evictions": int(self._evictions[0]),
        }

    def shrink(self, keep_bytes):
        """Lower the budget for good, largest cases first; returns how many bytes are given back."""
        before = self.counts()
        # The budget first: readers look at it after they have copied.
        self._budget[0] = int(min(self._budget[0], _checked(keep_bytes)))
        for place in self._places.values():
            if self._budget[0] < place.end <= before["budget"]:
                self._give_back(place.start, place.end)
        after = self.counts()
        self._evictions[0] += before["cases"] - after["cases"]
        return before["bytes"] - after["bytes"]

    def _give_back(self, start, end):
        if hasattr(mmap, "MADV_REMOVE"):  # elsewhere it stays until the run ends
            self._memory.madvise(mmap.MADV_REMOVE, self._header + start, end - start)

    def _attach(self, places, total, budget, fd=None):
        """Make the shared memory, or map that of another process."""
        count = 2 + 2 * COUNTERS + len(places)
        header = math.ceil(8 * count / mmap.PAGESIZE) * mmap.PAGESIZE  # the volumes follow
        if fd is None:
            if hasattr(os, "memfd_create"):
                fd = os.memfd_create("lamina-cache")
            else:  # macOS: a file that has lost its name
                with tempfile.TemporaryFile() as file:
                    fd = os.dup(file.fileno())
            # Sparse: it takes the memory of what is decoded into it.
            os.ftruncate(fd, header + budget)
            os.write(fd, np.int64(budget).tobytes())
        os.set_inheritable(fd, False)  # as it came from a spawn: programs run here get none
        weakref.finalize(self, os.close, fd)
        self._places, self._total, self._header, self._fd = places, total, header, fd
        self._memory = mmap.mmap(fd, 0)
        numbers = np.frombuffer(self._memory, np.int64, count)
        self._budget, self._evictions = numbers[:1], numbers[1:2]
        self._reads = numbers[2 : 2 + 2 * COUNTERS].reshape(COUNTERS, 2)  # misses, hits
        self._ready = numbers[2 + 2 * COUNTERS :]

    def __getstate__(self):
        spawning = context.get_spawning_popen() is not None
        fd = reduction.DupFd(self._fd) if spawning else None
        return self._places, self._total, int(self._budget[0]), fd

    def __setstate__(self, state):
        *arguments, fd = state
        self._attach(*arguments, fd and fd.detach())


def _checked(budget):
    if not budget >= 0:  # NaN neither
        raise ValueError(f"expected a cache of 0 bytes or more, got {budget}; 0 holds nothing")
    return budget
