"""Volumes a block at a time: connected components across blocks, and masks kept on disk as bits.

    grid = Grid(shape, (256, 256, 256))
    joined = Joined(grid, keeps=lambda voxels, marked: voxels >= 50)
    for index in grid:
        joined.add(index, volume[grid.grown(index)])
    joined.settle()
    kept = joined.kept(index, volume[grid.grown(index)])     # in each block, exact

A volume is anything that is sliced by three slices and gives (d, h, w) bool.
"""

import contextlib
import errno
import functools
import itertools
import math
import os

import cc3d
import numpy as np
from scipy import sparse

from scoring import partitions
from volumes import atomic

BLOCK = (256, 256, 256)  # some 13 bytes of memory for each of its voxels, 35 to score
_COUNTED = 2**20  # labels that are counted at once: they become int64


class Grid:
    """The blocks of a volume (D, H, W): indices (z, y, x) in C order when iterated over.

    block: their size in voxels (z, y, x), None: BLOCK.
    """

    def __init__(self, shape, block=None):
        self.shape = tuple(map(int, shape))
        self.block = tuple(min(int(b), n) for b, n in zip(block or BLOCK, self.shape, strict=True))
        self.counts = tuple(-(-n // b) for n, b in zip(self.shape, self.block, strict=True))

    def __iter__(self):
        return np.ndindex(self.counts)

    def boxes(self):
        """The slices of each block, in C order."""
        return map(self.box, self)

    def box(self, index, beyond=(0, 0, 0), before=(0, 0, 0)):
        """Slices of a block, and of so many voxels beyond and before it that the volume has."""
        of_axes = zip(index, self.block, self.shape, beyond, before, strict=True)
        return tuple(
            slice(max(0, i * b - low), min(n, (i + 1) * b + high)) for i, b, n, high, low in of_axes
        )

    def grown(self, index):
        """Slices of a block and of the first plane of the next block along each axis."""
        return self.box(index, beyond=(1, 1, 1))

    def flat(self, index):
        """The place of a block in C order."""
        return int(np.ravel_multi_index(index, self.counts))

    def touched(self, box):
        """(index, slices in the block, slices in the box) of what a box shares with each block."""
        axes = [range(s.start // b, -(-s.stop // b)) for s, b in zip(box, self.block, strict=True)]
        for index in itertools.product(*axes):
            own = self.box(index)
            shared = [
                (max(s.start, o.start), min(s.stop, o.stop)) for s, o in zip(box, own, strict=True)
            ]
            yield index, _moved(shared, own), _moved(shared, box)


def _moved(ends, box):
    """Slices (start, stop) as they are counted from the beginning of a box."""
    return tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(ends, box, strict=True))


def size_of(box):
    """The shape of what three slices cut out."""
    return tuple(s.stop - s.start for s in box)


class Joined:
    """The connected components of a mask across the blocks of a `Grid`, and which of them to keep.

    Each block is labeled with the first planes of the next blocks, so that whatever two voxels
    touch, one block holds both; labels of one voxel in two blocks are of one component. That is
    exact for each connectivity. A component that meets no other block is judged within its own;
    of the others a number is kept for each block, and of the blocks in work the labels of a face:
    4 bytes for each voxel of a plane of the volume.

    keeps(voxels, marked) -> (N,) bool: judges components by their size and by whether a voxel of
    them is marked; any is kept without. connectivity: 26 or 6, or 4: the planes across `axis` are
    volumes of their own. enclosed: what touches the border of the volume (or plane) is marked.
    """

    def __init__(self, grid, keeps=None, *, connectivity=26, axis=None, enclosed=False):
        self.grid, self.keeps, self.connectivity = grid, keeps or _any, connectivity
        self.axis, self.enclosed = axis, enclosed
        self.axes = [a for a in range(3) if a != axis]
        self.starts, self.components = [0], 0
        self._faces, self._voxels, self._marked, self._pairs = {}, [], [], []

    def add(self, index, mask, mark=None):
        """Take in a block, in C order: mask (and mark) are the bool voxels of `Grid.grown`.

        (labels of the block's own voxels; how many each has; the number of each label among those
        of this block that meet other blocks, from 1, 0 of the others).
        """
        labels, voxels, marked, meets = self._measure(index, mask, mark)
        numbers, start = np.cumsum(meets, dtype=np.uint32) * meets, self.starts[-1]
        for axis in self.axes:
            if index[axis]:
                before, theirs = self._faces.pop((axis, index))
                ours = numbers[labels[_plane(axis, 0)]]
                width = int(numbers.max()) + 1
                key = np.unique(theirs[ours > 0].astype(np.int64) * width + ours[ours > 0])
                theirs, ours = np.divmod(key, width)
                self._pairs.append(np.stack([before + theirs - 1, start + ours - 1]))
            if index[axis] + 1 < self.grid.counts[axis]:
                following = tuple(i + (a == axis) for a, i in enumerate(index))
                self._faces[axis, following] = start, numbers[labels[_plane(axis, -1)]]
        self._voxels.append(voxels[meets])
        self._marked.append(marked[meets])
        self.starts.append(start + int(np.count_nonzero(meets)))
        self.components += int(np.count_nonzero(self.keeps(voxels, marked)[1:] & ~meets[1:]))
        return labels[self._own(index)], voxels, numbers

    def settle(self):
        """Join what was taken in. Then components is the number of those to keep. Of those that
        meet other blocks sizes (N,) has the voxels, and roots (M,) which one a number is of."""
        many, pairs = self.starts[-1], np.concatenate([np.zeros((2, 0), int), *self._pairs], axis=1)
        graph = sparse.coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), (many, many))
        count, self.roots = sparse.csgraph.connected_components(graph, directed=False)
        counted = functools.partial(np.bincount, self.roots, minlength=count)
        voxels, marked = (np.concatenate(parts) for parts in (self._voxels, self._marked))
        self.sizes = counted(weights=voxels).astype(np.int64)
        keep = self.keeps(self.sizes, counted(weights=marked) > 0)
        self.judged, self.components = keep[self.roots], self.components + int(keep.sum())
        self._voxels = self._marked = self._pairs = None

    def kept(self, index, mask, mark=None):
        """The voxels (d, h, w) bool of a block that are of components to keep; as `add` has it."""
        labels, voxels, marked, meets = self._measure(index, mask, mark)
        keep, place = self.keeps(voxels, marked), self.grid.flat(index)
        keep[meets] = self.judged[self.starts[place] : self.starts[place + 1]]
        keep[0] = False
        return keep[labels[self._own(index)]]

    def state(self):
        """Arrays by which `kept` works elsewhere, and what takes them back."""
        return {"starts": np.asarray(self.starts), "judged": self.judged}

    def load(self, state):
        self.starts, self.judged = state["starts"], state["judged"]

    def _own(self, index):
        return tuple(map(slice, size_of(self.grid.box(index))))

    def _measure(self, index, mask, mark):
        """(labels, their voxels in the block, whether they are marked, whether they meet others).

        Labels are those of the box that is grown along the axes that blocks are joined along.
        """
        box = tuple(o if a == self.axis else slice(None) for a, o in enumerate(self._own(index)))
        labels, count = _label(mask[box], self.connectivity, self.axis)
        marked, meets = np.zeros(count + 1, bool), np.zeros(count + 1, bool)
        if mark is not None:
            marked[labels[mark[box]]] = True
        for axis in self.axes:
            for end, other in ((0, index[axis]), (-1, self.grid.counts[axis] - 1 - index[axis])):
                if other:
                    meets[labels[_plane(axis, end)]] = True
                elif self.enclosed:
                    marked[labels[_plane(axis, end)]] = True
        meets[0] = False
        return labels, _counts(labels[self._own(index)], count), marked, meets


def _any(voxels, marked):
    return np.ones(len(voxels), bool)


def _plane(axis, end):
    return tuple(end if a == axis else slice(None) for a in range(3))


def _label(mask, connectivity, axis):
    """(labels (D, H, W) from 1, their number), of planes across an axis unless that is None."""
    if not mask.any():
        return np.zeros(mask.shape, np.uint8), 0
    if axis is None:
        return partitions.label(mask, connectivity)
    planes = np.ascontiguousarray(np.moveaxis(mask, axis, 0))
    labels, count = np.zeros(planes.shape, np.uint32), 0
    for plane, out in zip(planes, labels, strict=True):
        found, number = cc3d.connected_components(plane, connectivity=connectivity, return_N=True)
        np.add(found, np.uint32(count), out=out, where=plane)  # found may be uint16
        count += number
    return np.moveaxis(labels, 0, axis), count


def _counts(labels, count):
    """How often each of the labels 0 to count occurs, a few planes at a time."""
    if count == 0:
        return np.array([labels.size])
    counts, step = np.zeros(count + 1, np.int64), max(1, max(_COUNTED, count) // labels[0].size)
    for start in range(0, len(labels), step):
        counts += np.bincount(labels[start : start + step].reshape(-1), minlength=count + 1)
    return counts


@contextlib.contextmanager
def written(path):
    """A file to write to, which takes the name path when that ends well; OSError, one sentence, if
    the disk is full."""
    try:
        with atomic.replacing(path) as partial, open(partial, "wb") as file:
            yield file
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{path}: expected a disk with room for what is kept between two steps, got "
            f"{error.strerror}; make room and start again, which goes on after the last step"
        ) from error


class Bits:
    """Masks of several regions on disk, a bit for each voxel, written a block at a time.

    A block lies in one piece, and takes no room where its masks are empty.
    """

    def __init__(self, path, grid, regions):
        self.path, self.grid, self.regions = path, grid, tuple(regions)
        depth, height, width = grid.block
        self.slot = (len(self.regions), depth, height, -(-width // 8))

    def fill(self, masks):
        """Write masks(box) of every block, unless the file is there."""
        if os.path.exists(self.path):
            return
        size = math.prod(self.slot)
        with written(self.path) as file:
            file.truncate(size * math.prod(self.grid.counts))
            for index in self.grid:
                whole, packed = masks(self.grid.box(index)), np.zeros(self.slot, np.uint8)
                for rows, region in zip(packed, self.regions, strict=True):
                    bits = np.packbits(whole[region], axis=-1)
                    rows[tuple(map(slice, bits.shape))] = bits
                if packed.any():
                    file.seek(self.grid.flat(index) * size)
                    file.write(packed)

    def read(self, box):
        """{region: mask (d, h, w) bool} of any box."""
        masks = {region: np.zeros(size_of(box), bool) for region in self.regions}
        for index, own, there in self.grid.touched(box):
            at = self.grid.flat(index) * math.prod(self.slot)
            # Mapped anew each time, so that pages that were read do not stay in this process.
            packed = np.memmap(self.path, np.uint8, "r", at, self.slot)
            z, y, x = own
            bytes_ = slice(x.start // 8, -(-x.stop // 8))
            first = x.start - 8 * bytes_.start
            for rows, mask in zip(packed, masks.values(), strict=True):
                bits = np.unpackbits(rows[z, y, bytes_], axis=-1)
                mask[there] = bits[..., first : first + x.stop - x.start]
        return masks
