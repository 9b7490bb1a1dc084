"""Boxes of voxels from case files, for several workers, within one budget of memory for all.

What is kept is kept once, whatever the number of workers:

- A volume that lies in its file as it is (`Case.layout`) is read through a memory map, for as long
  as that takes. Its pages are those of the operating system's file cache, which all processes
  share; there is no second copy. To keep it means to read it ahead, whole and in order. Left
  mapped it would save 0.2 ms of a read of 1.1 ms, and make every worker look as large as the cache.
- A volume that must be decoded (chunks, compression) is decoded once, into memory that all
  processes share. That is anonymous memory and not /dev/shm, of which a container has 64 MB.

First come stays: every case is drawn equally often, so that no other choice of cases is found more
often; to keep those that were used last is worse, for cases take turns (benchmarks/cache.py: 19 %
are found instead of 30 %). What does not fit is read from its file, each time.
"""

import contextlib
import fcntl
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from multiprocessing import context, reduction

import numpy as np

from monitoring.machine import anonymous_file
from volumes import boxes
from volumes.casefile import Case

ABSENT, FILLING, PRESENT = range(3)  # state of a volume in the cache
BUDGET, HITS, MISSES, EVICTIONS = range(4)  # places in the shared header
MUTEX = 0  # byte of the shared file that is locked to change the header; byte 1 + n: to fill n


@dataclass(frozen=True)
class Slot:
    """The place of one volume in the cache."""

    number: int  # its row in the shared table
    case: Case
    volume: boxes.Volume
    start: int  # in the shared memory, if it must be decoded

    @property
    def decoded(self):
        return self.volume.offset is None


class VolumeCache:
    """Reads boxes from case files and keeps cases in memory, up to `budget` bytes in all.

    cases: list of `Case`; budget: bytes for all processes together, 0 keeps nothing.
    It may be handed to processes that are spawned: they share what is kept and what is counted.
    Pickled in any other way, the copy starts empty, with the same budget and on its own.
    Threads may share one. Reading raises ValueError where a file is missing, or not the one that
    `cases.read_case` saw.
    """

    def __init__(self, cases, budget):
        self._places, self._arena_bytes = _lay_out(cases)
        self._create(min(_checked(budget), bytes_of(cases)))

    # ------------------------------------------------------------------------ reading

    def read(self, case, box, names):
        """{name: array} of a box: image (C, d, h, w), label and skeleton (d, h, w).

        box: three slices z, y, x, inside the volume; names: of `image`, `label`, `skeleton`.
        The arrays are copies, C-contiguous, of the stored dtype in this machine's byte order.
        """
        places = [self._place(case, name) for name in names]
        box = boxes.checked_box(case, box)
        boxes.check_unchanged(case)
        with self._locked():
            kept = self._generations(places)
            hit = len(kept) == len(places)
            mine = [] if hit else self._claim([p for p in places if p.number not in kept])
        if mine:
            kept |= self._fill(case, mine)
        arrays = {
            place.volume.name: self._copy(place, box)
            if place.number in kept and place.decoded
            else boxes.read_box(case, place.volume, box)
            for place in places
        }
        with self._locked():
            self._header[HITS if hit else MISSES] += 1
            unchanged = self._generations(places)
        for place in places:
            # Given back while it was copied: the copy may hold zeros, or what came after.
            changed = unchanged.get(place.number) != kept.get(place.number)
            if place.decoded and place.number in kept and changed:
                arrays[place.volume.name] = boxes.read_box(case, place.volume, box)
        return arrays

    def row(self, case, name, i):
        """Row i of a list of coordinates, `background` or `foreground/<class>`: (3,) int32.

        A few bytes of the file; nothing is kept.
        """
        boxes.check_unchanged(case)
        return boxes.read_row(case, name, i)

    def announce(self):
        """For people: what may be kept, of how much."""
        budget, held = (
            f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
            for n in (int(self._header[BUDGET]), int(self._sizes.sum()))
        )
        return f"{budget} at most over all workers, of cases of {held}"

    def counts(self):
        """What all processes did together: cases and bytes kept, budget, hits, misses, evictions.

        A hit is a read that found all it wanted in memory; evictions counts cases given back.
        """
        with self._locked():
            states = self._state
            kept = sum(
                any(states[place.number] == PRESENT for place in places.values())
                for places in self._places.values()
            )
            return {
                "cases": kept,
                "bytes": self._used(),
                "budget": int(self._header[BUDGET]),
                "hits": int(self._header[HITS]),
                "misses": int(self._header[MISSES]),
                "evictions": int(self._header[EVICTIONS]),
            }

    def shrink(self, keep_bytes):
        """Lower the budget to keep_bytes, for good; returns how many bytes were given back.

        Decoded volumes leave memory at once, and the system is told that the pages of the others
        are not needed; a volume that is being filled goes at the end of that, and is not in the
        number returned.
        """
        with self._locked():
            before = self._used()
            self._header[BUDGET] = int(min(self._header[BUDGET], _checked(keep_bytes)))
            for places in reversed(self._places.values()):
                if self._used() <= self._header[BUDGET]:
                    break
                kept = [p for p in places.values() if self._state[p.number] == PRESENT]
                for place in kept + [p for p in places.values() if self._abandoned(p)]:
                    self._release(place)
                self._header[EVICTIONS] += bool(kept)
            return before - self._used()

    # ------------------------------------------------------------------------ filling

    def _place(self, case, name):
        volumes = self._places.get(case.path)
        if volumes is None:
            raise ValueError(
                f"case {case.id}: expected one of the {len(self._places)} cases of this cache, got "
                f"{case.path}; make the cache with all cases that it shall read"
            )
        if name not in volumes:
            raise ValueError(
                f"case {case.id}: expected {name!r} in {case.path}, got a file with "
                f"{', '.join(volumes)} only; prepare this case again with it"
            )
        return volumes[name]

    def _generations(self, places):
        """{number: generation} of those that are kept; a place gets a new one when it changes."""
        numbers = [p.number for p in places if self._state[p.number] == PRESENT]
        return {number: int(self._generation[number]) for number in numbers}

    def _used(self):
        return int(self._sizes[self._state != ABSENT].sum())

    def _claim(self, places):
        """Those of the places that this process shall fill: none if they do not all fit."""
        for place in places:
            if self._abandoned(place):
                self._release(place)
        absent = [p for p in places if self._state[p.number] == ABSENT]
        if self._used() + sum(p.volume.memory for p in absent) > self._header[BUDGET]:
            return []
        mine = [place for place in absent if self._lock_to_fill(place)]
        for place in mine:
            self._state[place.number] = FILLING
        return mine

    def _release(self, place):
        """Take a place out of the cache, and give its memory back where the system has a way."""
        self._generation[place.number] += 1  # before the bytes go, or a reader would trust them
        self._state[place.number] = ABSENT
        if not place.decoded:
            boxes.drop_pages(place.case, place.volume)
        elif hasattr(mmap, "MADV_REMOVE"):
            self._arena().madvise(mmap.MADV_REMOVE, place.start, place.volume.memory)

    def _lock_to_fill(self, place):
        """Whether this process got the lock of a place; that of one that was killed is free."""
        if place.number in self._filling:  # by another thread: file locks are one process's
            return False
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 + place.number)
        except (BlockingIOError, PermissionError):
            return False
        self._filling.add(place.number)
        return True

    def _abandoned(self, place):
        """Whether a place is being filled by a process that is no more."""
        if self._state[place.number] != FILLING or not self._lock_to_fill(place):
            return False
        self._unlock(place)
        return True

    def _unlock(self, place):
        self._filling.discard(place.number)
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 1 + place.number)

    def _fill(self, case, places):
        """Read ahead or decode the places that were claimed; {number: generation} of those kept."""
        done = False
        try:
            for place in places:
                if place.decoded:
                    boxes.decode(case, place.volume, self._arena(), place.start)
                else:
                    boxes.read_ahead(case, place.volume)
            done = True
        finally:
            with self._locked():
                # The budget may have been lowered meanwhile.
                done = done and self._used() <= self._header[BUDGET]
                for place in places:
                    if done:
                        self._state[place.number] = PRESENT
                    else:
                        self._release(place)
                    self._unlock(place)
                kept = self._generations(places)
        return kept

    def _copy(self, place, box):
        """The box of a decoded volume that is kept."""
        return boxes.copy_box(self._arena(), place.volume, place.start, box)

    def _arena(self):
        if self._arena_map is None:
            self._arena_map = mmap.mmap(self._arena_fd, self._arena_bytes)
        return self._arena_map

    # ------------------------------------------------------------------------ what is shared

    def _create(self, budget):
        count = sum(map(len, self._places.values()))
        self._fd = anonymous_file(8 * (4 + 2 * count))
        # Sparse: it takes the memory of what is decoded into it, never more than the budget.
        self._arena_fd = anonymous_file(self._arena_bytes) if self._arena_bytes else None
        self._attach()
        self._header[BUDGET] = int(budget)

    def _attach(self):
        for fd in (self._fd, self._arena_fd):
            if fd is not None:
                os.set_inheritable(fd, False)  # as it came from a spawn: programs run here get none
                weakref.finalize(self, os.close, fd)
        rows = [place for places in self._places.values() for place in places.values()]
        # Never closed while the cache lives: closing any descriptor of a file drops all of a
        # process's locks on it, and a map has one.
        numbers = np.frombuffer(mmap.mmap(self._fd, 0), np.int64)
        self._header, self._state, self._generation = np.split(numbers, [4, 4 + len(rows)])
        self._sizes = np.array([place.volume.memory for place in rows], np.int64)
        self._thread_lock, self._filling = threading.Lock(), set()
        self._arena_map = None

    def __getstate__(self):
        spawning = context.get_spawning_popen() is not None
        fds = [fd for fd in (self._fd, self._arena_fd) if fd is not None]
        return {
            "places": (self._places, self._arena_bytes),
            "budget": int(self._header[BUDGET]),
            "files": [reduction.DupFd(fd) for fd in fds] if spawning else [],
        }

    def __setstate__(self, state):
        self._places, self._arena_bytes = state["places"]
        if not state["files"]:
            self._create(state["budget"])
            return
        self._fd, *arena = (file.detach() for file in state["files"])
        self._arena_fd = arena[0] if arena else None
        self._attach()

    @contextlib.contextmanager
    def _locked(self):
        """Alone with the header. The file's lock ends with its process, even one that is killed.

        It is the process's, so that threads need one of their own.
        """
        with self._thread_lock:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, MUTEX)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, MUTEX)


def _checked(budget):
    if not budget >= 0:  # NaN neither
        raise ValueError(f"expected a cache of 0 bytes or more, got {budget}; 0 keeps nothing")
    return budget


def _lay_out(cases):
    """({path: {name: Slot}}, bytes of shared memory that would hold all that must be decoded)."""
    places, number, arena = {}, 0, 0
    for case in cases:
        places[case.path] = {}
        for name, volume in boxes.volumes(case).items():
            places[case.path][name] = Slot(number, case, volume, arena)
            number += 1
            arena += volume.memory if places[case.path][name].decoded else 0
    return places, arena


def bytes_of(cases):
    """Bytes of memory that all volumes of these cases take, decoded."""
    return sum(volume.memory for case in cases for volume in boxes.volumes(case).values())


def default_budget(cases, available_bytes):
    """Bytes to keep: half of what is available, at most what the cases hold.

    The other half is for what grows with the workers and not with the data, boxes on their way
    above all, and for the file cache of what is not kept.
    """
    return min(int(available_bytes) // 2, bytes_of(cases))
