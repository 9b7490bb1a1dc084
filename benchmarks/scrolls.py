"""Volumes larger than memory: phantoms as OME-Zarr of any size, and what their prediction costs.

    python benchmarks/scrolls.py phantom --size 1024 --format v3 --air 0.9 scroll.zarr
    python benchmarks/scrolls.py memory --sizes 512 1024 --formats v2 v3   # peak, read factor, time
    python benchmarks/scrolls.py air --size 512                # 90 % zeros beside a full volume
    .venv-bench/bin/python benchmarks/scrolls.py monai --size 512   # beside its ZarrAvgMerger

Without --ckpt a tiny network is trained for some seconds. Each prediction is a process of its own;
its peak is the largest sum of the private memory of it and its helpers, sampled 20 times a second,
above that of a process which has imported infer.py and does nothing. Leaves only `phantom`'s file.
"""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import zarr

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from volumes import phantoms

CHUNK, SHARD = 128, 512
MICRON = 7.91  # the voxel size of a scroll

# ---------------------------------------------------------------------------- phantoms


def write_phantom(path, size, kind="v3", air=0.0, seed=0, shard=SHARD):
    """A scroll (size, size, size) uint8 as OME-Zarr: kind "v2" is 0.4, "v3" is 0.5 in shards.

    One phantom of 128^3 is repeated, mirrored, so that it goes on across chunks. air: share of
    zeros around a cylinder along z; chunks of zeros are not stored, as in published scrolls.
    Memory: a shard.
    """
    tile = phantoms.scroll((CHUNK,) * 3, seed).image
    tile = np.maximum(tile, 1)  # 0 is air
    group = zarr.open_group(path, mode="w", zarr_format=2 if kind == "v2" else 3)
    block, how = CHUNK, {}
    if kind == "v3":
        block = how["shards"] = min(shard, -(-size // CHUNK) * CHUNK)
        how["shards"] = (block,) * 3
    array = group.create_array(
        "0", shape=(size,) * 3, chunks=(CHUNK,) * 3, dtype="u1", fill_value=0, **how
    )
    radius = size * np.sqrt((1 - air) / np.pi)
    for z, y, x in np.ndindex(*(-(-size // block),) * 3):
        box = tuple(slice(i * block, min((i + 1) * block, size)) for i in (z, y, x))
        places = [np.arange(s.start, s.stop) for s in box]
        mirrored = [np.where(p // CHUNK % 2, CHUNK - 1 - p % CHUNK, p % CHUNK) for p in places]
        values = tile[np.ix_(*mirrored)]
        if air:
            away = [(p - (size - 1) / 2) ** 2 for p in places[1:]]
            values = values * (away[0][:, None] + away[1] < radius**2)
        array[box] = values
    group.attrs.update(_metadata(kind))


def _metadata(kind):
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    scale = [{"type": "scale", "scale": [MICRON] * 3}]
    level = {"path": "0", "coordinateTransformations": scale}
    image = {"name": "scroll", "axes": axes, "datasets": [level]}
    if kind == "v2":
        return {"multiscales": [{"version": "0.4"} | image]}
    return {"ome": {"version": "0.5", "multiscales": [image]}}
