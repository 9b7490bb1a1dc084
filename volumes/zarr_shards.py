"""What OME-Zarr 0.5 consists of: levels, pooled voxels, files of shards, metadata.

    for level, (shard, chunk) in enumerate(levels_of((512, 512, 512), (128, 128, 128))):
        write_shard(file, voxels, shard, chunk)
        voxels = pool(voxels)

Shards are encoded here, chunk by chunk into the file, rather than by `zarr`, which keeps a copy of
the whole shard and puts no file where all voxels are 0.
"""

import math

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from volumes import colors

PROBABILITY, MASK, RAW = "", "labels/mask", ".lamina/raw"  # folders of the levels
LEVEL = 3  # of zstd
ABSENT = 2**64 - 1  # offset and size of a chunk of zeros, in the index of a shard
OME_UNITS = {"m": "meter", "mm": "millimeter", "micron": "micrometer", "nm": "nanometer"}


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
    held = (len(voxels), *(-(-n // c) for n, c in zip(voxels.shape[1:], chunk, strict=True)))
    for place in np.ndindex(held):  # few of a shard that is larger than the volume
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


def metadata(description):
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
