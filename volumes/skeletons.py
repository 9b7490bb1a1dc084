"""Skeletons of targets, made once at preparation.

The Skeleton Recall loss (Kirchhoff et al. 2024, "Skeleton Recall Loss for Connectivity Conserving
and Resource Efficient Segmentation of Thin Tubular Structures") asks for the target's skeleton,
thickened to a tube. Here the skeleton of a tube is a line and that of a sheet a surface;
benchmarks/tubed_skeleton.py compares it with the alternatives.
"""

import itertools
import math

import numpy as np
from scipy import ndimage


def tubed_skeleton(mask, radius=2.0, spacing=(1.0, 1.0, 1.0)):
    """The skeleton of a mask, dilated within the mask: (D, H, W) bool.

    mask (D, H, W) bool; spacing z, y, x in any unit. A voxel of the mask belongs to the tube if it
    lies within `radius` times the smallest spacing of the skeleton: 2 voxels where voxels are
    cubes, less than a slice where z is much coarser.

    A structure of up to 2 * radius voxels is covered nearly whole, a thicker one along its middle.
    Empty mask: empty; a single voxel: itself. At the border of the volume and of the unlabeled
    region the skeleton may end early, by half the structure's thickness.
    ValueError for a mask that is not (D, H, W) bool, a radius below 0 or a spacing not above 0.
    """
    if mask.ndim != 3 or mask.dtype != bool:
        raise ValueError(f"mask: expected (D, H, W) bool, got {mask.shape} {mask.dtype}")
    if not radius >= 0:
        raise ValueError(f"radius: expected 0 or more voxels, got {radius}")
    if len(spacing) != 3 or not all(s > 0 for s in spacing):
        raise ValueError(f"spacing: expected three numbers above 0 (z, y, x), got {spacing}")
    return _within(thin(mask), mask, radius * min(spacing), spacing)


def tubed_skeletons(label, ids, spacing=(1.0, 1.0, 1.0)):
    """The tubed skeletons of several classes of a label, in one mask: (D, H, W) bool.

    label (D, H, W) uint8; ids: of the classes. Each class has its own, within itself, so that
    classes that touch or lie inside each other keep theirs: cut to a class, the mask is that of the
    class. Cut to a region of several classes it is the union of theirs.
    """
    tubes, boxes = np.zeros(label.shape, bool), ndimage.find_objects(label)
    for class_id in ids:
        box = boxes[class_id - 1]  # a mask is thinned alike in any volume around it
        tubes[box] |= tubed_skeleton(label[box] == class_id, spacing=spacing)
    return tubes


def thin(mask):
    """Lines for tubes and surfaces for sheets: (D, H, W) bool, a subset of the mask (D, H, W) bool.

    The slices along each axis are thinned in 2D (Zhang and Suen 1984, scikit-image's). A voxel on
    the skeleton of a slice is kept if a slice along another axis has its skeleton within a voxel of
    it: a sheet is a line in the slices along two axes or more, wherever it faces, while in a thick
    tube only the lines near its middle agree. Thinning the volume itself (Lee et al. 1994) would
    leave a sheet as a curve, and of some shapes of even thickness nothing.

    About 0.1 s per million voxels; eight bytes of memory per voxel.
    """
    lines = [_thin_slices(mask, axis) for axis in range(3)]
    kept = np.zeros_like(mask)
    for axis in range(3):
        near = _grown(lines[axis])
        for other in {0, 1, 2} - {axis}:
            kept |= lines[other] & near
    return kept


def _thin_slices(mask, axis):
    from skimage.morphology import skeletonize

    lines = np.zeros_like(mask)
    for plane, line in zip(np.moveaxis(mask, axis, 0), np.moveaxis(lines, axis, 0), strict=True):
        if plane.any():
            line[:] = skeletonize(np.ascontiguousarray(plane), method="zhang")
    return lines


def _grown(mask):
    """Every voxel of the mask and its 26 neighbors."""
    grown = mask.copy()
    for axis in range(3):
        of, to = np.moveaxis(grown.copy(), axis, 0), np.moveaxis(grown, axis, 0)
        to[1:] |= of[:-1]
        to[:-1] |= of[1:]
    return grown


def _within(skeleton, mask, distance, spacing):
    """The voxels of the mask within a Euclidean distance of the skeleton, in the spacing's unit."""
    # Shifts by every offset of a ball: 33 passes over bytes for 2 cubic voxels. A distance
    # transform needs several floats per voxel.
    near, sizes = np.zeros_like(mask), mask.shape
    limit = distance * distance * (1 + 1e-9)  # rounding must not lose a voxel at the very distance
    reach = [min(n - 1, int(math.sqrt(limit) / s)) for n, s in zip(sizes, spacing, strict=True)]
    for offset in itertools.product(*(range(-n, n + 1) for n in reach)):
        if sum((o * s) ** 2 for o, s in zip(offset, spacing, strict=True)) <= limit:
            pairs = list(zip(offset, sizes, strict=True))
            to = tuple(slice(max(0, o), n + min(0, o)) for o, n in pairs)
            of = tuple(slice(max(0, -o), n - max(0, o)) for o, n in pairs)
            near[to] |= skeleton[of]
    return near & mask
