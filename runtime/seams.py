"""Whether the borders of shards and windows can be seen in a prediction, and how much it depends
on where its windows lie.

    rows = check_seams(probability, shard, {"window": window_borders(starts, lengths)})
    print("\\n".join(describe(rows)))
    dice = shift_consistency(predictor, volume, box)        # {region: Dice}

Sheets and vessels make steps of their own, far larger than a seam, and most voxels are 0. So a step
between two voxels is compared with the two beside it on its line: it sticks out if it is the
largest. Inside, the share of such steps is that of the planes near by, whatever the prediction
shows; a seam makes many more stick out, most of them in flat places. Steps to where all is 0 do
not count: masks of the input have borders too.
"""

import itertools
import math
import time
from typing import NamedTuple

import numpy as np

from runtime import scrolls
from runtime.log import SECONDS_BETWEEN_LINES
from runtime.microbatch import nothing
from runtime.sliding_window import network_ratio
from runtime.window_axis import extent_of
from volumes import ome_zarr, zarr_store
from volumes.volume import box_within

# Planes that a plane is compared with. The strides of a network leave a pattern of 2 and 4 voxels.
BESIDE = (-8, -4, 4, 8)
BLOCK = 128  # voxels along each axis that are read at once
LEAST_SHARE = 0.002  # of the steps across a face: planes do not differ by so few
FEWEST_PLANES, LEAST_SPREAD = 8, 0.02  # inside
NOTICED, UNLIKELY = 1.25, 6.0  # ratio and standard deviations of a seam


class Seams(NamedTuple):
    """What the borders of one kind on one axis show; shares are of the steps across a plane."""

    kind: str
    axis: str
    planes: int  # of borders
    share: float  # that stick out across borders
    inside: float  # across the planes beside them
    ratio: float
    deviations: float  # of the ratio, in standard deviations of planes inside
    worst: int  # voxel after the border of which one face of a shard deviates most
    worst_ratio: float
    worst_deviations: float
    largest_inside: float  # ratio of that face across planes inside

    @property
    def visible(self):
        """Whether all borders together, or the worst face, show a seam."""
        together = self.ratio > NOTICED and self.deviations > UNLIKELY
        usual = max(NOTICED, self.largest_inside)
        return together or (self.worst_ratio > usual and self.worst_deviations > UNLIKELY)


def window_borders(starts, lengths):
    """Where windows begin and end on each axis: the voxel after each border, some out of the
    volume. starts: of the windows on each axis; lengths (z, y, x) in voxels."""
    return [
        [border for start in own for border in (start, start + length)]
        for own, length in zip(starts, lengths, strict=True)
    ]


def check_seams(probability, shard, borders, progress=nothing):
    """[`Seams`] of each kind and axis that has borders and enough planes between them.

    probability (C, D, H, W) uint8, p = value / 255: anything that is sliced like an array. Each
    voxel is read once, in blocks. shard (z, y, x): the grid of shards, whose faces are also judged
    one by one. borders {kind: of z, y and x the voxels after a border}: other than those of shards;
    a plane of two kinds counts for the first. progress: called with counts of blocks. Memory: three
    planes of the volume, and a number for each face across each plane. ValueError: another dtype.
    """
    if probability.dtype != np.uint8:
        raise ValueError(f"expected probabilities as uint8, got {probability.dtype}")
    shape = probability.shape[1:]
    of_shards = [range(step, size, step) for size, step in zip(shape, shard, strict=True)]
    counts, rows = _count(probability, shard, progress), []
    for axis, name in enumerate("zyx"):
        kinds = {"shard": of_shards, **borders}.items()
        kinds = {kind: {k for k in own[axis] if 0 < k < shape[axis]} for kind, own in kinds}
        every, before = set().union(*kinds.values()), set()
        for kind, own in kinds.items():
            if seams := _judge(counts[axis], sorted(own - before), every):
                rows.append(Seams(kind, name, *seams))
            before |= own
    return rows


def print_seams(path, say):
    """Say what `check_seams` says of a prediction that infer.py has written; 1 if there are seams,
    else 0. ValueError, one sentence, if it is none, or not complete."""
    description = zarr_store.open_store(path).description
    probability = ome_zarr.open_volume(path)
    grid, last = description["provenance"]["grid"], time.perf_counter()

    def progress(done, total):
        nonlocal last
        if time.perf_counter() - last > SECONDS_BETWEEN_LINES:
            say(f"{done} of {total} blocks")
            last = time.perf_counter()

    borders = {"window": window_borders(grid["starts"], grid["window"])}
    rows = check_seams(probability, description["shard"], borders, progress)
    say("\n".join(describe(rows)))
    return int(any(row.visible for row in rows))


def describe(rows):
    """Lines for people: a table of `check_seams`, and what it means."""
    if not rows:
        return ["no borders to judge: one shard and one window, or too few planes between them"]
    lines = ["axis  borders      planes  stick out   inside  ratio  deviations  worst face"]
    for row in rows:
        lines.append(
            f"{row.axis:5} {row.kind:11} {row.planes:7} {100 * row.share:8.2f} % "
            f"{100 * row.inside:6.2f} % {row.ratio:6.2f} {row.deviations:11.1f}  "
            f"{row.worst_ratio:.2f} at {row.worst}, inside up to {row.largest_inside:.2f}"
        )
    lines.append(
        f"normal: ratio 0.85 to 1.15, within 4 deviations; a seam: above {NOTICED} by more than "
        f"{UNLIKELY:g} deviations"
    )
    seen = ", ".join(f"{row.kind} borders on {row.axis}" for row in rows if row.visible)
    return [*lines, f"seams at {seen}" if seen else "no seam"]


# ---------------------------------------------------------------------------- counting


def _count(probability, shard, progress):
    """How many steps stick out across each plane, and of how many: of each axis (2, size, tiles,
    tiles).

    Plane k lies before voxel k. Tiles are those of the shards along the two other axes. A step is
    left out where both voxels on one side are 0: there the input is masked, or there is nothing.
    """
    shape = probability.shape[1:]
    grid = [-(-size // step) for size, step in zip(shape, shard, strict=True)]
    counts = [np.zeros((2, shape[axis], *np.delete(grid, axis)), np.int64) for axis in range(3)]
    blocks = [_blocks(size, step) for size, step in zip(shape, shard, strict=True)]
    ends, total = {}, math.prod(map(len, blocks))  # the last planes of blocks that others follow
    for number, box in enumerate(itertools.product(*blocks), start=1):
        corner = [s.start for s in box]
        block = np.asarray(probability[(slice(None), *box)], np.int16)
        tile = [c // step for c, step in zip(corner, shard, strict=True)]
        for axis in range(3):
            place, lines = (axis, *np.delete(corner, axis)), np.moveaxis(block, axis + 1, 0)
            if corner[axis]:
                lines = np.concatenate([ends.pop(place), lines])
            if box[axis].stop < shape[axis]:
                ends[place] = lines[-3:].copy()
            steps, filled = np.abs(np.diff(lines, axis=0)), (lines[:-1] | lines[1:]) > 0
            counted = filled[:-2] & filled[2:]
            out = counted & (steps[1:-1] > np.maximum(steps[:-2], steps[2:]))
            first = box[axis].stop - len(lines) + 2
            where = (slice(first, first + len(out)), *np.delete(tile, axis))
            for number_of, what in zip(counts[axis], (out, counted), strict=True):
                number_of[where] += what.sum(axis=(1, 2, 3))
        progress(number, total)
    return counts


def _blocks(size, step):
    """Slices of an axis, BLOCK long at most, none of which goes over a border of shards."""
    starts = [k for first in range(0, size, step) for k in range(first, first + step, BLOCK)]
    starts = [k for k in starts if k < size]
    return [slice(*pair) for pair in itertools.pairwise([*starts, size])]


# ---------------------------------------------------------------------------- judging


def _judge(counts, places, every):
    """What `Seams` says after kind and axis, or None where no border can be judged.

    counts (2, size, tiles, tiles) as of `_count`; places: the borders of this kind, every: of all.
    """
    size, every = counts.shape[1], np.array([*every], int)
    planes = np.arange(2, size - 1)  # with a step on both sides
    inside = np.zeros(size, bool)
    # A seam keeps the steps next to it from sticking out.
    inside[planes] = ~np.isin(planes, [every - 1, every, every + 1])
    faces = counts.reshape(2, size, -1)
    whole = faces.sum(axis=2, keepdims=True)
    usable, expected = _expected(whole, inside)
    inner = np.flatnonzero(inside & usable)
    places = [k for k in places if 2 <= k < size - 1 and usable[k]]
    if not places or len(inner) < FEWEST_PLANES:
        return None
    logs = _logs(faces, _expected(faces, inside)[1])
    spread = _spread(logs[inner])
    border, face = np.unravel_index(np.argmax(logs[places] / spread), (len(places), logs.shape[1]))
    worst = logs[places[border], face]
    (out, counted), wanted = whole[:, places].mean(axis=1), expected[places].mean(axis=0)
    floor = LEAST_SHARE * whole[1].max() + 1
    together = float(np.log((out + floor) / (wanted + floor))[0])
    spread_together = float(_spread(_logs(whole, expected)[inner])[0])
    return (
        len(places),
        *(float(steps[0] / max(counted[0], 1)) for steps in (out, wanted)),
        math.exp(together),
        together / spread_together * math.sqrt(len(places)),
        places[border],
        math.exp(worst),
        float(worst / spread[face]),
        math.exp(logs[inner, face].max()),
    )


def _expected(counts, inside):
    """(whether a plane has planes inside BESIDE it (size,), how many of its steps stick out if
    their share is that of those (size, faces)) of counts (2, size, faces)."""
    size, sums, has = len(inside), np.zeros(counts.shape), np.zeros(len(inside), bool)
    for step in BESIDE:
        to = np.arange(max(0, -step), size - max(0, step))
        to = to[inside[to + step]]
        sums[:, to] += counts[:, to + step]
        has[to] = True
    return has, sums[0] / np.maximum(sums[1], 1) * counts[1]


def _logs(counts, expected):
    floor = LEAST_SHARE * counts[1].max(axis=0) + 1
    return np.log((counts[0] + floor) / (expected + floor))


def _spread(logs):
    """Standard deviation of the planes inside, of each face."""
    return np.maximum(logs.std(axis=0), LEAST_SPREAD)


# ---------------------------------------------------------------------------- shifted windows


def print_consistency(predictor, inputs, box, say):
    """Say what `shift_consistency` says of the one input; 0. box: as of --bbox. ValueError."""
    if len(inputs) != 1 or not box:
        raise ValueError(
            "--shift-consistency: expected one --input and a --bbox Z0:Z1 Y0:Y1 X0:X1 of it, got "
            f"{len(inputs)} and {'a' if box else 'no'} box; give these"
        )
    (volume,) = inputs
    box, _ = box_within(f"--bbox of {volume.path}", scrolls.parse_box(box), volume.shape)
    for name, dice in shift_consistency(predictor, volume, box).items():
        say(f"Dice of two grids{f', {name}' if predictor.outputs.several else ''}: {dice:.4f}")
    say("normal: 0.94 or more for sheets 3 voxels thick; a higher overlap gives more")
    return 0


def shift_consistency(predictor, volume, box):
    """{region: Dice} of the masks of a box predicted with two grids of windows, half a step apart.

    predictor: `ensemble.Predictor`; volume: an `inputs.Input`; box: three slices with both ends.
    Masks are those of the threshold (where it is auto, of each grid's own in the box), without
    post-processing. NaN where both are empty. ValueError
    for a box that the two grids cannot cover within the volume.
    """
    inference, spacing = predictor.settings.inference, volume.spacing
    ratio = network_ratio(spacing, predictor.metadata["spacing"])
    places = [
        _two_grids(axis, size, extent_of(length, r), inference.overlap, own)
        for axis, size, length, r, own in zip(
            "zyx", volume.shape, inference.window, ratio, box, strict=True
        )
    ]
    masks = []
    with volume.voxels() as voxels:
        for crop in zip(*places, strict=True):
            image = np.asarray(voxels[(slice(None), *crop)])
            z, *area = (
                slice(b.start - c.start, b.stop - c.start) for b, c in zip(box, crop, strict=True)
            )
            slabs = predictor.probabilities(image, spacing, volume.intensity, box=area)
            probs = np.concatenate([planes for _, planes in slabs], axis=1)[:, z]
            masks.append(predictor.thresholded(probs))
    return {name: _dice(own, masks[1][name]) for name, own in masks[0].items()}


def _two_grids(axis, size, extent, overlap, box):
    """Two slices of an axis, one half a step of windows after the other, that both hold a box."""
    step = max(1, math.floor(extent * (1 - overlap) + 1e-6))
    half = step // 2
    if size <= extent + half:  # one window sees all of the axis
        return slice(0, size), slice(0, size)
    # A step more on both sides: a window at the end of a slice has the share of two.
    length = max(extent, min(box.stop - box.start + half + 2 * step, size - half))
    first = min(max((box.start + box.stop - length - half) // 2, 0), size - half - length)
    if not half <= box.start < box.stop <= size - half:
        raise ValueError(
            f"--bbox: expected a box within {half}:{size - half} on axis {axis}, where grids of "
            f"windows half a step apart cover it, got {box.start}:{box.stop}; give a smaller one"
        )
    return slice(first, first + length), slice(first + half, first + half + length)


def _dice(one, other):
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else math.nan
