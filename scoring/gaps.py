"""The distance from a sheet to the next one, and the width of the gap between two.

    widths = gap_widths(truth, ~truth, spacing)
    near = within(widths, 0, 4)        # sheet voxels with another one near, and the gaps there

Sheets of a scroll are often of one piece, so that no label tells which voxel is of which sheet.
Here the next sheet is what a straight line meets beyond background. There are 13 lines through a
voxel and its 26 neighbors; the shortest way along one of them counts. No flat sheet, however
tilted, has a gap to itself, as its voxels are convex; a narrow tear or a sharp bend of one has.
"""

import itertools
import math

import numpy as np

_ROUNDING = 1e-6  # relative: a distance that equals a bound but for this counts as equal
LINES = [step for step in itertools.product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]


def gap_widths(truth, background, spacing):
    """(D, H, W) float32 in the unit of the spacing (z, y, x); infinite where no line gives one.

    truth, background (D, H, W) bool, of which neither holds an unlabeled voxel: no way leads
    through one. A voxel of truth has the distance to the next one beyond background, a voxel of
    background that between the two voxels of truth on either side. Both are of voxel centers: n
    empty slices between two plates make n + 1. Where sheets run between the lines, a distance is up
    to 1.13 times that along their normal, more if voxels are not cubes.

    8 bytes per voxel beside the result.
    """
    widths = np.full(truth.shape, np.inf, np.float32)
    for step in LINES:
        length = np.float32(math.hypot(*np.multiply(step, spacing)))
        ways = [_steps_to_next(truth, background, s) for s in (step, tuple(-k for k in step))]
        for z, (ahead, behind) in enumerate(zip(*ways, strict=True)):
            across = (ahead > 0) & (behind > 0) & background[z]
            lengths = np.where(across, (ahead + behind) * length, np.inf)
            for steps in (ahead, behind):
                beyond = (steps > 1) & truth[z]  # a neighbor is of the same sheet
                np.minimum(lengths, np.where(beyond, steps * length, np.inf), out=lengths)
            np.minimum(widths[z], lengths, out=widths[z])
    return widths


def _steps_to_next(truth, background, step):
    """Steps from each voxel to the nearest of truth along a line with only background between:
    (D, H, W) uint16, 0 where there is none."""
    axis = next(axis for axis, k in enumerate(step) if k)
    steps = np.zeros(truth.shape, np.uint16)
    views = (np.moveaxis(a, axis, 0)[:: step[axis]] for a in (truth, background, steps))
    on, through, to = views  # in each, the line leads to the next plane
    aside = [k for other, k in enumerate(step) if other != axis]
    here = tuple(slice(max(0, -k), n - max(0, k)) for k, n in zip(aside, on.shape[1:], strict=True))
    there = tuple(slice(max(0, k), n + min(0, k)) for k, n in zip(aside, on.shape[1:], strict=True))
    for plane in range(len(on) - 2, -1, -1):
        further = to[plane + 1][there]
        further = (further + (further > 0)) * through[plane + 1][there]
        to[plane][here] = on[plane + 1][there] + further
    return steps


def within(widths, low, high):
    """Where a width is above low and at most high, and not infinite: bool."""
    highest = min(high * (1 + _ROUNDING), np.finfo(np.float32).max)
    return (widths > low * (1 + _ROUNDING)) & (widths <= highest)


def check_range(low, high):
    """ValueError unless 0 <= low < high; high may be infinite."""
    if not 0 <= low < high:
        raise ValueError(f"distances: expected LOW:HIGH with 0 <= LOW < HIGH, got {low:g}:{high:g}")
