"""The decoded chunks of a volume on disk, of which those are kept that are needed again soonest.

    cache = ChunkCache(volume, stretches, budget=2**28)
    cache.go_to(0, 5)                   # row 5 of windows of stretch 0 is read from now on
    cache[:, 0:64, 0:128, 0:128]        # (C, 64, 128, 128)

The order of all reads is known, see runtime/columns.py. So the chunk that goes is the one whose
next use is farthest away, which no other rule beats (Belady 1966), and those of the next row are
read meanwhile. Chunks of zeros take no memory.
"""

import itertools
import math
import os
import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from volumes.volume import VolumeError

THREADS = 4  # that read and decode; the codecs let other threads run


@dataclass
class _Chunk:
    """next: the step of its next use; held: bytes; voxels: a future of (C, d, h, w), or of None for
    zeros."""

    next: int
    held: int
    voxels: object = None


class ChunkCache:
    """A volume to slice, with the `shape` and `dtype` of a `volumes.ome_zarr.ZarrVolume`.

    stretches: [`columns.Stretch`] in the order in which they are read; budget: bytes of chunks to
    keep, at least those that two rows of windows read, see `bytes_kept`. decoded: bytes so far.
    """

    def __init__(self, volume, stretches, budget):
        self.volume, self.shape, self.dtype = volume, volume.shape, volume.dtype
        self._steps, self._columns, total = [], {}, 0
        for number, stretch in enumerate(stretches):
            z = [self._range(0, read) for read in stretch.reads]
            y, x = (self._range(axis, read) for axis, read in enumerate(stretch.area, start=1))
            ends = [chunks.stop for chunks in z]
            self._steps.append((total, stretch.needed.start, z, ends, y, x))
            for column in itertools.product(y, x):
                self._columns.setdefault(column, []).append(number)
            total += len(z)
        self.largest, self.bytes_read_at_most = self._needs()
        self.bytes_kept = max(budget, self.largest)
        self._chunks, self._held, self.decoded = {}, 0, 0
        self._stretch, self._step, self._lock = 0, -1, threading.Lock()
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "chunks")

    def _range(self, axis, read):
        """The chunks that a slice of z, y or x reads."""
        step = self.volume.chunks[axis]
        return range(read.start // step, -(-read.stop // step))

    def _needs(self):
        """(bytes that two rows read, bytes that all stretches read if none shared a chunk)."""
        size, most, total = self._bytes(), 0, 0
        for _, _, z, _, y, x in self._steps:
            area = len(y) * len(x) * size
            two = [b.stop - a.start for a, b in zip(z, [*z[1:], z[-1]], strict=True)]
            most, total = max(most, max(two) * area), total + (z[-1].stop - z[0].start) * area
        return most, total

    def _bytes(self):
        return self.shape[0] * math.prod(self.volume.chunks) * self.dtype.itemsize

    def go_to(self, stretch, row):
        """From now on a row of a stretch is read: forget what is not used again, read the next."""
        first, row0, _, _, _, _ = self._steps[stretch]
        with self._lock:
            self._stretch, self._step = stretch, first + row - row0
            for index, chunk in [*self._chunks.items()]:
                if chunk.next < self._step:
                    following = self._next_use(index)
                    if following is None:
                        self._drop(index)
                    else:
                        chunk.next = following
            for step in (self._step, self._step + 1):
                for index in self._chunks_of(step):
                    if index not in self._chunks and not self._load(index, step):
                        return

    def _chunks_of(self, step):
        stretch = self._stretch
        first, _, z, _, y, x = self._steps[stretch]
        if step - first >= len(z):
            if stretch + 1 == len(self._steps):
                return ()
            first, _, z, _, y, x = self._steps[stretch + 1]
        return itertools.product(z[step - first], y, x)

    def _next_use(self, index):
        """The first step from this one on that reads a chunk; None if there is none."""
        z, *column = index
        numbers = self._columns[tuple(column)] if tuple(column) in self._columns else ()
        for number in numbers[bisect_right(numbers, self._stretch - 1) :]:
            first, _, ranges, ends, _, _ = self._steps[number]
            row = max(bisect_right(ends, z), self._step - first)
            if row < len(ranges) and z in ranges[row]:
                return first + row
        return None

    def _load(self, index, step):
        """Begin to read a chunk for a step; False if others that are needed before leave no room
        for it, and it is not needed now."""
        size = self._bytes()
        while self._held + size > self.bytes_kept:
            last = max(self._chunks, key=lambda i: self._chunks[i].next)
            if self._chunks[last].next <= step:
                if step > self._step:
                    return False
                break
            self._drop(last)
        chunk = self._chunks[index] = _Chunk(step, size)
        self._held += size
        chunk.voxels = self._pool.submit(self._read, index, chunk)
        return True

    def _drop(self, index):
        self._held -= self._chunks.pop(index).held

    def _read(self, index, chunk):
        voxels, places = None, zip(index, self.volume.chunks, strict=True)
        if self.volume.fill != 0 or self.volume.stored(*index):
            voxels = self.volume[:, *(slice(i * n, (i + 1) * n) for i, n in places)]
            if self.dtype.kind == "f" and not np.isfinite(voxels).all():
                raise VolumeError(
                    f"{self.volume.path}: expected finite values, got NaN or Inf in the chunk "
                    f"{index} (z, y, x); replace them, by 0 for voxels without a measurement"
                )
        with self._lock:
            self.decoded += 0 if voxels is None else voxels.nbytes
            if voxels is not None and voxels.any():
                return voxels
            if self._chunks.get(index) is chunk:
                self._held -= chunk.held
                chunk.held = 0
        return None

    def _parts(self, box):
        """(index, voxels or None for zeros) of the chunks that a box (z, y, x) touches."""
        for index in itertools.product(*(self._range(axis, s) for axis, s in enumerate(box))):
            with self._lock:
                if index not in self._chunks:
                    self._load(index, self._step)
                voxels = self._chunks[index].voxels
            yield index, voxels.result()

    def __getitem__(self, box):
        """The voxels of a box in all channels, slices with both ends, as a new array."""
        box = box[1:]
        out = np.zeros((self.shape[0], *(s.stop - s.start for s in box)), self.dtype)
        for index, voxels in self._parts(box):
            if voxels is None:
                continue
            source, target = [slice(None)], [slice(None)]
            for i, n, s in zip(index, self.volume.chunks, box, strict=True):
                low, high = max(s.start, i * n), min(s.stop, (i + 1) * n)
                source.append(slice(low - i * n, high - i * n))
                target.append(slice(low - s.start, high - s.start))
            out[tuple(target)] = voxels[tuple(source)]
        return out

    def is_empty(self, box):
        """Whether no chunk that a box (z, y, x) touches has a voxel that is not 0."""
        return all(voxels is None for _, voxels in self._parts(box))

    def close(self):
        self._pool.shutdown(cancel_futures=True)
