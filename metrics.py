"""The judge: scores of a predicted mask against the truth, as numpy arrays (D, H, W).

It shares no code with the losses, so that a mistake there cannot hide itself here. Scores equal
their published reference implementations on the same masks.
"""

import math

import cc3d
import numpy as np
from scipy import ndimage

# Offsets in the box around the tolerance up to which a look at each of them is cheaper than a
# Euclidean transform of the whole volume (which also takes some 40 bytes per voxel).
_MOST_OFFSETS = 2000


def score(prediction, truth, spacing=(1.0, 1.0, 1.0), ignore_label=2, tolerance=2.0):
    """Scores of a mask, a dict of floats and ints.

    prediction (D, H, W): bool or integers 0 and 1. truth (D, H, W): the same, and `ignore_label`
    where nobody labelled (None: nowhere). spacing (z, y, x) and tolerance share one unit.

        dice, precision, recall   over labelled voxels, in [0, 1]
        surface_dice              surface Dice at the tolerance, in [0, 1], see `surface_dice`
        components                26-connected components of the prediction
        components_truth          the same of the truth

    Voxels of ignore_label are left out of the voxel counts, and are background in both masks for
    surfaces and components: where the unlabeled region cuts a structure, the cut is a surface of
    both. Both masks empty (also: no labelled voxel at all): the four ratios are 1. One of them
    empty: all four are 0.

    ValueError for shapes that differ or are not 3-D, dtypes that are not integer, other values.
    """
    prediction, truth = labelled_masks(prediction, truth, ignore_label)
    true_positives = int(np.count_nonzero(prediction & truth))
    predicted, true = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    both_empty = float(predicted == true == 0)
    return {
        "dice": _ratio(2 * true_positives, predicted + true, both_empty),
        "precision": _ratio(true_positives, predicted, both_empty),
        "recall": _ratio(true_positives, true, both_empty),
        "surface_dice": surface_dice(prediction, truth, spacing, tolerance),
        "components": count_components(prediction),
        "components_truth": count_components(truth),
    }


def _ratio(part, whole, otherwise):
    return part / whole if whole else otherwise


def mean_scores(rows):
    """The mean over cases of each score that `score` returned: {name: float}; {} of no case."""
    return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())}


def labelled_masks(prediction, truth, ignore_label=2):
    """Both as bool masks (D, H, W) that are False where truth is ignore_label.

    Takes and refuses (ValueError) what `score` does.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"expected prediction and truth of one shape (D, H, W), got {prediction.shape} and "
            f"{truth.shape}"
        )
    if ignore_label in (0, 1):
        raise ValueError(f"ignore_label: expected neither 0 nor 1, got {ignore_label}")
    masks = []
    for name, values, ignored in (("prediction", prediction, None), ("truth", truth, ignore_label)):
        if values.dtype != bool and not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name}: expected a bool or integer mask, got {values.dtype}")
        mask = values == 1
        known = mask | (values == 0)
        if ignored is not None:
            known |= values == ignored
        if not known.all():
            allowed = "0 and 1" if ignored is None else f"0, 1 and {ignored} (ignored)"
            found = ", ".join(map(str, np.unique(values)[:8]))
            raise ValueError(f"{name}: expected the values {allowed}, got {found}")
        masks.append(mask)
    if ignore_label is not None:
        masks[0] &= truth != ignore_label
    return masks


# ---------------------------------------------------------------------------- components


def count_components(mask):
    """The number of 26-connected components of a mask (D, H, W); 0 if it is empty."""
    _, count = cc3d.connected_components(
        np.ascontiguousarray(mask, dtype=bool), connectivity=26, return_N=True
    )
    return int(count)


# ---------------------------------------------------------------------------- surfaces


def surface_dice(prediction, truth, spacing=(1.0, 1.0, 1.0), tolerance=2.0):
    """Surface Dice: the share of both surfaces that lies within `tolerance` of the other one.

    prediction and truth (D, H, W) bool; spacing (z, y, x) and tolerance (0 or more, a distance of
    exactly the tolerance is within) share one unit. In [0, 1]; 1 if both are empty, 0 if one is.

    As Nikolov et al. 2018 (arXiv:1809.04430) define it and their package `surface-distance`
    computes it: surface elements stand on voxel corners, one for each 2 x 2 x 2 neighbourhood of
    mixed values, weighted by its marching-cubes area. Outside of the volume is background.
    """
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing: expected three positive numbers z, y, x, got {tuple(spacing)}")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: expected a number of 0 or more, got {tolerance}")
    prediction, truth = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    if not (prediction.any() and truth.any()):
        return float(prediction.any() == truth.any())
    box = _bounding_box(prediction | truth)
    codes = [_corner_codes(mask[box]) for mask in (prediction, truth)]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    area_of_code = _surfel_areas(spacing)
    within, whole = 0.0, 0.0
    for code, own, other in zip(codes, surfaces, reversed(surfaces), strict=True):
        areas = area_of_code[code[own]]
        within += float(areas[_is_near(own, other, spacing, tolerance)].sum())
        whole += float(areas.sum())
    return within / whole


def _bounding_box(mask):
    """Slices of the smallest box that holds every True voxel of a mask that has one."""
    plane = mask.any(axis=0)
    profiles = (mask.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))
    found = [np.flatnonzero(profile) for profile in profiles]
    return tuple(slice(int(f[0]), int(f[-1]) + 1) for f in found)


def _corner_codes(mask):
    """The 8 voxels around each corner as the bits of one uint8: (D, H, W) -> (D+1, H+1, W+1).

    Bit order as in the lookup table of `surface-distance`: the lowest indices are the highest bit.
    """
    bits = np.pad(mask.astype(np.uint8), 1)
    bits = (bits[:, :, :-1] << 1) | bits[:, :, 1:]
    bits = (bits[:, :-1] << 2) | bits[:, 1:]
    return (bits[:-1] << 4) | bits[1:]


def _surfel_areas(spacing):
    """Area of the surface elements of each of the 256 corner codes, in squared units: (256,)."""
    from surface_distance import lookup_tables

    return lookup_tables.create_table_neighbour_code_to_surface_area(spacing)


def _is_near(own, other, spacing, tolerance):
    """For each True corner of `own`, in order: is a True corner of `other` within tolerance?"""
    if math.prod(2 * tolerance / step + 1 for step in spacing) > _MOST_OFFSETS:
        distance = ndimage.distance_transform_edt(~other, sampling=spacing)
        return distance[own] <= tolerance
    offsets = _offsets_within(tolerance, spacing)
    # A rim as wide as the offsets are long, so that a flat index never runs into the next row.
    rim = [(reach, reach) for reach in np.abs(offsets).max(axis=0)]
    own, other = np.pad(own, rim), np.pad(other, rim).reshape(-1)
    _, height, width = own.shape
    points = np.flatnonzero(own)
    near = np.zeros(points.size, dtype=bool)
    far = np.arange(points.size)  # the nearest offsets come first, so that this shrinks fast
    for step in offsets @ np.array([height * width, width, 1]):
        hit = other[points[far] + step]
        near[far[hit]] = True
        far = far[~hit]
    return near


def _offsets_within(tolerance, spacing):
    """All (z, y, x) index offsets of at most `tolerance` in length, shortest first: (N, 3)."""
    reach = [math.floor(tolerance / step) + 1 for step in spacing]
    grid = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), -1)
    grid = grid.reshape(-1, 3)
    length = np.sqrt(((grid * np.asarray(spacing, np.float64)) ** 2).sum(axis=1))
    order = np.argsort(length, kind="stable")
    return grid[order[: np.count_nonzero(length <= tolerance)]]


# ---------------------------------------------------------------------------- a baseline


def otsu_threshold(image):
    """The threshold t of Otsu (1979) that best separates image > t from image <= t, as a float.

    image: any shape, any real dtype. Exact for integers of at most 65 536 levels (t is then a level
    of the image's range), else from a histogram of 256 bins (t is the edge of a bin). The lowest t
    of equals. A constant image gives its value: nothing is above it.

    ValueError for an empty image, or for NaN or Inf in it.
    """
    image = np.asarray(image)
    if image.size == 0 or not np.isfinite(image).all():
        raise ValueError("otsu_threshold: expected finite voxels, got none, or NaN or Inf in them")
    low, high = image.min(), image.max()
    if low == high:
        return float(low)
    exact = not np.issubdtype(image.dtype, np.floating) and int(high) - int(low) < 65_536
    levels = int(high) - int(low) + 1 if exact else 256
    width = 1.0 if exact else (float(high) - float(low)) / levels
    counts = np.zeros(levels)
    for part in np.array_split(image.reshape(-1), max(1, image.size // 1_000_000)):
        index = (part.astype(np.float64) - float(low)) / width
        counts += np.bincount(index.astype(np.int64).clip(0, levels - 1), minlength=levels)
    below = np.cumsum(counts)[:-1]
    moment = np.cumsum(counts * np.arange(levels))
    mean_gap = moment[-1] / image.size * below - moment[:-1]
    spread = mean_gap**2 / (below * (image.size - below))
    best = int(np.argmax(spread))
    return float(low) + (best * width if exact else (best + 1) * width)
