"""Boxes of voxels and rows of coordinates, read from a case file as little of it as they need.

A volume that lies in its file as it is (`Case.layout`) is read through a memory map, without HDF5:
a box touches its own pages and no more. One that is stored in chunks is decoded with HDF5. Every
file is opened for the one use, so that no handle is carried over a spawn or a fork.
"""

import contextlib
import mmap
import os
from dataclasses import dataclass

import h5py
import numpy as np

from volumes.casefile import VOLUMES

PAGE = mmap.ALLOCATIONGRANULARITY
AHEAD = 2**20  # bytes that are read at once


class Unreadable(ValueError):
    """A case file that cannot be read, or not the one it was; one sentence for people."""


@dataclass(frozen=True)
class Volume:
    """One volume of a case file."""

    name: str
    shape: tuple  # (C, D, H, W) or (D, H, W)
    dtype: np.dtype
    offset: int | None  # in the file; None: it is not there as it is and must be decoded

    @property
    def size(self):
        """Bytes of its voxels."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def memory(self):
        """Bytes of memory that it takes, mapped or decoded: whole pages."""
        return -(-((self.offset or 0) % PAGE + self.size) // PAGE) * PAGE


def volumes(case):
    """{name: Volume} of a case."""
    return {name: _volume(case, name) for name in VOLUMES if name in case.layout}


def _volume(case, name):
    if case.layout[name] is not None:
        offset, shape, dtype = case.layout[name]
        return Volume(name, tuple(shape), np.dtype(dtype), offset)
    shape = (case.channels, *case.shape) if name == "image" else case.shape
    dtype = np.dtype(case.dtype if name == "image" else np.uint8)
    return Volume(name, shape, dtype.newbyteorder("="), None)


@contextlib.contextmanager
def opened(case):
    """The case file, open for HDF5. Unreadable where that cannot be read."""
    try:
        with h5py.File(case.path, "r") as file:
            yield file
    except OSError as error:
        raise Unreadable(
            f"case {case.id}: expected to read {case.path}, got {error}; prepare this case again"
        ) from error


def _stored(case, file, name):
    if name not in file:
        raise Unreadable(
            f"case {case.id}: expected {name!r} in {case.path}, got {', '.join(file)}; prepare "
            "this case again"
        )
    return file[name]


# ---------------------------------------------------------------------------- reading


def map_volume(case, volume):
    """Map the pages of a volume that lies in its file as it is; for `copy_box`.

    Unreadable if the file ends before the volume does.
    """
    before = volume.offset % PAGE
    with open(case.path, "rb", buffering=0) as file:
        _check_size(case, file, volume.offset + volume.size)
        length, start = before + volume.size, volume.offset - before
        return mmap.mmap(file.fileno(), length, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)


def read_ahead(case, volume):
    """Read a volume once, in order, so that the system has its pages. Takes a buffer, no more."""
    buffer, done = bytearray(min(AHEAD, volume.size)), 0
    with open(case.path, "rb", buffering=0) as file:
        _check_size(case, file, volume.offset + volume.size)
        file.seek(volume.offset)
        while done < volume.size:
            count = file.readinto(memoryview(buffer)[: volume.size - done])
            if not count:
                break
            done += count


def drop_pages(case, volume):
    """Tell the system that it need not keep the pages of a volume, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), open(case.path, "rb", buffering=0) as file:
            advice = os.POSIX_FADV_DONTNEED
            os.posix_fadvise(file.fileno(), volume.offset, volume.size, advice)


def copy_box(source, volume, start, box):
    """A box of a volume that begins at byte `start` of a map: a copy, in native byte order."""
    view = np.ndarray(volume.shape, volume.dtype, source, start)
    return _native(view[_all_channels(volume, box)])


def read_box(case, volume, box):
    """A box of a volume, from its file."""
    if volume.offset is not None:
        return copy_box(map_volume(case, volume), volume, volume.offset % PAGE, box)
    with opened(case) as file:
        return _native(_stored(case, file, volume.name)[_all_channels(volume, box)])


def decode(case, volume, memory, start):
    """Decode a whole volume into memory, from byte `start` on."""
    with opened(case) as file:
        room = np.ndarray(volume.shape, volume.dtype, memory, start)
        _stored(case, file, volume.name).read_direct(room)


def read_row(case, name, i):
    """Row i of a list of coordinates, `background` or `foreground/<class>`: (3,) int32."""
    if name not in case.layout or name in VOLUMES:
        lists = ", ".join(n for n in case.layout if n not in VOLUMES) or "none"
        raise ValueError(
            f"case {case.id}: expected a list of coordinates in {case.path}, got {name!r}; "
            f"there are: {lists}"
        )
    if case.layout[name] is None:
        with opened(case) as file:
            stored = _stored(case, file, name)
            _check_row(case, name, i, len(stored))
            return np.asarray(stored[i], np.int32)
    offset, shape, dtype = case.layout[name]
    _check_row(case, name, i, shape[0])
    size = shape[1] * np.dtype(dtype).itemsize
    with open(case.path, "rb", buffering=0) as file:
        _check_size(case, file, offset + (i + 1) * size)
        row = os.pread(file.fileno(), size, offset + i * size)
    return np.frombuffer(row, dtype).astype(np.int32)


def _all_channels(volume, box):
    return box if len(volume.shape) == 3 else (slice(None), *box)


def _native(array):
    return np.array(array, array.dtype.newbyteorder("="), order="C")


# ---------------------------------------------------------------------------- checks


def checked_box(case, box):
    """The box as slices of plain numbers. ValueError if it is not inside the volume."""
    box = tuple(slice(int(s.start), int(s.stop)) for s in box)
    inside = len(box) == 3 and all(
        0 <= s.start <= s.stop <= n for s, n in zip(box, case.shape, strict=True)
    )
    if not inside:
        raise ValueError(f"case {case.id}: expected a box inside {case.shape} (z, y, x), got {box}")
    return box


def _check_row(case, name, i, count):
    if not 0 <= i < count:
        raise ValueError(f"case {case.id}: expected a row of {name} below {count}, got {i}")


def check_unchanged(case):
    """Unreadable if the file of a case is missing, or not the one that was read at the start."""
    try:
        status = os.stat(case.path)
    except OSError as error:
        raise Unreadable(
            f"case {case.id}: expected the file {case.path}, got {error.strerror}; put it back, or "
            "prepare this case again"
        ) from error
    if (status.st_size, status.st_mtime_ns) != case.stamp:
        raise Unreadable(
            f"case {case.id}: expected {case.path} as it was when this run began, got a file that "
            "was changed since; start the run again, and prepare no data while one is running"
        )


def _check_size(case, file, end):
    """Reading a map beyond the end of its file would kill the process with SIGBUS."""
    size = os.fstat(file.fileno()).st_size
    if size < end:
        raise Unreadable(
            f"case {case.id}: expected {end} bytes or more in {case.path}, got {size}; the file is "
            "cut off, prepare this case again"
        )
