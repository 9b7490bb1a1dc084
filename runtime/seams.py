"""Whether the borders of shards and windows can be seen in a prediction, and how much it depends
on where its windows lie.

    found = check_seams(probability, borders_of(shape, shard, starts, extent))
    print("\\n".join(describe(found)))
    dice = shift_consistency(predictor, volume, box)        # {region: Dice}

Sheets and vessels make steps of their own, far larger than a seam, and most voxels are 0. So each
step is compared with the steps beside it: across a plane of borders, the share of steps that stick
out of the two beside them on their line of voxels. Inside, this share is near that of the planes
beside it, whatever the prediction shows; a seam makes many steps stick out, most of them in flat
places, inside a structure or around it.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.parts import assemble
from runtime.window_axis import extent_of, window_starts

STICKS_OUT = 4  # of 255: a rounded probability is off by one half
BLOCK = 128  # voxels along each axis that are read at once
EPSILON = 0.002  # share of a plane: below it, planes do not differ
FEWEST_PLANES, LEAST_SPREAD = 8, 0.02  # inside
NOTICED, UNLIKELY = 1.5, 6.0  # times the share inside and deviations, from which on it is a seam


class Seams(NamedTuple):
    """What the borders of one kind on one axis show; shares are of the steps across a plane."""

    kind: str
    axis: str
    planes: int  # of borders
    share: float  # that stick out across borders
    inside: float  # across the planes beside them
    ratio: float
    deviations: float  # of the ratio, in standard deviations of planes inside
    worst: int  # the border with the largest ratio, as the voxel that it lies before
    worst_ratio: float
    worst_deviations: float
    largest_inside: float  # the largest ratio of a plane inside

    @property
    def visible(self):
        """Whether all borders together, or one of them, show a seam."""
        return (
            self.ratio > NOTICED
            and self.deviations > UNLIKELY
            or self.worst_ratio > max(NOTICED, self.largest_inside)
            and self.worst_deviations > UNLIKELY
        )


def window_borders(shape, window, overlap, ratio=(1, 1, 1)):
    """Where windows of `predict_slabs` begin and end on each axis, as voxels that follow a border.
    """
    borders = []
    for size, length, r in zip(shape, window, ratio, strict=True):
        extent = extent_of(length, r)
        starts = window_starts(size, extent, overlap)
        borders.append([*starts[1:], *(start + extent for start in starts[:-1])])
    return borders


def check_seams(probability, shard, borders, progress=lambda done, total: None):
    """[`Seams`] of each kind and axis that has borders far enough from others to judge.

    probability (D, H, W) or (C, D, H, W) uint8: anything that is sliced as an array; each voxel is
    read once, in blocks. shard (z, y, x): each face of a shard is judged by itself too.
    borders: {kind: [[voxel that follows a border, ...] of z, of y, of x]}; those of shards are
    added. Memory: three planes of the volume, and a count for each face of each plane.
    """
    if np.dtype(probability.dtype) != np.uint8:
        raise ValueError(f"expected probabilities in uint8, p = value / 255, got {probability.dtype}")
    shape = probability.shape[-3:]
    own = [list(range(step, size, step)) for size, step in zip(shape, shard, strict=True)]
    kinds, rows = {"shard": own, **borders}, []
    counts = _count(probability, shard, progress)
    for axis, name in enumerate("zyx"):
        every = {place for kind in kinds.values() for place in kind[axis]}
        voxels = _voxels_of_faces(probability.shape, shard, axis)
        for kind, places in kinds.items():
            if seams := _judge(counts[axis], voxels, sorted({*places[axis]}), every):
                rows.append(Seams(kind, name, *seams))
    return rows


def describe(rows):
    """Lines for people: a table of `check_seams`, and what it means."""
    lines = ["axis borders    planes  steps that stick out  ratio  deviations  worst"]
    for row in rows:
        lines.append(
            f"{row.axis:4} {row.kind:9} {row.planes:7}  {100 * row.share:6.2f} %, "
            f"inside {100 * row.inside:5.2f} %  {row.ratio:5.2f}  {row.deviations:10.1f}  "
            f"{row.worst_ratio:.2f} at {row.worst} (inside up to {row.largest_inside:.2f})"
        )
    if not rows:
        return ["no borders to judge: one shard and one window, or too few planes between them"]
    seen = [f"{row.kind} borders on {row.axis}" for row in rows if row.visible]
    normal = f"normal is a ratio of 0.8 to 1.2; a seam is above {NOTICED} by {UNLIKELY:g} deviations"
    return [*lines, normal, f"seams: {', '.join(seen)}" if seen else "no seam is visible"]


# ---------------------------------------------------------------------------- counting


def _count(probability, shard, progress):
    """How many steps stick out in each plane of each face: for each axis (size, tiles, tiles).

    Plane k lies before voxel k. The tiles are those of the shards on the other two axes.
    """
    shape = probability.shape[-3:]
    grid = [-(-size // step) for size, step in zip(shape, shard, strict=True)]
    counts = [np.zeros((shape[a], *np.delete(grid, a)), np.int64) for a in range(3)]
    blocks = [_blocks(size, step) for size, step in zip(shape, shard, strict=True)]
    last_planes, total = {}, math.prod(map(len, blocks))
    for number, box in enumerate(itertools.product(*blocks)):
        corner = [s.start for s in box]
        block = np.asarray(probability[(..., *box)], np.int16)
        block = block.reshape(-1, *block.shape[-3:])
        for axis in range(3):
            place = axis, *np.delete(corner, axis).tolist()
            before = last_planes.pop(place, None)
            lines = np.moveaxis(block, axis + 1, 0)
            if before is not None:
                lines = np.concatenate([before, lines])
            end = box[axis].stop
            if end < shape[axis]:
                last_planes[place] = lines[-3:].copy()
            if len(lines) < 4:
                continue
            steps = np.abs(np.diff(lines, axis=0))
            beside = np.maximum(steps[:-2], steps[2:])
            out = (steps[1:-1] >= beside + STICKS_OUT).sum(axis=(1, 2, 3))
            first = end - len(lines) + 2
            tile = tuple(c // s for c, s in np.delete([corner, shard], axis, 1).T)
            counts[axis][(slice(first, first + len(out)), *tile)] += out
        progress(number + 1, total)
    return counts


def _blocks(size, step):
    """Slices of an axis, BLOCK long at most, none of which goes over a border of shards."""
    ends = [*range(step, size, step), size]
    return [
        slice(start, min(start + BLOCK, end))
        for end in ends
        for start in range((end - 1) // step * step, end, BLOCK)
    ]


def _voxels_of_faces(shape, shard, axis):
    """Voxels of each face that a plane across an axis has: (tiles, tiles)."""
    lengths = []
    for size, step in np.delete([shape[-3:], shard], axis, 1).T:
        starts = np.arange(0, size, step)
        lengths.append(np.minimum(starts + step, size) - starts)
    return np.outer(*lengths) * math.prod(shape[:-3])


# ---------------------------------------------------------------------------- judging


def _judge(counts, voxels, places, every):
    """What `Seams` says after kind and axis, or None where no border can be judged.

    counts (size, tiles, tiles) of all planes; places: the borders of this kind, every: of all.
    """
    size, every = len(counts), np.array([*every], int)
    planes = np.arange(2, size - 1)  # with a step on both sides
    # A seam hides what sticks out of it in the planes next to it.
    inside = np.zeros(size, bool)
    inside[planes] = ~np.isin(planes, [every - 1, every, every + 1])
    faces = counts.reshape(size, -1) / voxels.reshape(-1)
    whole = counts.sum(axis=(1, 2))[:, None] / voxels.sum()
    beside = _beside(whole, inside)
    usable = np.isfinite(beside[:, 0])
    inner = np.flatnonzero(inside & usable)
    places = [k for k in places if 2 <= k <= size - 2 and usable[k]]
    if not places or len(inner) < FEWEST_PLANES:
        return None
    logs = _logs(faces, _beside(faces, inside))
    spread = _spread(logs[inner])
    border, face = np.unravel_index(np.argmax(logs[places] / spread), (len(places), logs.shape[1]))
    worst = logs[places[border], face]
    shares = whole[places].mean(), beside[places].mean()
    together = float(_logs(*shares))
    return (
        len(places),
        *map(float, shares),
        math.exp(together),
        together / float(_spread(_logs(whole, beside)[inner])[0]) * math.sqrt(len(places)),
        places[border],
        math.exp(worst),
        float(worst / spread[face]),
        math.exp(logs[inner, face].max()),
    )


def _beside(shares, inside):
    """The mean share (size, faces) of the planes inside that lie 2 or 3 from each; NaN of none."""
    size, total = len(shares), np.zeros_like(shares)
    count = np.zeros((size, 1))
    for step in (-3, -2, 2, 3):
        to, of = slice(max(0, -step), size - max(0, step)), slice(max(0, step), size + min(0, step))
        total[to] += np.where(inside[of, None], shares[of], 0)
        count[to] += inside[of, None]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _logs(shares, beside):
    return np.log((shares + EPSILON) / (beside + EPSILON))


def _spread(logs):
    """Standard deviation of the planes inside, of each face."""
    return np.maximum(logs.std(axis=0), LEAST_SPREAD)
