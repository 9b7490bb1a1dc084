"""The threshold of a volume by its own probabilities: `inference.threshold=auto`.

A network that saw foreground in a share of its training voxels calls too much foreground in a
volume that has less. Saerens et al. 2002 (Neural Computation 14, 21-41) estimate the share of the
new volume by expectation maximisation: its probabilities are weighed by the ratio of the shares
until their mean is the share itself. The threshold lies where a probability weighed so is 0.5, and
not below 0.5: in a volume unlike those of training voxels are unsure, which passes for a share that
is too high.
"""

import numpy as np

AUTO = "auto"
# Finer at the ends, where most voxels are.
LEVELS = (0.01, 0.02, *(k / 20 for k in range(1, 20)), 0.98, 0.99)
ITERATIONS = 1000


def count_reached(probs, thresholds=LEVELS):
    """How many of rising thresholds each probability reaches: uint8, of up to 255 thresholds."""
    reached = np.zeros(np.shape(probs), np.uint8)
    for threshold in thresholds:
        reached += probs >= threshold
    return reached


def histogram(reached, thresholds=LEVELS):
    """How many voxels of `count_reached` (D, H, W) reach none, one, two ... of the thresholds."""
    # By planes, for numpy counts copies of eight bytes a voxel.
    counts = (np.bincount(plane.reshape(-1), minlength=len(thresholds) + 1) for plane in reached)
    return sum(counts, np.zeros(len(thresholds) + 1, np.int64))


def own_threshold(counts, foreground, thresholds=LEVELS):
    """The one of LEVELS, 0.5 or more, that is nearest to the threshold of a volume.

    counts: the `histogram` of its voxels for these thresholds, LEVELS among them; foreground: the
    share of foreground in training, in (0, 1). 0.5 for a share of None, 0 or 1, and for no voxels.
    """
    if not foreground or foreground == 1 or not counts.any():
        return 0.5
    level = np.searchsorted(LEVELS, (0.0, *thresholds), side="right")
    shares = np.bincount(level, counts, len(LEVELS) + 1) / counts.sum()
    ends = np.array([0.0, *LEVELS, 1.0])
    probs, share = (ends[1:] + ends[:-1]) / 2, foreground
    for _ in range(ITERATIONS):
        inside = probs * share / foreground
        outside = (1 - probs) * (1 - share) / (1 - foreground)
        before, share = share, float((shares * inside / (inside + outside)).sum())
        if abs(share - before) < 1e-7:
            break
    odds = (1 - share) * foreground / max((1 - foreground) * share, 1e-12)
    return max(0.5, LEVELS[int(np.abs(np.array(LEVELS) - odds / (1 + odds)).argmin())])
