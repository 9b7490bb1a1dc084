"""Partitions of the foreground into connected components, and how far two of them differ.

    split, merge = partition(prediction, truth).variation_of_information()
    count_components(mask)

The variation of information (Meila 2003; split and merge as in Nunez-Iglesias et al. 2013, and as
scikit-image computes it) is over the voxels that are foreground of either mask; the background of a
mask is one more component there. Masks are (D, H, W) bool.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cc3d
import numpy as np

# cc3d 4.1 has room for voxels / 4 labels where isolated voxels, one to each 2 x 2 x 2, need more if
# an axis is of 1 or 3 ("maximum length exception"); it is enough once every axis is even.
_THIN = 3
# A table of all pairs of components is counted whole up to so many cells for each voxel; above,
# the pairs are sorted.
_CELLS_PER_VOXEL = 4


class Partition(NamedTuple):
    """The 26-connected components of a prediction and of its truth, where either has a voxel."""

    predicted: int  # components of the prediction
    true: int  # components of the truth
    in_prediction: np.ndarray  # (N,) component of the prediction, 0: background
    in_truth: np.ndarray  # (N,) the same of the truth

    def variation_of_information(self):
        return variation_of_information(self.in_prediction, self.in_truth)


def partition(prediction, truth, *, threads=2):
    """The `Partition` of two masks of one shape; some 12 bytes per voxel and mask meanwhile."""
    either = (prediction | truth).reshape(-1)

    def labels_of(mask):
        labels, count = label(mask)
        return labels.reshape(-1).compress(either), count

    with ThreadPoolExecutor(threads) as pool:
        (in_prediction, predicted), (in_truth, true) = pool.map(labels_of, (prediction, truth))
    return Partition(predicted, true, in_prediction, in_truth)


def label(mask, connectivity=26):
    """(labels (D, H, W) from 1, 0 on the background; their number)."""
    mask = np.ascontiguousarray(mask, dtype=bool)
    whole = tuple(map(slice, mask.shape))
    if 0 < min(mask.shape) <= _THIN:
        mask = np.pad(mask, [(0, n % 2) for n in mask.shape])
    labels, count = cc3d.connected_components(mask, connectivity=connectivity, return_N=True)
    return labels[whole], int(count)


def count_components(mask, connectivity=26):
    """The number of connected components of a mask (D, H, W); 0 if it is empty."""
    return label(mask, connectivity)[1]


def variation_of_information(in_prediction, in_truth):
    """(split, merge) of two label arrays of one shape, of integers of 0 or more: two floats, bits.

    split, H(prediction | truth), grows where the prediction cuts what is one in the truth; merge,
    H(truth | prediction), where it joins what is apart. Elements of label 0 count too.
    """
    pairs, counts = pairs_of(np.ravel(in_prediction), np.ravel(in_truth))
    sizes = counts, *(np.bincount(labels, counts) for labels in pairs)
    return information(*(np.unique(size, return_counts=True) for size in sizes))


def information(of_pairs, of_prediction, of_truth):
    """(split, merge) from the sizes of pairs of labels, and of the labels of either side.

    Each is (sizes in voxels, ascending, 0 for none; how many have that size): their order, and so
    the order of labels, does not change a bit.
    """
    of_pairs, of_prediction, of_truth = map(_entropy, (of_pairs, of_prediction, of_truth))
    # Both are 0 or more but for rounding.
    return max(0.0, of_pairs - of_truth), max(0.0, of_pairs - of_prediction)


def pairs_of(first, second):
    """((label of first, label of second) of each pair that occurs, how often): three (N,)."""
    width = int(second.max(initial=0)) + 1
    key = first.astype(np.int64) * width + second
    if (int(first.max(initial=0)) + 1) * width <= _CELLS_PER_VOXEL * key.size:
        counts = np.bincount(key)
        pairs = np.flatnonzero(counts)
        counts = counts[pairs]
    else:
        pairs, counts = np.unique(key, return_counts=True)
    return np.divmod(pairs, width), counts


def _entropy(sized):
    """Of a distribution, in bits, by its sizes and how many have each."""
    sizes, times = (np.asarray(one, np.float64)[np.asarray(sized[0]) > 0] for one in sized)
    share = sizes / max(1.0, sizes @ times)
    return float(-(times * share * np.log2(share)).sum())


def voi_score(split, merge):
    """1 / (1 + 0.3 (split + merge)), in (0, 1]: the Vesuvius Challenge's score, bits given."""
    return 1.0 / (1.0 + 0.3 * (split + merge))
