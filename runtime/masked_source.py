"""An image as it is predicted box by box, and which of its voxels are masked.

Masked are voxels where the mask volume is 0, and voxels of the image that lie in a cube of 4 voxels
a side that is all 0, as the air around a scroll does. A zero by itself is a value as any: the dark
membranes of electron microscopy have some.
"""

import numpy as np

from runtime.chunk_cache import ChunkCache
from runtime.columns import MARGIN


def in_cubes(zero):
    """Voxels (d, h, w) that lie in cubes of 4 that are all True, of a bool array that has a margin
    of MARGIN around them."""
    for axis in range(3):  # the cubes, by their first voxel
        for step in (1, 2):
            n = zero.shape[axis] - step
            zero = _part(zero, axis, 0, n) & _part(zero, axis, step, n)
    for axis in range(3):
        for step in (1, 2):
            n = zero.shape[axis] - step
            zero = _part(zero, axis, 0, n) | _part(zero, axis, step, n)
    return zero


def _part(array, axis, start, length):
    return array[(slice(None),) * axis + (slice(start, start + length),)]


class MaskedSource:
    """An image as `predict_slabs` reads it, box by box in the order of stretches, and what of it is
    masked.

    image: a `ChunkCache`, or what is sliced like an array (C, D, H, W); mask: the same of the mask
    volume, or None; spans: of the windows along z.
    """

    def __init__(self, image, mask, spans):
        self.image, self.mask, self.shape = image, mask, image.shape
        self.caches = [one for one in (image, mask) if isinstance(one, ChunkCache)]
        self.rows = {span.start: row for row, span in enumerate(spans)}
        self.stretch, self._at = 0, None

    def skip(self, spans):
        """Whether all voxels of a window are masked; see `predict_slabs`."""
        at = self.stretch, self.rows[spans[0].start]
        if at != self._at:
            self._at = at
            for cache in self.caches:
                cache.go_to(*at)
        whole = tuple(slice(span.start, span.stop) for span in spans)
        if self.mask is not None and not self.mask[slice(None), *whole].any():
            return True
        sizes = zip((span.stop - span.start for span in spans), self.shape[1:], strict=True)
        if any(MARGIN >= size < n for size, n in sizes):  # they may be in no cube of zeros
            return False
        reach = tuple(span.reach for span in spans)
        if isinstance(self.image, ChunkCache) and self.image.is_empty(reach):
            return True
        return not self.image[slice(None), *reach].any()

    def __getitem__(self, box):
        return self.image[box]

    def masked(self, box):
        """Which voxels of a box (z, y, x) are masked: (d, h, w) bool; None if none is."""
        masked = None
        if self.mask is not None:
            masked = self.mask[slice(None), *box][0] == 0
        ends = [(s.start - MARGIN, s.stop + MARGIN) for s in box]
        inside = [
            slice(max(0, a), min(b, n)) for (a, b), n in zip(ends, self.shape[1:], strict=True)
        ]
        if isinstance(self.image, ChunkCache) and self.image.is_empty(inside):
            return np.ones([s.stop - s.start for s in box], bool)
        zero = np.ones([b - a for a, b in ends], bool)  # also beyond the border
        places = [slice(s.start - a, s.stop - a) for s, (a, _) in zip(inside, ends, strict=True)]
        zero[tuple(places)] = ~self.image[slice(None), *inside].any(axis=0)
        if zero[(slice(MARGIN, -MARGIN),) * 3].any():
            air = in_cubes(zero)
            masked = air if masked is None else masked | air
        return masked if masked is not None and masked.any() else None

    def close(self):
        for cache in self.caches:
            cache.close()
