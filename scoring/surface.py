"""Surfaces of two masks: what share of them lies close to the other, and how far they are apart.

    surface_dice(prediction, truth, spacing, tolerance=2.0)
    hausdorff(prediction, truth, spacing, percentile=95.0)
    average_surface_distance(prediction, truth, spacing)

As Nikolov et al. 2018 (arXiv:1809.04430) define it and their package `surface-distance` computes
it: surface elements stand on voxel corners, one for each 2 x 2 x 2 neighbourhood of mixed values,
weighted by its marching-cubes area. The distance of an element is that to the nearest element of
the other mask. Outside of the volume is background. Release 0.1 of the package fails on NumPy 2
where one mask is empty.

Masks are (D, H, W) bool, spacing is z, y, x, and a distance is in the spacing's unit. Both masks
empty: surface Dice 1, distances 0. One of them empty: surface Dice 0, distances the diagonal of the
volume. That is the largest distance that two corners can have, so that a mean over cases stays a
number and an empty prediction never pays (the package has infinity there, the BraTS challenge the
diagonal). ValueError for a spacing that is not three numbers from 1e-30 to 1e30 (beyond, areas and
squares leave the range of floats), for a tolerance below 0, and for a percentile outside of 0 to
100.

Surface Dice asks each corner for one bit, 64 corners at a time: the other surface is dilated by the
tolerance's ball as packed words. For the rest see neighbours.py. All of it is exact.
"""

import functools
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from scoring.corners import bounding_box, extract, is_mixed, surfel_areas
from scoring.neighbours import nearest_distances

# Rows of a ball (z, y offsets) up to which a dilation costs less than distances: 1500 take 1 s for
# two surfaces in 320 x 320 x 320.
_MOST_ROWS = 1500
_STEPS = 1e-30, 1e30  # least and largest spacing


class SurfacePair:
    """Two surfaces and what is asked of them; the distances are made once, when first needed."""

    def __init__(self, prediction, truth, spacing, diagonal, *, threads=2):
        """prediction and truth: `Corners` in one box; diagonal: of the volume, in the unit."""
        self.corners, self.threads = (prediction, truth), threads
        self.spacing = checked_spacing(spacing)
        self.diagonal = diagonal
        self.empty = [not found.histogram.any() for found in self.corners]

    def dice(self, tolerance=2.0):
        """The share of both surfaces within `tolerance` of the other one, in [0, 1]."""
        tolerance = checked_tolerance(tolerance)
        if any(self.empty):
            return float(all(self.empty))
        area = surfel_areas(self.spacing)
        whole = sum(float(found.histogram @ area) for found in self.corners)
        rows = _ball_rows(tolerance, self.spacing)
        if rows is None:
            found = [codes[away > tolerance] for away, codes in self.distances]
            far = [np.bincount(codes, minlength=256) for codes in found]
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                pairs = (self.corners, self.corners[::-1], (rows, rows))
                far = list(pool.map(_beyond, *pairs))
        return 1.0 - sum(float(counts @ area) for counts in far) / whole

    @functools.cached_property
    def distances(self):
        """Of prediction and truth: (distances (N,) float64, codes (N,) uint8) of its corners."""
        with ThreadPoolExecutor(self.threads) as pool:
            spacings = (self.spacing, self.spacing)
            found = pool.map(nearest_distances, self.corners, self.corners[::-1], spacings)
            codes = [
                c.codes.reshape(-1).compress(is_mixed(c.codes).reshape(-1)) for c in self.corners
            ]
            return list(zip(found, codes, strict=True))

    def hausdorff(self, percentile=100.0):
        """The distance within which `percentile` % of either surface's area lies from the other.

        100: the Hausdorff distance; 95: HD95, "robust Hausdorff" in the package.
        """
        percentile = checked_percentile(percentile)
        if any(self.empty):
            return 0.0 if all(self.empty) else self.diagonal
        area = surfel_areas(self.spacing)
        with ThreadPoolExecutor(self.threads) as pool:
            of_one = functools.partial(_percentile, area=area, percentile=percentile)
            return max(pool.map(of_one, *zip(*self.distances, strict=True)))

    def average_distances(self):
        """Mean distance by area (from the prediction to the truth, from the truth to it)."""
        if any(self.empty):
            return (0.0, 0.0) if all(self.empty) else (self.diagonal, self.diagonal)
        sums, areas = self._weighted()
        return tuple(part / area for part, area in zip(sums, areas, strict=True))

    def assd(self):
        """Average symmetric surface distance: the mean by area over both surfaces together."""
        if any(self.empty):
            return 0.0 if all(self.empty) else self.diagonal
        sums, areas = self._weighted()
        return sum(sums) / sum(areas)

    def _weighted(self):
        area = surfel_areas(self.spacing)
        sums = [float((area[codes] * away).sum()) for away, codes in self.distances]
        return sums, [float(found.histogram @ area) for found in self.corners]


# ---------------------------------------------------------------------------- of two masks


def surface_dice(prediction, truth, spacing=(1.0, 1.0, 1.0), tolerance=2.0):
    """The share of both surfaces that lies within `tolerance` of the other one, in [0, 1].

    prediction and truth (D, H, W) bool; spacing (z, y, x) and tolerance (0 or more, a distance of
    exactly the tolerance is within) share one unit. Distances are compared as rounded, as in the
    package: 3 steps of 0.2 are more than 0.6, 2 of 0.3 are not. A list of tolerances gives a list.
    1 if both are empty, 0 if one is.
    """
    pair = surface_pair(prediction, truth, spacing)
    if np.ndim(tolerance):
        return [pair.dice(one) for one in tolerance]
    return pair.dice(tolerance)


def hausdorff(prediction, truth, spacing=(1.0, 1.0, 1.0), percentile=95.0):
    """The larger of both directions' `percentile` of surface distances, weighted by area."""
    return surface_pair(prediction, truth, spacing).hausdorff(percentile)


def average_surface_distance(prediction, truth, spacing=(1.0, 1.0, 1.0)):
    """ASSD: the mean distance over the area of both surfaces."""
    return surface_pair(prediction, truth, spacing).assd()


def surface_pair(prediction, truth, spacing=(1.0, 1.0, 1.0), *, threads=2):
    """The `SurfacePair` of two masks (D, H, W)."""
    prediction, truth = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    spacing = checked_spacing(spacing)
    box = bounding_box(prediction | truth)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(extract, (prediction[box], truth[box]))
    return SurfacePair(*found, spacing, diagonal(truth.shape, spacing), threads=threads)


def diagonal(shape, spacing):
    """The distance of the outermost corners of a volume of `shape` voxels."""
    return math.sqrt(sum((n * step) ** 2 for n, step in zip(shape, spacing, strict=True)))


# ---------------------------------------------------------------------------- numbers


def checked_spacing(spacing):
    """spacing as three floats. ValueError for what is not three numbers from 1e-30 to 1e30."""
    steps = tuple(spacing) if np.ndim(spacing) == 1 else ()
    if len(steps) != 3 or not all(_is_number(step, *_STEPS) for step in steps):
        raise ValueError(
            f"spacing: expected three positive numbers z, y, x, from 1e-30 to 1e30, got {spacing}"
        )
    return tuple(map(float, steps))


def checked_tolerance(tolerance):
    """tolerance as a float. ValueError for what is not a number of 0 or more."""
    if not _is_number(tolerance, 0, sys.float_info.max):
        raise ValueError(f"tolerance: expected a number of 0 or more, got {tolerance}")
    return float(tolerance)


def checked_percentile(percentile):
    """percentile as a float. ValueError for what is not a number from 0 to 100."""
    if not _is_number(percentile, 0, 100):
        raise ValueError(f"percentile: expected a number from 0 to 100, got {percentile}")
    return float(percentile)


def _is_number(value, least, most):
    try:
        return not isinstance(value, str) and bool(least <= value <= most)
    except (TypeError, ValueError):  # no number, or several
        return False


# ---------------------------------------------------------------------------- within


def _ball_rows(tolerance, spacing):
    """{half width in x: the (z, y) offsets of the ball's rows of that width}; None: too many."""
    if max(tolerance / step for step in spacing) > _MOST_ROWS:
        return None
    reach = [int(tolerance / step) + 1 for step in spacing]
    if math.pi * reach[0] * reach[1] > _MOST_ROWS:
        return None
    squares = [(np.arange(r + 1) * step) ** 2 for r, step in zip(reach, spacing, strict=True)]
    lengths = np.sqrt(squares[0][:, None, None] + squares[1][:, None] + squares[2])
    widths = np.count_nonzero(lengths <= tolerance, axis=2) - 1
    rows = {}
    for z in range(-reach[0], reach[0] + 1):
        for y in range(-reach[1], reach[1] + 1):
            rows.setdefault(int(widths[abs(z), abs(y)]), []).append((z, y))
    rows.pop(-1, None)
    return rows


def _beyond(own, other, rows):
    """How many corners of `own` of each code no corner of `other` reaches by the ball: (256,)."""
    far = own.bits & ~_dilated(other.bits, rows)
    words = np.flatnonzero(far)
    found = np.unpackbits(far.reshape(-1)[words].view(np.uint8), bitorder="little")
    which, x = np.divmod(np.flatnonzero(found), 64)
    row, word = np.divmod(words[which], far.shape[-1])
    width = own.codes.shape[-1]
    return np.bincount(own.codes.reshape(-1)[row * width + word * 64 + x], minlength=256)


def _dilated(bits, rows):
    """bits (D, H, W/64), each 1 spread over the ball of `rows`."""
    run, out = bits.copy(), np.zeros_like(bits)
    for half in range(max(rows) + 1):
        if half:  # runs of 2 half - 1 in x become runs of 2 half + 1
            _or_shifted(run, bits, half)
            _or_shifted(run, bits, -half)
        for offset in rows.get(half, ()):
            to, of = zip(*map(_overlap, offset, bits.shape), strict=True)
            out[to] |= run[of]
    return out


def _overlap(offset, size):
    """(where to, where from) of a move by `offset` along an axis of `size`."""
    to = slice(max(offset, 0), max(size + min(offset, 0), 0))
    return to, slice(max(-offset, 0), max(size - max(offset, 0), 0))


def _or_shifted(out, bits, shift):
    """out |= bits moved by `shift` corners in x; what leaves is lost."""
    words, rest = divmod(shift, 64)  # shift = 64 words + rest, 0 <= rest < 64
    to, of = _overlap(words, bits.shape[-1])
    out[..., to] |= bits[..., of] << np.uint64(rest)
    if rest:  # what is shifted out of a word enters the next one
        to, of = _overlap(words + 1, bits.shape[-1])
        out[..., to] |= bits[..., of] >> np.uint64(64 - rest)


# ---------------------------------------------------------------------------- percentiles


def _percentile(distances, codes, area, percentile):
    """The least distance within which `percentile` % of the corners' area lies.

    In the package's order of summation: where the share is met exactly but for rounding, as in
    half of one voxel's corners, it is rounding that decides, and so alike.
    """
    if percentile == 100:
        return float(distances.max())
    _, rank = np.unique(area, return_inverse=True)
    order = np.lexsort((rank.astype(np.uint8)[codes], distances))
    areas = area[codes[order]]
    place = np.searchsorted(np.cumsum(areas) / np.sum(areas), percentile / 100)
    return float(distances[order[min(place, order.size - 1)]])
