"""Nearest neighbours of corners: how far each corner of one surface is from another surface.

    distances = nearest_distances(own, other, spacing)

Exact, as float64 sqrt((dz sz)^2 + (dy sy)^2 + (dx sx)^2) of the steps to the nearest corner. No
distance is made where none is asked for. Each way below settles the corners it is cheap for and
leaves the rest to the next:

1. the nearest offsets are looked up, shortest first: nearly all corners of a fair prediction;
2. the rows around a corner are asked for their nearest 1 in x, 64 corners at a time, from the
   nearest row on: those up to some 20 corners off, unless they are very many;
3. a k-d tree or, where a twentieth of the box asks, a Euclidean transform of the box.

For torn sheets of 320 x 320 x 320, 4.6 million corners of each, that takes a second on 2 cores;
two transforms take 9 s and two trees of all corners 7.
"""

import math

import numpy as np
from scipy import ndimage, spatial

from scoring.corners import is_mixed

# Offsets that are looked up: those within about 4 voxels.
_MOST_OFFSETS = 257
# Rows that are asked, for one corner each, per voxel of the box: half of a transform's time.
_ROWS_PER_VOXEL = 3.0
# A far corner takes as long in a k-d tree as so many voxels in a Euclidean transform.
_VOXELS_PER_QUERY = 20
# Corners on either side that a row is asked for: half of a word. And rows to either side.
_HALF, _REACH = 32, 40


def nearest_distances(own, other, spacing):
    """The distance of each mixed corner of `own` to the nearest of `other`: (N,) float64.

    own and other: `Corners` of one box with a mixed corner each; the order is that of C.
    """
    offsets, lengths = _nearest_offsets(spacing)
    rim = np.abs(offsets).max(axis=0)
    own_mixed, other_mixed = (_padded(is_mixed(found.codes), rim) for found in (own, other))
    points = np.flatnonzero(own_mixed)
    distances, rest = _look_up(points, other_mixed, offsets, lengths)
    points = points[rest]
    if points.size and points.size * _VOXELS_PER_QUERY <= own.codes.size:
        places = _coordinates(points, own_mixed.shape) - rim
        distances[rest] = _by_rows(places, other.bits, spacing, own.codes.size * _ROWS_PER_VOXEL)
        unsettled = np.isinf(distances[rest])
        rest, points = rest[unsettled], points[unsettled]
    if points.size:
        many = points.size * _VOXELS_PER_QUERY > own.codes.size
        distances[rest] = (_by_transform if many else _by_tree)(points, other_mixed, spacing)
    return distances


# ---------------------------------------------------------------------------- offsets


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


# ---------------------------------------------------------------------------- rows


def _by_rows(places, bits, spacing, budget):
    """Distances to the nearest 1 of bits for places (N, 3): (N,), infinite where not settled.

    A place is settled once no row that is still to be asked can be nearer than what was found.
    `budget`: how many questions, one for each place and row.
    """
    offsets, squares, limit = _row_offsets(spacing)
    rim = np.abs(offsets).max(axis=0)
    padded = np.pad(bits, [(r, r) for r in (*rim, 1)])
    in_row = np.append((np.arange(_HALF + 1) * spacing[2]) ** 2, np.full(255 - _HALF, np.inf))
    first, shift = np.divmod(places[:, 2].astype(np.int64) + 64 - _HALF, 64)
    z, y = (places[:, :2] + rim).T.astype(np.int64)
    words, shift = (z * padded.shape[1] + y) * padded.shape[2] + first, shift.astype(np.uint64)
    settled, rest = np.full(len(places), np.inf), np.arange(len(places))
    best = settled.copy()
    steps = (offsets @ [padded.shape[1], 1]) * padded.shape[2]
    for step, square in zip(steps, squares, strict=True):
        done = best <= square
        if 8 * np.count_nonzero(done) >= rest.size:
            settled[rest[done]] = best[done]
            rest, best, words, shift = (part[~done] for part in (rest, best, words, shift))
        budget -= rest.size
        if budget < 0 or not rest.size:
            limit = min(limit, square)
            break
        found = _steps_to_one(_windows(padded.reshape(-1), words + step, shift))
        np.minimum(best, square + in_row[found], out=best)
    settled[rest] = np.where(best <= limit, best, np.inf)
    return np.sqrt(settled)


def _row_offsets(spacing):
    """((N, 2) z and y offsets of rows, nearest first; their squared distances; that of the next).

    No row that is left out is nearer than the last number, nor a 1 that a window does not show.
    """
    reach = [min(_REACH, math.ceil(_HALF * spacing[2] / step)) for step in spacing[:2]]
    grid = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), -1)
    grid = grid.reshape(-1, 2)
    squares = (grid[:, 0] * spacing[0]) ** 2 + (grid[:, 1] * spacing[1]) ** 2
    ends = [(r + 1) * step for r, step in zip(reach, spacing[:2], strict=True)]
    limit = min(*ends, _HALF * spacing[2]) ** 2
    order = np.argsort(squares, kind="stable")
    kept = order[: np.count_nonzero(squares < limit)]
    return grid[kept], squares[kept], limit


def _windows(flat, words, shift):
    """64 bits of rows in flat words, from bit `shift` of each of `words` on: (N,) uint64."""
    low = flat[words] >> shift
    # Two shifts, for one by 64 is undefined.
    return low | (flat[words + 1] << (np.uint64(63) - shift)) << np.uint64(1)


def _steps_to_one(windows):
    """How far the nearest 1 is from bit 32 of windows (N,) uint64: (N,) uint8, above 32: none."""
    ahead, behind = windows >> np.uint64(32), windows & np.uint64(0xFFFFFFFF)
    up = np.bitwise_count(~ahead & (ahead - np.uint64(1)))  # zeros below the lowest 1
    # The exponent of a float is the place of the highest 1; that of 0 is far below.
    down = 32 + 1023 - (behind.astype(np.float64).view(np.int64) >> 52)
    return np.minimum(up, np.minimum(down, 255).astype(np.uint8))


# ---------------------------------------------------------------------------- tree, transform


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
