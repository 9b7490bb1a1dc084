"""From probabilities to masks: hysteresis, small components, holes, closing.

    low, high = probs >= settings["hysteresis"], probs >= threshold      # (D, H, W) bool
    masks = apply_to_regions({"vessel": high}, {"vessel": low}, spacing=spacing, **settings)

Each step is off unless its setting says otherwise.
"""

import functools
import itertools

import cc3d
import numpy as np

from scoring import dilation, partitions

BEFORE = "threshold"  # the name of the mask that no step has touched


def apply_to_regions(high, low=None, **settings):
    """{region: mask (D, H, W) bool} after all steps; arguments as in `stages_of_regions`.

    These are the masks that a prediction consists of, and that validation scores.
    """
    *_, (_, masks) = stages_of_regions(high, low, **settings)
    return masks


def stages_of_regions(
    high,
    low=None,
    *,
    exclusive=False,
    spacing=None,
    hysteresis=None,
    min_component_voxels=0,
    max_hole_voxels=0,
    closing_radius=0.0,
):
    """Yields (name, {region: mask (D, H, W) bool}) of the threshold, then of each step that is on.

    It is one dict each time, in which a step puts its masks in place of those before. high:
    {region: its voxels}; low: {region: those above the threshold of hysteresis}, if given; spacing
    (z, y, x), None for voxels: the unit of the radius. The others are settings of `postprocess`,
    where min_component_voxels is one number for all regions, or {region: number}, 0 for those it
    lacks. The input stays as it is.

    Each region goes through the steps as if it were alone, but for exclusive ones (no voxel is in
    two masks of high, and there is no hysteresis): small components become background, and holes
    and gaps are filled only where the background was before any region was filled. A voxel that
    several regions would fill goes to the first of them.
    """
    masks = {name: np.asarray(mask, bool) for name, mask in high.items()}
    yield BEFORE, masks
    if hysteresis is not None:
        change(masks, lambda region, mask: apply_hysteresis(mask, low[region]))
        yield "hysteresis", masks
    sizes = min_component_voxels
    sizes = sizes if isinstance(sizes, dict) else dict.fromkeys(masks, sizes)
    if max(sizes.values(), default=0) > 1:
        change(masks, lambda region, mask: remove_small_components(mask, sizes.get(region, 0)))
        yield "min_component_voxels", masks
    if max_hole_voxels > 0:
        change(masks, lambda _, mask: fill_holes(mask, max_hole_voxels), exclusive)
        yield "max_hole_voxels", masks
    if closing_radius > 0:
        change(masks, lambda _, mask: close(mask, closing_radius, spacing), exclusive)
        yield "closing_radius", masks


def change(masks, step, background_only=False):
    """Put the result of step(region, mask) in place of each mask, so that few are in memory."""
    background = ~functools.reduce(np.logical_or, masks.values()) if background_only else None
    for region, mask in masks.items():
        changed = step(region, mask)
        if background_only:
            added = changed & background
            background &= ~added
            changed = mask | added
        masks[region] = changed


def apply_hysteresis(high, low):
    """Voxels of low whose 26-connected component holds one of high (hysteresis, Canny 1986).

    high and low (D, H, W) bool; high lies within low, or counts as if it did.
    """
    labels, count = partitions.label(low | high)
    kept = np.zeros(count + 1, bool)
    kept[np.unique(labels[high])] = True
    kept[0] = False
    return kept[labels]


def remove_small_components(mask, min_voxels):
    """mask (D, H, W) bool without its 26-connected components of fewer than min_voxels voxels."""
    if min_voxels <= 1:
        return mask
    labels, count = partitions.label(mask)
    kept = np.bincount(labels.reshape(-1), minlength=count + 1) >= min_voxels
    kept[0] = False
    return kept[labels]


def fill_holes(mask, max_voxels):
    """mask (D, H, W) bool with its holes of at most max_voxels voxels filled.

    A hole is a face-connected component of the background that the foreground encloses, in the
    volume (a cavity) or in a slice across one of the axes (a pinhole in a sheet, or a tunnel).
    """
    filled = mask | _enclosed(mask, max_voxels, 6)
    for axis in range(3):
        planes = (np.moveaxis(volume, axis, 0) for volume in (mask, filled))
        for plane, out in zip(*planes, strict=True):
            if plane.any() and not plane.all():
                out |= _enclosed(plane, max_voxels, 4)
    return filled


def _enclosed(mask, max_voxels, connectivity):
    """The background components of at most max_voxels that do not touch the border, as a mask."""
    labels, count = cc3d.connected_components(~mask, connectivity=connectivity, return_N=True)
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)
    hole = sizes <= max_voxels
    hole[0] = False
    for axis, end in itertools.product(range(mask.ndim), (0, -1)):
        hole[np.unique(np.take(labels, end, axis=axis))] = False
    return hole[labels]


def close(mask, radius, spacing=None):
    """mask (D, H, W) bool closed by a ball: what no ball within the background reaches is filled.

    radius in the unit of spacing (z, y, x), None: voxels; 1.5 voxels close a slit in a sheet that
    is a voxel wide. Beyond the border the volume continues as it ends there.
    """
    if not mask.any():
        return mask
    spacing = (1.0, 1.0, 1.0) if spacing is None else spacing
    margin = margins(radius, spacing)
    wide = np.pad(mask, [(m, m) for m in margin], mode="edge")
    wide = dilation.dilate(wide, radius, spacing)
    wide = ~dilation.dilate(~wide, radius, spacing)
    inner = tuple(slice(m, m + n) for m, n in zip(margin, mask.shape, strict=True))
    return wide[inner] | mask


def margins(radius, spacing=None):
    """Voxels (z, y, x) that a ball of that radius reaches, and one more."""
    spacing = (1.0, 1.0, 1.0) if spacing is None else spacing
    return [int(np.ceil(radius / step)) + 1 for step in spacing]
