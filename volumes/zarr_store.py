"""A prediction as OME-Zarr: shards that are there whole or not at all, with their pyramid.

    store = create("pred.zarr", (D, H, W), {"sheet": 1}, spacing=spacing, unit="mm", provenance={})
    for index in store.missing():
        with store.lock(index) as free:
            if free:
                store.write(index, probability, mask)
    store.finish()

Version 0.5 in Zarr 3. The root is the image: probability, uint8, p = value / 255, with axes z, y,
x, or c, z, y, x of several regions. `labels/mask` is the mask. `0` is the finest level of both. The
files of a shard are the same bytes whoever writes them; that of the probability at level 0 comes
last, and a shard is done when it is there. `.lamina/` is removed when the store is complete.
"""

import contextlib
import datetime
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np

from volumes import atomic, files, ome_zarr, zarr_shards
from volumes.volume import VolumeError
from volumes.zarr_shards import MASK, PROBABILITY, RAW

LOCKS = ".lamina/locks"
NOT_COMPARED = ("complete", "provenance.date", "provenance.commit")


@dataclass(frozen=True)
class Store:
    """A store on disk; `description` is the attribute `lamina` of its root."""

    path: Path
    description: dict

    @property
    def grid(self):
        """The number of shards along z, y, x."""
        shape, shard = self.description["shape"], self.description["shard"]
        return tuple(-(-size // step) for size, step in zip(shape, shard, strict=True))

    def box(self, index):
        """The voxels of a shard: a slice of z, y and x."""
        places = zip(index, self.description["shard"], self.description["shape"], strict=True)
        return tuple(slice(i * step, min((i + 1) * step, size)) for i, step, size in places)

    def missing(self, *, mask=False):
        """Indexes (z, y, x) of the shards that are not done, in this order; mask: of the mask."""
        done = self._there(MASK if mask else PROBABILITY)
        return [i for i in np.ndindex(self.grid) if i not in done]

    def _there(self, array, levels=(0,)):
        """Indexes of the shards whose files of these levels of an array are all there."""
        folders = [self._file(array, level, (0, 0, 0)).parents[2] for level in levels]
        places = [
            {path.relative_to(one).parts for path in one.glob("*/*/*") if _holds_bytes(path)}
            for one in folders
        ]
        there = set.intersection(*places)
        return {i for i in np.ndindex(self.grid) if tuple(map(str, i)) in there}

    @contextlib.contextmanager
    def lock(self, index):
        """A context in which no other process writes a shard: whether this one is to write it.

        It is not if another one holds it, or has done it. A killed process holds nothing.
        """
        done = self._file(PROBABILITY, 0, index)
        if _holds_bytes(done):
            yield False
        else:
            with self.hold(".".join(map(str, index))) as free:
                yield free and not _holds_bytes(done)

    @contextlib.contextmanager
    def hold(self, name):
        """Hold a lock of this name in a context: whether no other process does."""
        path = self.path / LOCKS / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")
        except FileNotFoundError:  # another process finishes
            yield False
            return
        with file:
            yield atomic.try_lock(file)

    def write(self, index, probability, mask=None, raw=None):
        """Write a shard: probability (C, d, h, w) and mask (d, h, w) of its box, uint8.

        A store with `post` gets raw (C, d, h, w) uint8 in place of the mask. OSError, one sentence,
        if the disk does not take it: then the shard is missing.
        """
        channels = (len(self.description["names"]),)
        self._check(index, probability, channels)
        if self.description["post"]:
            self._check(index, raw, channels)
            self._put(RAW, 0, index, raw)
        else:
            self.write_mask(index, mask)
        levels = [probability]
        while len(levels) < len(self._levels):
            levels.append(zarr_shards.pool(levels[-1]))
        for level in reversed(range(len(levels))):
            self._put(PROBABILITY, level, index, levels[level])

    def write_mask(self, index, mask):
        """Write the mask (d, h, w) uint8 of a shard; OSError as `write`."""
        self._check(index, mask)
        for level in reversed(range(len(self._levels))):
            # A mean would lose what is thinner than its voxels, and a maximum make it thicker.
            step = 2**level
            self._put(MASK, level, index, mask[None, ::step, ::step, ::step])

    def finish(self):
        """Mark the store as complete if nothing is missing; whether that is so."""
        if self.missing() or self.missing(mask=True):
            return False
        with self.hold("finish") as free:
            if free:
                for path in self.path.rglob(".partial_*"):  # of processes that were killed
                    path.unlink(missing_ok=True)
                self._say_complete(True)
                shutil.rmtree(self.path / ".lamina", ignore_errors=True)
        return True

    def repair(self):
        """Make those shards missing some files of which are gone, as somebody may have removed
        them, and write the metadata that are gone.

        Others may write meanwhile: of files of which one follows another, that one is listed first.
        """
        levels, post = range(len(self._levels)), self.description["post"]
        done = self._there(PROBABILITY)
        whole = self._there(PROBABILITY, levels)
        raw = self._there(RAW) if post else ()
        masks = self._there(MASK)
        for index in masks - self._there(MASK, levels):
            self._file(MASK, 0, index).unlink(missing_ok=True)
        masked = {*np.ndindex(self.grid)} - {*self.missing(mask=True)}
        if not post:
            whole &= masked
        elif len(masked) < math.prod(self.grid):
            whole &= raw
        for index in done - whole:
            self._file(PROBABILITY, 0, index).unlink(missing_ok=True)
        is_complete = not self.missing() and not self.missing(mask=True)
        for name, content in zarr_shards.metadata(self.description).items():
            needed = not (is_complete and name.startswith(RAW))
            if needed and not (self.path / name / "zarr.json").exists():
                _write_json(self.path / name, content)
        if self.description["complete"] and not is_complete:
            self._say_complete(False)

    def _say_complete(self, is_so):
        root = json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))
        root["attributes"]["lamina"]["complete"] = is_so
        _write_json(self.path, root)

    def _check(self, index, voxels, channels=()):
        """ValueError if voxels are not those of a shard."""
        shape = (*channels, *(s.stop - s.start for s in self.box(index)))
        got = getattr(voxels, "dtype", None), getattr(voxels, "shape", None)
        if got != (np.uint8, shape):
            raise ValueError(
                f"{self.path}, shard {index}: expected uint8 of shape {shape}, got {got[0]} of "
                f"shape {got[1]}"
            )

    @property
    def _levels(self):
        return zarr_shards.levels_of(self.description["shard"], self.description["chunk"])

    def _file(self, array, level, index):
        channel = ("0",) * (array != MASK and len(self.description["names"]) > 1)
        return self.path.joinpath(array, str(level), "c", *channel, *map(str, index))

    def _put(self, array, level, index, voxels):
        shard, chunk = self._levels[level]
        with _replacing(self._file(array, level, index)) as partial, open(partial, "wb") as file:
            zarr_shards.write_shard(file, voxels, shard, chunk)


def create(
    path,
    shape,
    names,
    *,
    spacing=None,
    unit="",
    offset=(0, 0, 0),
    shard=(512, 512, 512),
    chunk=(128, 128, 128),
    provenance=None,
    post=False,
):
    """The `Store` at path: a new one, or the one that is there if it was begun with all of this.

    shape (D, H, W) in voxels; names {region: its value in the mask}; spacing (z, y, x) in unit,
    None if unknown; offset (z, y, x) in unit: the center of voxel 0; shard and chunk (z, y, x) in
    voxels; provenance: what made the prediction, as JSON has it, to which the date is added; post:
    the mask comes later, by `write_mask`, from the raw codes. ValueError, one sentence.
    """
    path, odd = Path(path), [s % c for s, c in zip(shard, chunk, strict=True)]
    if any(odd) or 0 in shard:
        raise ValueError(f"expected a shard of whole chunks of {chunk}, got {tuple(shard)}")
    description = {
        "shape": shape,
        "names": names,
        "spacing": spacing,
        "unit": unit,
        "offset": offset,
        "shard": shard,
        "chunk": chunk,
        "post": post,
        "complete": False,
        "provenance": {**(provenance or {}), "date": _now()},
    }
    description = json.loads(json.dumps(description))
    try:
        if not (path / "zarr.json").exists():
            _make(path, description)
        store = open_store(path)
        _check_same(path, store.description, description)
        store.repair()
    except OSError as error:
        raise ValueError(str(error)) from error
    return store


def open_store(path):
    """The `Store` that `create` has made; ValueError, one sentence, if it is another's."""
    path = Path(path)
    try:
        description = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        description = description["attributes"]["lamina"]
        itemgetter("complete", "post")(description)  # of another version, or edited, it lacks some
        zarr_shards.metadata(description)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        got = "none there" if not path.exists() else "something else"
        raise ValueError(
            f"{path}: expected a store that infer.py has begun, got {got}; give another path"
        ) from error
    return Store(path, description)


def unfinished(path):
    """A sentence if a path is of a store, some shards of which are missing, else ""."""
    with contextlib.suppress(ValueError):
        store = open_store(ome_zarr.split(path)[0])
        if not store.description["complete"] or store.missing() or store.missing(mask=True):
            return (
                f"{path}: expected a finished prediction, got a store of which "
                f"{len(store.missing())} shards and {len(store.missing(mask=True))} masks of "
                f"shards are missing, of {math.prod(store.grid)}; run infer.py again"
            )
    return ""


def probability(path, name=None, box=(slice(None),) * 3):
    """The `Volume` (1, D, H, W) float32 of a box of the probability of a region in a store.

    name: of the region, None where there is only one. ValueError for what is not there.
    """
    store = open_store(ome_zarr.split(path)[0])
    names = list(store.description["names"])
    if name not in (names if len(names) > 1 else [None, *names]):
        raise VolumeError(
            f"{path}: expected the probability of {name or 'one foreground'}, got those of "
            f"{', '.join(names)}"
        )
    volume = files.read_image(store.path, box)
    channel = names.index(name) if name in names else 0
    array = volume.array[channel : channel + 1] / np.float32(255)
    return replace(volume, array=array)


def _holds_bytes(path):
    """Whether a file is there and not empty, as one is that a file system lost in a crash."""
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False


def _make(path, description):
    """A new store, which is there with all its metadata or not at all."""
    is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not is_free and not (path / "zarr.json").exists():  # by now, of another process
        raise ValueError(
            f"{path}: expected a new path, or a store that infer.py has begun, got something else; "
            "give another output"
        )
    with _in_one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial_", dir=path.parent) as folder:
            new = Path(folder) / "store"
            for name, content in zarr_shards.metadata(description).items():
                _write_json(new / name, content)
            try:
                os.rename(new, path)
            except OSError:
                if not (path / "zarr.json").exists():  # another process was first
                    raise
        atomic.sync_folder(path.parent)


def _write_json(folder, content):
    with _replacing(folder / "zarr.json") as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(path):
    """As `atomic.replacing`; OSError is a sentence."""
    with _in_one_sentence(path), atomic.replacing(path) as partial:
        yield partial


@contextlib.contextmanager
def _in_one_sentence(path):
    """An OSError in this context is a sentence about a path, if it is none yet."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(
            f"{path}: expected a disk that takes it, got {error.strerror}; make room and "
            "start again: only what is missing will be done"
        ) from error


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _check_same(path, stored, given):
    """ValueError if two descriptions are of different predictions."""
    # The order of the regions counts, which dicts do not compare.
    stored, given = (_flat(d | {"names": list(d["names"].items())}) for d in (stored, given))
    keys = [key for key in {**stored, **given} if key not in NOT_COMPARED]
    differences = [
        f"{key.removeprefix('provenance.')} {_short(stored, key)} instead of {_short(given, key)}"
        for key in keys
        if stored.get(key) != given.get(key) or (key in stored) != (key in given)
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"{path}: expected the store of this prediction, got one with "
            f"{', '.join(differences[:4])}{more}; go on with what it was begun with, or give "
            "another output"
        )


def _flat(values, prefix=""):
    """{"a.b": value} of {"a": {"b": value}}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(values, key):
    text = json.dumps(values[key]) if key in values else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."
