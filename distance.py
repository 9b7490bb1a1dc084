"""Distance transforms of masks, on the device where the mask lies.

The only import is torch, so that this file can be lifted out with one copy. Whoever compares
distances with a tolerance needs none that is longer: a truncated transform is a few passes over the
volume (about 5 ms for 72 x 136 x 136 at a distance of 2 on two CPU cores), all of them plain tensor
operations.
"""

import math

import torch


def truncated_edt(mask, max_distance, spacing=(1.0, 1.0, 1.0)):
    """Euclidean distance to the nearest True voxel, cut at `max_distance`.

    mask (..., D, H, W): bool, or any dtype whose non-zero voxels count as True; each volume of the
    leading dimensions is transformed by itself. max_distance and spacing (z, y, x) share one unit.
    Returns float32 of the mask's shape in [0, max_distance], without gradient: 0 on the mask,
    max_distance wherever the mask has no voxel nearer than that (everywhere, if it is empty).
    Exact to float32 rounding.

    The squared distance separates over axes (Felzenszwalb and Huttenlocher 2012): along each axis
    the smallest f(x + k) + (k * spacing)^2 over shifts k. Only shifts shorter than max_distance can
    change the result: 3 * max_distance / spacing passes per axis, three float32 buffers.

    ValueError for a mask of fewer than 3 dimensions, or for numbers that are not positive.
    """
    _check(mask, max_distance, spacing)
    limit = max_distance * max_distance
    squared = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    squared.masked_fill_(mask == 0, limit)
    nearest, shifted = squared.clone(), torch.empty_like(squared)
    for axis, step in zip((-3, -2, -1), spacing, strict=True):
        _lower_along(nearest, squared, shifted, axis, step, max_distance)
        squared.copy_(nearest)
    return nearest.sqrt_().clamp_(max=max_distance)


def _lower_along(nearest, squared, shifted, axis, step, max_distance):
    """Lower `nearest` in place to the smallest squared[x + k] + (k * step)^2 along one axis."""
    size = squared.shape[axis]
    # A shift of max_distance or more can only give what the start value already is.
    reach = min(math.ceil(max_distance / step) - 1, size - 1)
    for k in range(1, reach + 1):
        torch.add(squared, (k * step) ** 2, out=shifted)
        left, right = nearest.narrow(axis, 0, size - k), nearest.narrow(axis, k, size - k)
        torch.minimum(left, shifted.narrow(axis, k, size - k), out=left)
        torch.minimum(right, shifted.narrow(axis, 0, size - k), out=right)


def _check(mask, max_distance, spacing):
    if mask.ndim < 3:
        raise ValueError(f"mask: expected (..., D, H, W), got shape {tuple(mask.shape)}")
    if not (math.isfinite(max_distance) and max_distance > 0):
        raise ValueError(f"max_distance: expected a positive number, got {max_distance}")
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing: expected three positive numbers z, y, x, got {tuple(spacing)}")
