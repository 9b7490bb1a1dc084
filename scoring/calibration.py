"""How far probabilities are from the share of voxels that they promise.

    expected_calibration_error(probs, truth, labeled)

Of all voxels with probability 0.8, 80 % should be foreground.
"""

import math

import numpy as np

BINS = 15  # as Guo et al. have


def checked_bins(bins):
    """bins as an int. ValueError for what is not a whole number of 1 or more."""
    if not 1 <= bins < math.inf or bins != bins // 1:
        raise ValueError(f"bins: expected a whole number of 1 or more, got {bins:g}")
    return int(bins)


def expected_calibration_error(probs, truth, labeled=None, bins=BINS):
    """Naeini et al. 2015 (AAAI, "Obtaining well calibrated probabilities using Bayesian binning"):
    the mean over bins, weighted by their voxels, of |share of foreground - mean probability|.

    probs (D, H, W) floats in [0, 1], of the foreground; truth (D, H, W) bool; labeled (D, H, W)
    bool or None: everywhere. Bin m of M holds the probabilities from m / M to below (m + 1) / M,
    the last one 1 too. In [0, 1]; 0 without a labeled voxel.

    Bins are of the foreground's probability. Guo et al. 2017 (arXiv:1706.04599), of many classes,
    bin that of the likelier class; in two classes that adds up voxels of 0.1 and of 0.9, where too
    much foreground in one hides too little in the other.
    """
    off, voxels = gaps_of_bins(probs, truth, labeled, checked_bins(bins))
    return mean_gap(off, voxels)


def mean_gap(off, voxels):
    """The error from the sums of `gaps_of_bins`."""
    return float(np.abs(off).sum() / max(1, voxels))


def gaps_of_bins(probs, truth, labeled, bins):
    """(true minus promised voxels of each bin (bins,), voxels) of that mean; both add up."""
    off, voxels = np.zeros(bins), 0
    for z, values in enumerate(probs):  # a slice at a time, in float64
        chosen = slice(None) if labeled is None else labeled[z]
        values, on = values[chosen].reshape(-1).astype(np.float64), truth[z][chosen].reshape(-1)
        index = np.minimum(values * bins, bins - 1).astype(np.int64)
        off += np.bincount(index, weights=on - values, minlength=bins)
        voxels += values.size
    return off, voxels
