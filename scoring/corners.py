"""Corners of a mask's voxels: where its surface runs, and in which of 256 ways.

    found = extract(mask)
    found.histogram @ surfel_areas(spacing)      # the area of the surface

Each corner has 2 x 2 x 2 voxels around it, the 8 bits of its code; where they are mixed, the
surface passes. The mask (D, H, W) bool has (D + 1, H + 1, W + 1) corners; outside of it is
background. Everything that needs no place, such as areas and Euler characteristics, is read from
the histogram of codes.
"""

import functools
from typing import NamedTuple

import numpy as np

# Corners that are coded at one go: they and what is made of them stay in the cache.
_SLAB = 2**18


class Corners(NamedTuple):
    """The corners of a mask (D, H, W), coded."""

    codes: np.ndarray  # (D+1, H+1, W+1) uint8: the 8 voxels around a corner as bits
    bits: np.ndarray  # (D+1, H+1, ceil((W+1)/64)) uint64: 1 where the 8 are mixed, lowest x first
    histogram: np.ndarray  # (256,) int64: corners of each code, but for 0 and 255


def extract(mask):
    """The `Corners` of a mask (D, H, W) bool, of which any axis may be empty."""
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
    return Corners(codes, packed.view("<u8"), histogram)


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


def bounding_box(mask):
    """Slices of the smallest box that holds every True voxel of a mask; empty ones if none is."""
    plane = mask.any(axis=0)
    profiles = (mask.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))
    found = [np.flatnonzero(profile) for profile in profiles]
    if not found[0].size:
        return (slice(0, 0),) * 3
    return tuple(slice(int(f[0]), int(f[-1]) + 1) for f in found)
