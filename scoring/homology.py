"""Homology of masks: their pieces, handles and cavities, and which of them two masks share.

    b0, b1, b2 = betti_numbers(mask, connectivity=26)
    counts = betti_matching(prediction, truth)        # {dimension: (matched, predicted, true)}
    matching_f1(*counts[1])
    toposcore(betti_matching(prediction, truth, tiles=(2, 2, 2)))

Dimension 0 counts pieces (connected components), 1 handles (loops that are not filled), 2 cavities.
Outside of a volume is background. Masks are (D, H, W) bool.

Betti matching (Stucki et al. 2023, arXiv:2211.15272; in 3D 2024, arXiv:2407.04683) says which
classes of prediction P and truth G are the same class of their union U. In the filtration that
fills P first, then U, then the rest, the classes born in P that die in the rest are the image of
H(P) in H(U), and where they die names the class of U; the same for G. Two classes match if they die
at one place. The persistence is that of `cripser` with voxels as vertices, so that foreground
touches by faces (6 neighbors), as in the authors' C++ package, which is not needed.

Where classes die depends on the order among equals, and so does the number of matches. Here the
voxels of a level enter in C order; the package orders edges, squares and cubes by their first voxel
and direction. Against a reduction in the package's order, matches agree in all published cases and
in 41 of 41 pairs of torn sheets; in random blobs with 27 matched handles on average, 2 of 24 pairs
are off by one; in white noise with 76, the difference is 1.2 on average.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from scoring.partitions import count_components
from scoring.surface import bounding_box, extract

DUAL = {6: 26, 26: 6}  # the connectivity of the background
WEIGHTS = (0.34, 0.33, 0.33)  # of the TopoScore's dimensions


def betti_numbers(mask, connectivity=26, histogram=None, components=None):
    """(b0, b1, b2): the pieces, handles and cavities of a mask (D, H, W) bool.

    connectivity of the foreground: 26 (voxels touch by faces, edges or corners) or 6 (by faces);
    the background has the other one. The `Corners.histogram` of the mask in any box, and b0, can be
    given if they are known. ValueError for a mask that is not 3-D or another connectivity.
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim != 3 or connectivity not in DUAL:
        raise ValueError(
            f"betti_numbers: expected a mask (D, H, W) and a connectivity of 6 or 26, got "
            f"{mask.shape} and {connectivity}"
        )
    mask = mask[bounding_box(mask)]
    if histogram is None:
        histogram = extract(mask).histogram
    if components is None:
        components = count_components(mask, connectivity)
    background = ~np.pad(mask, 1)
    cavities = count_components(background, DUAL[connectivity]) - 1  # the outside is one piece
    loops = components + cavities - euler_characteristic(histogram, connectivity)
    return components, loops, cavities


def euler_characteristic(histogram, connectivity=26):
    """b0 - b1 + b2 of a mask from its (256,) `Corners.histogram`.

    Each corner holds a share of the cells around it: with 26-connectivity of the corner itself and
    of its edges, faces and voxels that belong to the foreground; with 6-connectivity of the voxels
    and of the pairs, squares and cubes that they form (after Gray 1971 and Toriwaki 2002).
    """
    voxels = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).reshape(256, 2, 2, 2)
    eighths = np.zeros(256, np.int64)
    for extent in np.ndindex(2, 2, 2):  # along which axes a cell extends
        along = tuple(1 + axis for axis in range(3) if extent[axis])
        across = tuple(1 + axis for axis in range(3) if not extent[axis])
        if connectivity == 26:  # 2^dimension corners share a cell, of which any voxel is enough
            present, share = voxels.max(axis=across, initial=0), 8 >> len(along)
        else:  # all voxels of a cell are needed
            present, share = voxels.min(axis=along, initial=1), 1 << len(along)
        cells = present.reshape(256, -1).sum(axis=1, dtype=np.int64)
        eighths += (-1) ** len(along) * share * cells
    return int(histogram @ eighths) // 8


def betti_matching(prediction, truth, *, tiles=(1, 1, 1), threads=2):
    """{dimension: (matched, predicted, true)} classes of two masks (D, H, W), summed over tiles.

    tiles: into how many parts each axis is cut. The piece that never dies, one of each mask in a
    tile that is not empty there, is not counted.

    Two passes of persistence for each tile, `threads` at a time: for torn sheets with thousands of
    handles in 160 x 160 x 160 voxels some 3 s of a core, and 140 bytes of memory per voxel, each.
    Tiles and dimensions in which either mask has no class need no pass.

    ValueError for shapes that differ or are not 3-D.
    """
    prediction, truth = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"betti_matching: expected two masks of one shape (D, H, W), got {prediction.shape} "
            f"and {truth.shape}"
        )
    pairs = [(prediction[tile], truth[tile]) for tile in _tiles(truth.shape, tiles)]
    masks = [mask for pair in pairs for mask in pair]
    with ThreadPoolExecutor(threads) as pool:
        classes = list(pool.map(_mortal_classes, masks))
        predicted, true = classes[::2], classes[1::2]
        shared = [  # of each tile, the highest dimension in which both have a class, or -1
            max((d for d in range(3) if p[d] and t[d]), default=-1)
            for p, t in zip(predicted, true, strict=True)
        ]
        unions = [pair for pair in pairs for _ in pair]
        deaths = list(pool.map(_deaths, masks, unions, np.repeat(shared, 2)))
    counts = {}
    for dim in range(3):
        died = [places[dim] for places in deaths]
        pairs_died = zip(died[::2], died[1::2], strict=True)
        # Of multisets.
        matched = sum((Counter(p.tolist()) & Counter(t.tolist())).total() for p, t in pairs_died)
        counts[dim] = matched, sum(p[dim] for p in predicted), sum(t[dim] for t in true)
    return counts


def _tiles(shape, tiles):
    """Slices of the tiles, in C order."""
    cuts = []
    for size, count in zip(shape, tiles, strict=True):
        step = max(1, -(-size // count))
        cuts.append([slice(start, min(start + step, size)) for start in range(0, size, step)])
    return [(z, y, x) for z in cuts[0] for y in cuts[1] for x in cuts[2]]


def _mortal_classes(mask):
    """Betti numbers (6-connected foreground) without the piece that never dies."""
    pieces, loops, cavities = betti_numbers(mask, connectivity=6)
    return max(0, pieces - 1), loops, cavities


def _deaths(first, pair, top):
    """Where the classes of `first` die that live on in the union of `pair`.

    An (N,) int64 for each dimension; empty above the dimension `top`.
    """
    import cripser  # late: the scores of voxels and surfaces need none of it

    if top < 0:
        return [np.zeros(0, np.int64)] * 3
    union = pair[0] | pair[1]
    # A rim of one voxel keeps the order in which the background outside of the box joins things.
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in bounding_box(union))
    level = 2.0 - union[box] - first[box]
    # Within a level voxels enter in C order: a rule for ties that also halves the time.
    level += np.linspace(0.0, 1.0, level.size, endpoint=False).reshape(level.shape)
    # Upside down the cells come nearly sorted, which saves a fifth of the time.
    level = np.ascontiguousarray(level[::-1, ::-1, ::-1])
    rows = cripser.computePH(level, maxdim=int(top))  # dim, birth, death, birth zyx, death zyx
    rows = rows[(rows[:, 1] < 1) & (rows[:, 2] >= 2) & (rows[:, 2] < 3)]
    place = rows[:, 6:9].astype(np.int64) @ (np.array(level.strides) // level.itemsize)
    return [place[rows[:, 0] == dim] for dim in range(3)]


def matching_f1(matched, predicted, true):
    """2 matched / (predicted + true), in [0, 1]; 0.5 / (predicted + 0.5) if the truth has none."""
    return 2 * matched / (predicted + true) if true else 0.5 / (predicted + 0.5)


def toposcore(counts):
    """The Vesuvius Challenge's TopoScore of `betti_matching`'s counts, in [0, 1].

    The mean of `matching_f1` by WEIGHTS over the dimensions in which either mask has a class; 1
    where there is none, so also where a mask is empty and the other of one piece.
    """
    occurring = [dim for dim in range(3) if counts[dim][1] or counts[dim][2]]
    if not occurring:
        return 1.0
    weight = sum(WEIGHTS[dim] for dim in occurring)
    return sum(WEIGHTS[dim] * matching_f1(*counts[dim]) for dim in occurring) / weight
