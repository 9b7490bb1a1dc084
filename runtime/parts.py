"""Predictions that several processes make together, without a word between them.

    part = find_part("2/3")                   # or the rank of torchrun
    shares = share([(9, 25), (40, 16)], 3)    # rows of windows of each volume: a fixed rule
    store = SlabStore(output, "a.nii.gz", fingerprint, 9)
    store.write(4, z0, layers)                # a slab that is done
    if not store.missing(range(9)):           # whoever finds them all
        store.join(write)                     # joins them, once

A slab is what `sliding_window.predict_slabs` yields for a row of windows, as layers: {name: (d, H,
W) of bool, uint8 or float32}. Its bits do not depend on which process predicts it, so the joined
volume is that of one process. A slab that is there is not done again. In the folder of the
predictions:

    .parts/a.nii.gz/<fingerprint>/4.npz   a slab
    .parts/a.nii.gz.json                  what was joined; its lock is held while that is done
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from runtime import distributed
from runtime.signals import CannotGoOn
from volumes import atomic

POLL_SECONDS = 0.2


# ---------------------------------------------------------------------------- who does what


class Part(NamedTuple):
    """One of `count` processes, index from 0. local: the rank of torchrun that it is on this
    machine, and of how many; None for a part that was started otherwise."""

    index: int
    count: int
    local: tuple[int, int] | None = None

    def __str__(self):
        return f"part {self.index + 1}/{self.count}"

    def device(self, device):
        """The device of this part: of several ranks on one machine each has a GPU of its own."""
        return distributed.device_of_rank(device, *(self.local or (0, 1)))


def find_part(text):
    """The `Part` of "I/N", or of a rank of torchrun where text is None; None: no parts.

    ValueError if there is no such part.
    """
    if "RANK" in os.environ and (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        part = Part(int(os.environ["RANK"]), ranks, distributed.local_rank())
        if text:
            raise ValueError(f"--part: expected none under torchrun, which makes this {part}")
        return part
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part: expected I/N with I from 1 to N, such as 2/3, got {text}")
    return Part(int(number) - 1, int(count))


def share(volumes, count):
    """The rows of windows that each of some parts predicts: a list of a range for each volume.

    volumes: [(rows, windows in each)]. Each part gets a run of rows with about as many windows as
    any other. So there are few cuts through a volume; each costs the rows that reach over it.
    """
    total, cuts = sum(rows * windows for rows, windows in volumes), []
    for number in range(count + 1):
        left, cut = total * number, []  # in 1 / count of a window, so that it is a whole number
        for rows, windows in volumes:  # how many rows of each lie before the cut
            cut.append(max(0, min(rows, round(left / (windows * count)))))
            left -= rows * windows * count
        cuts.append(cut)
    return [list(map(range, *pair)) for pair in itertools.pairwise(cuts)]


def runs(numbers):
    """Whole numbers in order as ranges of those that follow each other."""
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n + 1 for n in numbers if n + 1 not in numbers]
    return [range(start, stop) for start, stop in zip(starts, stops, strict=True)]


@contextlib.contextmanager
def until_all_ranks_end(part):
    """In this context a rank of torchrun does not end before the others: as soon as one ends with
    a failure, torchrun ends those that still work."""
    if part is None or part.local is None:
        yield
        return
    store, _, count = next(torch.distributed.rendezvous("env://"))
    # The store may be that of an attempt before, after which torchrun has started the ranks again.
    key = f"ended {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # the rank that kept the store has ended
            store.add(key, 1)
            while store.add(key, 0) < count:
                time.sleep(POLL_SECONDS)


# ---------------------------------------------------------------------------- slabs


def assemble(depth, slabs):
    """{name: (D, H, W)} of slabs (z0, layers) that cover a volume of this depth."""
    whole = {}
    for z0, layers in slabs:
        for name, planes in layers.items():
            if name not in whole:
                whole[name] = np.empty((depth, *planes.shape[1:]), planes.dtype)
            whole[name][z0 : z0 + len(planes)] = planes
    return whole


def fingerprint(values, networks=()):
    """Hexadecimal digits that tell plain values, and the weights of networks, from others."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for network in networks:
        for tensor in network.state_dict().values():
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def stamp(path):
    """[bytes, time of the last change] of a file, which tell it from a later one."""
    about = os.stat(path)
    return [about.st_size, about.st_mtime_ns]


class SlabStore:
    """The slabs of one volume, until they are joined.

    name: in the folder output, of the file that they become; fingerprint: of all that decides their
    values; count: how many there are.
    """

    def __init__(self, output, name, fingerprint, count):
        self.record = Record(output, name, fingerprint)
        self.place = Path(output) / ".parts" / name
        self.folder, self.count = self.place / fingerprint, count

    def missing(self, rows=None):
        """Those of some rows, or of all, whose slabs are not there; none if they were joined."""
        rows = range(self.count) if rows is None else rows
        # A listing, for a network file system may remember that a name was not there. It comes
        # first: slabs go after the record says that they have been joined.
        there = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        if self.record.is_done():
            return []
        return [row for row in rows if f"{row}.npz" not in there]

    @property
    def note(self):
        """A clause on slabs that are there, but were made otherwise; "" if there are none."""
        others = self.place.exists() and any(p != self.folder for p in self.place.iterdir())
        what = "; slabs from other weights, settings, versions or files are there"
        return what if others else ""

    def write(self, row, z0, layers):
        """Keep the slab of a row; CannotGoOn if it cannot be written."""
        path, arrays = self.folder / f"{row}.npz", {"z0": z0}
        for name, planes in layers.items():
            arrays[f"{name}.shape"] = planes.shape
            arrays[name] = np.packbits(planes) if planes.dtype == bool else planes
        try:
            with atomic.replacing(path) as partial, open(partial, "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise CannotGoOn(f"{path}: the slab cannot be written ({error})") from error

    def read(self):
        """All slabs in order: (z0, layers). CannotGoOn if one is damaged."""
        for row in range(self.count):
            path, layers = self.folder / f"{row}.npz", {}
            try:
                with np.load(path) as file:
                    for name in file:
                        if f"{name}.shape" in file:
                            shape, planes = file[f"{name}.shape"], file[name]
                            if planes.ndim == 1:  # bits
                                planes = np.unpackbits(planes, count=shape.prod()).view(bool)
                            layers[name] = planes.reshape(shape)
                    z0 = int(file["z0"])
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise CannotGoOn(
                    f"{path}: expected a slab that can be read, got {error}; remove it and start "
                    "the parts again"
                ) from error
            yield z0, layers

    def join(self, write):
        """Call write(), which returns the files that it wrote, unless this has been done; then
        remove the slabs. Whether it was called."""
        try:
            called = self.record.once(write)
        except CannotGoOn:
            if not self.record.is_done():  # by another process, on a file system without locks
                raise
            called = False
        shutil.rmtree(self.place, ignore_errors=True)
        return called


class Record:
    """A file that says what was made, and from what, so that processes make it once."""

    def __init__(self, output, name, fingerprint):
        self.path = Path(output) / ".parts" / f"{name}.json"
        self.fingerprint = fingerprint

    def is_done(self):
        """Whether it was made with this fingerprint, and the files are still those."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            files = {self.path.parent / name: stamps for name, stamps in content["files"].items()}
            same = all(stamp(path) == stamps for path, stamps in files.items())
            return same and content["fingerprint"] == self.fingerprint
        except (OSError, ValueError):  # not there, empty, cut off
            return False

    def once(self, make):
        """Call make(), which returns the files that it made, while no other process does, unless
        it is done. Whether it was called."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+", encoding="utf-8") as file:
            while not atomic.try_lock(file):
                time.sleep(POLL_SECONDS)
            if self.is_done():
                return False
            names = {os.path.relpath(path, self.path.parent): stamp(path) for path in make()}
            file.truncate(0)
            json.dump({"fingerprint": self.fingerprint, "files": names}, file)
            file.flush()
            os.fsync(file.fileno())
        return True
