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
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from volumes import atomic, colors

LEVEL = 3  # of zstd
ABSENT = 2**64 - 1  # offset and size of a chunk of zeros, in the index of a shard
PROBABILITY, MASK, RAW, LOCKS = "", "labels/mask", ".lamina/raw", ".lamina/locks"
OME_UNITS = {"m": "meter", "mm": "millimeter", "micron": "micrometer", "nm": "nanometer"}
NOT_COMPARED = ("complete", "provenance.date")


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
        folder = self._file(MASK if mask else PROBABILITY, 0, (0, 0, 0)).parents[2]
        done = {path.relative_to(folder).parts for path in folder.glob("*/*/*")}
        return [i for i in np.ndindex(self.grid) if tuple(map(str, i)) not in done]

    @contextlib.contextmanager
    def lock(self, index, *, mask=False):
        """A context in which no other process writes a shard: whether this one is to write it.

        It is not if another one holds it, or has done it. A killed process holds nothing.
        """
        path = self.path / LOCKS / ".".join(map(str, index))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            free = atomic.try_lock(file)
            yield free and not self._file(MASK if mask else PROBABILITY, 0, index).exists()

    def write(self, index, probability, mask=None, raw=None):
        """Write a shard: probability (C, d, h, w) and mask (d, h, w) of its box, uint8.

        A store with `post` gets raw (C, d, h, w) uint8 in place of the mask. OSError, one sentence,
        if the disk does not take it: then the shard is missing.
        """
        shape = (len(self.description["names"]), *(s.stop - s.start for s in self.box(index)))
        second = raw if self.description["post"] else mask
        expected = shape if self.description["post"] else shape[1:]
        got = [getattr(array, "shape", None) for array in (probability, second)]
        if got != [shape, expected] or {probability.dtype, second.dtype} != {np.dtype(np.uint8)}:
            raise ValueError(f"{self.path}: expected uint8 of {shape} and {expected}, got {got}")
        if self.description["post"]:
            self._put(RAW, 0, index, raw)
        else:
            self.write_mask(index, mask)
        levels = [probability]
        while len(levels) < len(self._levels):
            levels.append(pool(levels[-1]))
        for level in reversed(range(len(levels))):
            self._put(PROBABILITY, level, index, levels[level])

    def write_mask(self, index, mask):
        """Write the mask (d, h, w) uint8 of a shard."""
        for level in reversed(range(len(self._levels))):
            step = 2**level
            self._put(MASK, level, index, mask[None, ::step, ::step, ::step])

    def finish(self):
        """Mark the store as complete if nothing is missing; whether that is so."""
        if self.missing() or self.missing(mask=True):
            return False
        for folder in self.path.rglob("c"):
            for path in folder.rglob(".partial_*"):  # of processes that were killed
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path / ".lamina", ignore_errors=True)
        _write_json(self.path, _root({**self.description, "complete": True}))
        return True

    @property
    def _levels(self):
        return levels_of(self.description["shard"], self.description["chunk"])

    def _file(self, array, level, index):
        channel = ("0",) if self._channels(array) else ()
        return self.path.joinpath(array, str(level), "c", *channel, *map(str, index))

    def _channels(self, array):
        return array != MASK and len(self.description["names"]) > 1

    def _put(self, array, level, index, voxels):
        path, (shard, chunk) = self._file(array, level, index), self._levels[level]
        try:
            with atomic.replacing(path) as partial, open(partial, "wb") as file:
                write_shard(file, voxels, shard, chunk)
        except OSError as error:
            raise OSError(
                f"{path}: expected a disk that takes this shard, got {error.strerror or error}; "
                "make room and start again, which does only what is missing"
            ) from error


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
    if not (path / "zarr.json").exists():
        _make(path, description)
    store = open_store(path)
    _check_same(path, store.description, description)
    return store


def open_store(path, provenance=None):
    """The `Store` that `create` has made; ValueError, one sentence, if it is another's.

    provenance: what it must have been begun with.
    """
    path = Path(path)
    try:
        description = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        description = description["attributes"]["lamina"]
    except (OSError, ValueError, KeyError) as error:
        got = "none there" if not path.exists() else "something else"
        raise ValueError(
            f"{path}: expected a store that infer.py has begun, got {got}; give another path"
        ) from error
    if provenance is not None:
        given = json.loads(json.dumps({**description, "provenance": provenance}))
        _check_same(path, description, given)
    return Store(path, description)


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _check_same(path, stored, given):
    """ValueError if two descriptions are of different predictions."""
    stored, given = _flat(stored), _flat(given)
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


# ---------------------------------------------------------------------------- voxels


def levels_of(shard, chunk):
    """[(shard, chunk)] of each level, both (z, y, x): half of it while half a chunk is left."""
    levels = [(tuple(shard), tuple(chunk))]
    while True:
        shard, before = [s // 2 for s in levels[-1][0]], levels[-1][0]
        if any(s % 2 for s in before) or any(2 * s < c for s, c in zip(shard, chunk, strict=True)):
            return levels
        inner = map(math.gcd, shard, chunk)
        levels.append((tuple(shard), tuple(inner)))


def pool(voxels):
    """Means of 2x2x2 voxels of (C, d, h, w) uint8, halves up; at an odd end of those there are."""
    channels, *size = voxels.shape
    pooled = np.empty((channels, *(-(-s // 2) for s in size)), np.uint8)
    for c, z in np.ndindex(pooled.shape[:2]):
        planes = voxels[c, 2 * z : 2 * z + 2].astype(np.uint16)
        total = planes[0] + planes[-1]  # the last one counts twice where it is alone
        total = total[0::2] + np.concatenate([total[1::2], total[-1:]])[: len(pooled[c, z])]
        last = total[:, -1:]
        total = total[:, 0::2] + np.concatenate([total[:, 1::2], last], 1)[:, : pooled.shape[3]]
        pooled[c, z] = (total + 4) >> 3
    return pooled


def write_shard(file, voxels, shard, chunk):
    """Write voxels (C, d, h, w), which begin where a shard does, as a file of Zarr's sharding.

    Chunks of zeros are left out. Beyond the voxels a chunk is filled with zeros.
    """
    counts = (len(voxels), *(s // c for s, c in zip(shard, chunk, strict=True)))
    index, offset, codec = np.full((*counts, 2), ABSENT, "<u8"), 0, Zstd(LEVEL, checksum=True)
    for place in np.ndindex(counts):
        corner = [i * c for i, c in zip(place[1:], chunk, strict=True)]
        where = tuple(slice(i, i + c) for i, c in zip(corner, chunk, strict=True))
        part = voxels[place[0]][where]
        if part.any():
            block = np.zeros(chunk, np.uint8)
            block[tuple(map(slice, part.shape))] = part
            encoded = codec.encode(block)
            file.write(encoded)
            index[place] = offset, len(encoded)
            offset += len(encoded)
    content = index.tobytes()
    file.write(content + google_crc32c.value(content).to_bytes(4, "little"))


# ---------------------------------------------------------------------------- metadata


def _make(path, description):
    """A new store, which is there with all its metadata or not at all."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"{path}: expected a new path, or a store that infer.py has begun, got something else; "
            "give another output"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=path.parent) as folder:
        new = Path(folder) / "store"
        for name, content in _metadata(description).items():
            _write_json(new / name, content)
        try:
            os.rename(new, path)
        except OSError:
            if not (path / "zarr.json").exists():  # another process was first
                raise
    atomic.sync_folder(path.parent)


def _write_json(folder, content):
    with atomic.replacing(folder / "zarr.json") as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _metadata(description):
    """{folder: content of its zarr.json} of a new store."""
    d = description
    regions = len(d["names"]) if len(d["names"]) > 1 else None
    mask = {"multiscales": [_multiscale(d, "mask", None, "nearest")]}
    values = [{"label-value": value, "name": name} for name, value in d["names"].items()]
    painted = [
        {"label-value": value, "rgba": [*bytes.fromhex(_color(i)), 255]}
        for i, value in enumerate(d["names"].values())
    ]
    source = {"image": "../../"}
    mask["image-label"] = {"colors": painted, "properties": values, "source": source}
    metadata = {
        "": _root(d),
        "labels": _group({"ome": {"version": "0.5", "labels": ["mask"]}}),
        MASK: _group({"ome": {"version": "0.5", **mask}}),
    }
    for level, (shard, chunk) in enumerate(levels_of(d["shard"], d["chunk"])):
        shape = [-(-size // 2**level) for size in d["shape"]]
        metadata[str(level)] = _array(shape, shard, chunk, regions)
        metadata[f"{MASK}/{level}"] = _array(shape, shard, chunk, None)
    if d["post"]:
        metadata[f"{RAW}/0"] = _array(d["shape"], d["shard"], d["chunk"], regions)
    return metadata


def _root(description):
    names = description["names"]
    channels = [
        {
            "label": name,
            "color": _color(i),
            "active": True,
            "window": {"min": 0, "max": 255, "start": 0, "end": 255},
        }
        for i, name in enumerate(names)
    ]
    regions = len(names) if len(names) > 1 else None
    image = {"multiscales": [_multiscale(description, "probability", regions, "mean")]}
    ome = {"version": "0.5", **image, "omero": {"channels": channels}}
    return _group({"ome": ome, "lamina": description})


def _color(number):
    """That of the region of a number, from 0: RRGGBB."""
    return colors.CLASSES[number % len(colors.CLASSES)].lstrip("#").upper()


def _multiscale(description, name, regions, method):
    """method: "mean" of 2x2x2 voxels, whose center lies between theirs, or "nearest"."""
    unit = OME_UNITS.get(description["unit"])
    axes = [{"name": "c", "type": "channel"}] * (regions is not None)
    axes += [{"name": a, "type": "space"} | ({"unit": unit} if unit else {}) for a in "zyx"]
    spacing = description["spacing"] or [1.0, 1.0, 1.0]
    datasets = []
    for level in range(len(levels_of(description["shard"], description["chunk"]))):
        shift = (2**level - 1) / 2 if method == "mean" else 0.0
        places = zip(description["offset"], spacing, strict=True)
        scale = [1.0] * (regions is not None) + [float(s * 2**level) for s in spacing]
        place = [0.0] * (regions is not None) + [float(o + shift * s) for o, s in places]
        transformations = [
            {"type": "scale", "scale": scale},
            {"type": "translation", "translation": place},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    return {"name": name, "axes": axes, "datasets": datasets, "type": method}


def _group(attributes):
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _array(shape, shard, chunk, regions):
    """regions: the length of axis c, in chunks of 1 and shards of all; None without this axis."""
    first = [] if regions is None else [regions]
    bytes_of_chunk = [
        {"name": "bytes"},
        {"name": "zstd", "configuration": {"level": LEVEL, "checksum": True}},
    ]
    sharding = {
        "chunk_shape": [1] * len(first) + list(chunk),
        "codecs": bytes_of_chunk,
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": first + list(shape),
        "data_type": "uint8",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": first + list(shard)},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["c"] * len(first) + list("zyx"),
        "attributes": {},
    }
