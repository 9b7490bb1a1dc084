"""Scores of masks larger than memory, added up a block at a time.

    pair = BlockPair(read, shape, spacing, tolerance)   # read(box) -> prediction, truth, labeled
    scores = score(pair, ["dice", "surface_dice@4", "voi_score", "components"])

They are those of `metrics.score`, bit for bit but for the ece, whose sums are rounded in another
order, and for Betti matching, whose tiles are at most TILE voxels wide.
"""

import functools
from collections import Counter
from typing import NamedTuple

import numpy as np

from scoring import calibration, dilation, homology, metrics, partitions, surface
from scoring.blocks import Grid, Joined

# Scores for which distances are not bounded, or skeletons and gaps are of the whole volume.
WHOLE = ("hd95", "hausdorff", "assd", "cldice", "topology_precision", "topology_sensitivity",
         "sheet_recall", "gap_filled")  # fmt: skip
TILE = 160  # as in the Vesuvius Challenge, whose volumes of 320 are cut in two along each axis
_NONE = (0, 0, 0)


def score(pair, names):
    """{name: value} of a `BlockPair`; names: of `metrics.SCORES`, without those in WHOLE."""
    entries = {name: metrics.entry(name) for name in names}
    return {name: kind.of(pair, *number) for name, (kind, number) in entries.items()}


class BlockPair(metrics.Comparison):
    """A `Comparison` that reads its masks a block at a time, once for each kind of score.

    read(box) -> (prediction, truth, labeled) of a box of the volume (D, H, W) of shape: bool
    (d, h, w), neither mask with unlabeled voxels, labeled None: everywhere. probs(box), for the
    ece: float (d, h, w). Some 35 bytes of memory for each voxel of a block, and 140 for each of a
    tile and thread in Betti matching.
    """

    def __init__(
        self, read, shape, spacing=metrics.VOXEL, tolerance=2.0, *, block=None, threads=2,
        probs=None,
    ):  # fmt: skip
        self.read, self.grid, self.probs, self.threads = read, Grid(shape, block), probs, threads
        self.spacing = surface.checked_spacing(spacing)
        self.tolerance = surface.checked_tolerance(tolerance)

    def masks_of(self, box):
        return self.read(box)[:2]

    @functools.cached_property
    def voxels(self):
        counts = np.zeros(3, np.int64)
        for index in self.grid:
            prediction, truth = self.masks_of(self.grid.box(index))
            counts += [np.count_nonzero(m) for m in (prediction, truth, prediction & truth)]
        return tuple(map(int, counts))

    def surfaces_at(self, spacing):
        return BlockSurfaces(self, spacing)

    @functools.cached_property
    def partition(self):
        return joined_partition(self.grid, self.masks_of)

    @functools.cached_property
    def betti(self):
        histograms = self.surfaces.histograms
        joins = [  # cavities: pieces of the background that do not reach the outside
            Joined(self.grid, lambda _, marked: ~marked, connectivity=6, enclosed=True)
            for _ in range(2)
        ]
        for index in self.grid:
            for joined, mask in zip(joins, self.masks_of(self.grid.grown(index)), strict=True):
                joined.add(index, ~mask)
        numbers, pieces = [], (self.partition.predicted, self.partition.true)
        for joined, histogram, count in zip(joins, histograms, pieces, strict=True):
            joined.settle()
            euler = homology.euler_characteristic(histogram, 26)
            numbers.append((count, count + joined.components - euler, joined.components))
        return numbers

    @functools.cached_property
    def matching(self):
        counts = np.zeros((3, 3), np.int64)
        for tile in Grid(self.grid.shape, tile_of(self.grid.shape)).boxes():
            found = homology.betti_matching(*self.masks_of(tile), threads=self.threads)
            counts += [found[dim] for dim in range(3)]
        return {dim: tuple(map(int, row)) for dim, row in enumerate(counts)}

    def ece(self, bins=calibration.BINS):
        off, voxels = np.zeros(calibration.checked_bins(bins)), 0
        for box in self.grid.boxes():
            _, truth, labeled = self.read(box)
            found, number = calibration.gaps_of_bins(self.probs(box), truth, labeled, len(off))
            off, voxels = off + found, voxels + number
        return calibration.mean_gap(off, voxels)


def tile_of(shape):
    """The size (z, y, x) of the tiles of Betti matching: two along each axis, or more that are not
    larger than TILE."""
    return tuple(max(1, -(-n // max(2, -(-n // TILE)))) for n in shape)


class BlockSurfaces:
    """The surface Dice of a `BlockPair`: a corner needs the voxels within the tolerance of it."""

    def __init__(self, pair, spacing):
        self.pair, self.spacing = pair, spacing
        self.area = surface.surfel_areas(spacing)

    def dice(self, tolerance):
        tolerance = surface.checked_tolerance(tolerance)
        rows = dilation.ball_rows(tolerance, self.spacing)
        far, whole = np.zeros((2, 2, 256), np.int64)
        reach = [int(tolerance / step) + 1 for step in self.spacing]
        for corners, own in self._corners(reach):
            whole += [surface.histogram_of(one.codes[own]) for one in corners]
            for counts, ours, theirs in zip(far, corners, corners[::-1], strict=True):
                counts += _beyond(ours, theirs, own, rows, tolerance, self.spacing)
        return surface.share_within(far, whole, self.area)

    @functools.cached_property
    def histograms(self):
        """(2, 256): the corners of each code of prediction and truth."""
        histograms = np.zeros((2, 256), np.int64)
        for corners, own in self._corners(_NONE):
            histograms += [surface.histogram_of(one.codes[own]) for one in corners]
        return histograms

    def _corners(self, reach):
        """(the `surface.Corners` of both masks around a block, slices of the block's own) of each.

        A block has the corners before its voxels, the last one also those behind. The rim of the
        box, where voxels are cut off, is further than the reach from them.
        """
        grid = self.pair.grid
        for index in grid:
            own = grid.box(index)
            wide = grid.box(index, beyond=[r + 1 for r in reach], before=[r + 2 for r in reach])
            corners = [surface.extract(mask) for mask in self.pair.masks_of(wide)]
            yield (
                corners,
                tuple(
                    slice(o.start - w.start, o.stop - w.start + (o.stop == n))
                    for o, w, n in zip(own, wide, grid.shape, strict=True)
                ),
            )


def _beyond(own, other, part, rows, tolerance, spacing):
    """How many corners of `own` in a part of the box no corner of `other` is near: (256,)."""
    if not other.histogram.any() or not own.histogram.any():
        return surface.histogram_of(own.codes[part])
    if rows is not None:
        far = own.bits & ~dilation.spread(other.bits, rows)
        far = dilation.unpack(far, own.codes.shape[2])
    else:
        far = surface.is_mixed(own.codes)
        far[far] = surface.nearest_distances(own, other, spacing) > tolerance
    return np.bincount(own.codes[part][far[part]], minlength=256)


class JoinedPartition(NamedTuple):
    """What `partitions.Partition` says of two masks."""

    predicted: int
    true: int
    split: float
    merge: float

    def variation_of_information(self):
        return self.split, self.merge


def joined_partition(grid, read):
    """The `JoinedPartition` of two masks, read(box) -> prediction, truth.

    Only the sizes of components and of their overlaps are kept, but for those that meet several
    blocks: of these one number for each pair in each block.
    """
    joins, closed = (Joined(grid), Joined(grid)), [Counter(), Counter(), Counter()]
    waiting, voxels, whole, seen = [], 0, np.zeros(2, np.int64), 0
    for index in grid:
        sides = [j.add(index, m) for j, m in zip(joins, read(grid.grown(index)), strict=True)]
        labels = [labels.reshape(-1) for labels, _, _ in sides]
        either = (labels[0] > 0) | (labels[1] > 0)
        pairs, counts = partitions.pairs_of(*(one.compress(either) for one in labels))
        ids = []
        for side, (label, (_, sizes, numbers)) in enumerate(zip(pairs, sides, strict=True)):
            whole[side] += sizes[1:].sum()
            _count(closed[1 + side], sizes[1:][numbers[1:] == 0])
            # 0: background; above 0 the number among all blocks; below 0 of this block alone.
            number = numbers.astype(np.int64)[label] + joins[side].starts[-2]
            ids.append(np.where(numbers[label] > 0, number, np.where(label > 0, -seen - label, 0)))
        voxels, seen = voxels + int(counts.sum()), seen + max(len(sizes) for _, sizes, _ in sides)
        inside = (ids[0] <= 0) & (ids[1] <= 0)
        _count(closed[0], counts[inside])
        waiting.append(np.stack([*ids, counts])[:, ~inside])
    first, second, counts = np.concatenate(waiting, axis=1)
    for side, (joined, ids) in enumerate(zip(joins, (first, second), strict=True)):
        joined.settle()
        ids[ids > 0] = joined.roots[ids[ids > 0] - 1] + 1
        _count(closed[1 + side], [*joined.sizes, voxels - whole[side]])
    _count(closed[0], _sums_of_pairs(first, second, counts))
    sizes = [tuple(np.array(sorted(one.items())).reshape(-1, 2).T) for one in closed]
    return JoinedPartition(
        joins[0].components, joins[1].components, *partitions.information(*sizes)
    )


def _count(counter, sizes):
    for size, times in zip(
        *np.unique(np.asarray(sizes, np.int64), return_counts=True), strict=True
    ):
        counter[int(size)] += int(times)


def _sums_of_pairs(first, second, counts):
    """The sum of counts of each pair that occurs."""
    ranks = [np.unique(ids, return_inverse=True)[1] for ids in (first, second)]
    _, which = np.unique(ranks[0] * (ranks[1].max(initial=0) + 1) + ranks[1], return_inverse=True)
    return np.bincount(which, counts)
