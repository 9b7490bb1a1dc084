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
diagonal). ValueError for a spacing that is not three positive numbers, for a tolerance below 0,
and for a percentile outside of 0 to 100.

Surface Dice asks each corner for one bit, 64 corners at a time: the other surface is dilated by the
tolerance's ball as packed words. Distances are looked up at the nearest offsets, shortest first,
which settles nearly all corners of a fair prediction; those further off ask a k-d tree or, where
they are many, a Euclidean transform of the box. All of it is exact: tolerances and distances are
compared as float64, sqrt((dz sz)^2 + (dy sy)^2 + (dx sx)^2).
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy import ndimage, spatial

# Rows of a ball (z, y offsets) up to which a dilation costs less than distances: 1500 take 1 s for
# two surfaces in 320 x 320 x 320.
_MOST_ROWS = 1500
# Offsets that are looked up before a tree is built: those within about 4 voxels.
_MOST_OFFSETS = 257
# A far corner takes as long in a k-d tree as so many voxels in a Euclidean transform.
_VOXELS_PER_QUERY = 20
# Corners that are coded at one go: they and what is made of them stay in the cache.
_SLAB = 2**18


class Surface(NamedTuple):
    """The corners of a mask in a box: (D + 1, H + 1, W + 1) of them for D, H, W voxels."""

    codes: np.ndarray  # (D+1, H+1, W+1) uint8: the 8 voxels around a corner as bits
    bits: np.ndarray  # (D+1, H+1, ceil((W+1)/64)) uint64: 1 where the 8 are mixed, lowest x first
    histogram: np.ndarray  # (256,) int64: corners of each code, but for 0 and 255


class SurfacePair:
    """Two surfaces and what is asked of them; the distances are made once, when first needed."""

    def __init__(self, prediction, truth, spacing, diagonal, *, threads=2):
        """prediction and truth: `Surface`s in one box; diagonal: of the volume, in the unit."""
        self.surfaces, self.threads = (prediction, truth), threads
        self.spacing = checked_spacing(spacing)
        self.diagonal = diagonal
        self.empty = [not surface.histogram.any() for surface in self.surfaces]

    def dice(self, tolerance=2.0):
        """The share of both surfaces within `tolerance` of the other one, in [0, 1]."""
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance: expected a number of 0 or more, got {tolerance}")
        if any(self.empty):
            return float(all(self.empty))
        area = surfel_areas(self.spacing)
        whole = sum(float(surface.histogram @ area) for surface in self.surfaces)
        rows = _ball_rows(tolerance, self.spacing)
        if rows is None:
            found = [codes[away > tolerance] for away, codes in self.distances]
            far = [np.bincount(codes, minlength=256) for codes in found]
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                pairs = (self.surfaces, self.surfaces[::-1], (rows, rows))
                far = list(pool.map(_beyond, *pairs))
        return 1.0 - sum(float(counts @ area) for counts in far) / whole

    @functools.cached_property
    def distances(self):
        """Of prediction and truth: (distances (N,) float64, codes (N,) uint8) of its corners."""
        with ThreadPoolExecutor(self.threads) as pool:
            spacings = (self.spacing, self.spacing)
            return list(pool.map(_distances, self.surfaces, self.surfaces[::-1], spacings))

    def hausdorff(self, percentile=100.0):
        """The distance within which `percentile` % of either surface's area lies from the other.

        100: the Hausdorff distance; 95: HD95, "robust Hausdorff" in the package.
        """
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile: expected a number from 0 to 100, got {percentile}")
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
        return sums, [float(surface.histogram @ area) for surface in self.surfaces]


# ---------------------------------------------------------------------------- of two masks


def surface_dice(prediction, truth, spacing=(1.0, 1.0, 1.0), tolerance=2.0):
    """The share of both surfaces that lies within `tolerance` of the other one, in [0, 1].

    prediction and truth (D, H, W) bool; spacing (z, y, x) and tolerance (0 or more, a distance of
    exactly the tolerance is within) share one unit. A list of tolerances gives a list. 1 if both
    are empty, 0 if one is.
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
        found = pool.map(surface, (prediction[box], truth[box]))
    return SurfacePair(*found, spacing, diagonal(truth.shape, spacing), threads=threads)


def diagonal(shape, spacing):
    """The distance of the outermost corners of a volume of `shape` voxels."""
    return math.sqrt(sum((n * step) ** 2 for n, step in zip(shape, spacing, strict=True)))


def checked_spacing(spacing):
    """spacing as three floats. ValueError for what is not three positive numbers."""
    spacing = tuple(spacing)
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing: expected three positive numbers z, y, x, got {spacing}")
    return tuple(map(float, spacing))


def bounding_box(mask):
    """Slices of the smallest box that holds every True voxel of a mask; empty ones if none is."""
    plane = mask.any(axis=0)
    profiles = (mask.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))
    found = [np.flatnonzero(profile) for profile in profiles]
    if not found[0].size:
        return (slice(0, 0),) * 3
    return tuple(slice(int(f[0]), int(f[-1]) + 1) for f in found)


# ---------------------------------------------------------------------------- corners


def surface(mask):
    """The `Surface` of a mask (D, H, W) bool."""
    shape = tuple(n + 1 for n in mask.shape)
    codes, histogram = np.empty(shape, np.uint8), np.zeros(256, np.int64)
    packed = np.zeros((*shape[:2], -(-shape[2] // 64) * 8), np.uint8)
    thickness = max(1, _SLAB // (shape[1] * shape[2]))
    for start in range(0, shape[0], thickness):
        slab = slice(start, min(start + thickness, shape[0]))
        codes[slab] = _corner_codes(mask, slab)
        mixed = is_mixed(codes[slab])
        found = codes[slab].reshape(-1).compress(mixed.reshape(-1))
        histogram += np.bincount(found, minlength=256)
        rows = np.packbits(mixed, axis=-1, bitorder="little")
        packed[slab, :, : rows.shape[-1]] = rows
    return Surface(codes, packed.view("<u8"), histogram)


def _corner_codes(mask, slab):
    """The codes of the planes `slab` of corners: (n, H+1, W+1) uint8.

    Bit order as in the lookup table of `surface-distance`: the lowest indices are the highest bit.
    """
    planes = slice(max(slab.start - 1, 0), min(slab.stop, mask.shape[0]))
    depth, height, width = slab.stop - slab.start + 1, mask.shape[1] + 2, mask.shape[2] + 2
    bits = np.zeros((depth, height, width), np.uint8)
    first = planes.start - slab.start + 1
    bits[first : first + planes.stop - planes.start, 1:-1, 1:-1] = mask[planes]
    bits = (bits[:, :, :-1] << 1) | bits[:, :, 1:]
    bits = (bits[:, :-1] << 2) | bits[:, 1:]
    return (bits[:-1] << 4) | bits[1:]


def is_mixed(codes):
    """Which codes are neither 0 nor 255: bool; 0 wraps to 255 below."""
    return codes - np.uint8(1) < np.uint8(254)


@functools.lru_cache(maxsize=16)
def surfel_areas(spacing):
    """Area of the surface elements of each of the 256 corner codes, in squared units: (256,)."""
    from surface_distance import lookup_tables

    return lookup_tables.create_table_neighbour_code_to_surface_area(spacing)


# ---------------------------------------------------------------------------- within


def _ball_rows(tolerance, spacing):
    """{half width in x: the (z, y) offsets of the ball's rows of that width}; None: too many."""
    reach = [int(tolerance / step) + 1 for step in spacing]
    if math.pi * reach[0] * reach[1] > _MOST_ROWS or reach[2] > _MOST_ROWS:
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


# ---------------------------------------------------------------------------- distances


def _percentile(distances, codes, area, percentile):
    """The least distance within which `percentile` % of the corners' area lies.

    Shares that differ by rounding alone count as equal: 19 of 20 equal areas are 95 %.
    """
    if percentile == 100:
        return float(distances.max())
    order = np.argsort(distances, kind="stable")
    within = np.cumsum(area[codes[order]])
    place = np.searchsorted(within, within[-1] * (percentile / 100) * (1 - 1e-11))
    return float(distances[order[place]])


def _distances(own, other, spacing):
    """(distance to the nearest corner of `other`, code) of each mixed corner of `own`, in order.

    Two (N,), float64 and uint8.
    """
    offsets, lengths = _nearest_offsets(spacing)
    rim = np.abs(offsets).max(axis=0)
    own_mixed, other_mixed = (_padded(is_mixed(s.codes), rim) for s in (own, other))
    points = np.flatnonzero(own_mixed)
    distances, rest = _look_up(points, other_mixed, offsets, lengths)
    if rest.size:
        corners = points[rest]
        if rest.size * _VOXELS_PER_QUERY > own.codes.size:
            distances[rest] = _by_transform(corners, other_mixed, spacing)
        else:
            distances[rest] = _by_tree(corners, other_mixed, spacing)
    codes = own.codes.reshape(-1).compress(is_mixed(own.codes).reshape(-1))
    return distances, codes


def _padded(mixed, rim):
    """With `rim` corners of False around: a flat index plus an offset stays in its row."""
    core = tuple(slice(r, r + n) for r, n in zip(rim, mixed.shape, strict=True))
    padded = np.zeros([n + 2 * r for r, n in zip(rim, mixed.shape, strict=True)], bool)
    padded[core] = mixed
    return padded


def _nearest_offsets(spacing):
    """The shortest (z, y, x) offsets, shortest first, and their lengths: (N, 3) int64 and (N,).

    All of up to some length: what none of them reaches is further off.
    """
    reach = [math.ceil(5 * min(spacing) / step) for step in spacing]
    grid = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), -1)
    grid = grid.reshape(-1, 3)
    lengths = _lengths(grid, spacing)
    order = np.argsort(lengths, kind="stable")
    beyond = min((r + 1) * step for r, step in zip(reach, spacing, strict=True))
    kept = order[: min(_MOST_OFFSETS, np.count_nonzero(lengths < beyond))]
    return grid[kept], lengths[kept]


def _lengths(offsets, spacing):
    """Of (N, 3) index offsets: (N,) float64."""
    z, y, x = ((offset * step) ** 2 for offset, step in zip(offsets.T, spacing, strict=True))
    return np.sqrt(z + y + x)


def _look_up(points, other, offsets, lengths):
    """(distances (N,), places of those that no offset settled (M,)) of flat indices (N,)."""
    flat = other.reshape(-1)
    distances = np.full(points.size, np.inf)
    rest = np.arange(points.size)
    steps = offsets @ np.array([other.shape[1] * other.shape[2], other.shape[2], 1])
    starts = np.flatnonzero(np.diff(lengths, prepend=-1.0))
    for start, of_one_length in zip(starts, np.split(steps, starts[1:]), strict=True):
        hit = np.zeros(points.size, dtype=bool)
        for step in of_one_length:
            hit |= flat[points + step]
        distances[rest[hit]] = lengths[start]
        rest, points = rest[~hit], points[~hit]
    return distances, rest


def _by_tree(points, other, spacing):
    """Distances of flat indices (N,) to the nearest corner of `other`, by a k-d tree."""
    theirs, ours = (_coordinates(flat, other.shape) for flat in (np.flatnonzero(other), points))
    # Built fast rather than balanced: far more corners are put in than are asked for.
    fast = {"leafsize": 64, "balanced_tree": False, "compact_nodes": False}
    _, nearest = spatial.cKDTree(theirs * spacing, **fast).query(ours * spacing)
    return _lengths(theirs[nearest] - ours, spacing)


def _by_transform(points, other, spacing):
    """The same by a feature transform of the whole box: 12 bytes per voxel, whatever is asked."""
    nearest = ndimage.distance_transform_edt(
        ~other, sampling=spacing, return_distances=False, return_indices=True
    )
    theirs = nearest.reshape(3, -1)[:, points].T
    return _lengths(theirs - _coordinates(points, other.shape), spacing)


def _coordinates(flat, shape):
    """z, y, x of flat indices (N,): (N, 3) int32."""
    out = np.empty((flat.size, 3), np.int32)
    rows, out[:, 2] = np.divmod(flat, shape[2])
    out[:, 0], out[:, 1] = np.divmod(rows, shape[1])
    return out
