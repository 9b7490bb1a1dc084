"""Masks and volumes of ids as the scores take them, checked before any work."""

import numbers

import numpy as np

from scoring.classes import described, ids_of, voxels_of


def labeled_masks(prediction, truth, ignore_label):
    """Both as bool masks (D, H, W) that are False where truth is ignore_label; see `score`."""
    prediction, truth = checked_arrays(prediction, truth, ignore_label, (0, 1))
    ignored = None if ignore_label is None else truth == ignore_label
    allowed = f"0, 1 and {ignore_label} (ignored)"
    if ignored is None:
        allowed = "0 and 1, as no ignore_label is given"
    prediction = _as_mask("prediction", prediction, "0 and 1", None)
    truth = _as_mask("truth", truth, allowed, ignored)
    return [prediction if ignored is None else prediction & ~ignored, truth]


def checked_arrays(prediction, truth, ignore_label, taken):
    """Both as arrays of one shape (D, H, W); ignore_label must be none of the values taken."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"expected prediction and truth of one shape (D, H, W), got {prediction.shape} and "
            f"{truth.shape}"
        )
    if not (ignore_label is None or is_integer(ignore_label)) or ignore_label in taken:
        raise ValueError(
            f"ignore_label: expected neither {' nor '.join(map(str, taken))} but another integer "
            f"or None, got {ignore_label}"
        )
    return prediction, truth


def is_integer(value):
    return isinstance(value, numbers.Real) and value == value // 1


def _as_mask(name, values, allowed, ignored):
    """values == 1, if all others are 0 or ignored."""
    if values.dtype == bool:
        return values
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name}: expected a bool or integer mask, got {values.dtype}")
    mask = values == 1
    known = np.count_nonzero(mask) + (0 if ignored is None else np.count_nonzero(ignored))
    if known != np.count_nonzero(values):
        values = ", ".join(map(str, np.unique(values)[:8]))
        raise ValueError(f"{name}: expected the values {allowed}, got {values}")
    return mask


def check_ids(name, values, classes, ignore_label):
    """ValueError for values that are neither 0, nor an id of the classes, nor ignore_label."""
    if values.dtype != bool and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name}: expected a volume of integer ids, got {values.dtype}")
    ignored = [] if ignore_label is None else [ignore_label]
    _, others = voxels_of(values, [0, *ids_of(classes), *ignored])
    if others:
        also = "".join(f" and {value} (ignored)" for value in ignored)
        got = ", ".join(map(str, others[:8]))
        raise ValueError(f"{name}: expected 0, the ids of {described(classes)}{also}, got {got}")


def checked_probs(probs, shape, name=""):
    """probs as an array. ValueError unless they are of that shape and from 0 to 1; name: of their
    class."""
    what = f"probs of {name}" if name else "probs"
    got = None if probs is None else np.shape(probs)
    if got != shape:
        raise ValueError(f"{what}: expected probabilities {shape} for the ece, got {got}")
    probs = np.asarray(probs)
    if not is_probability(probs):
        raise ValueError(f"{what}: expected values from 0 to 1, got {probs.min()} to {probs.max()}")
    return probs


def is_probability(values):
    """Whether all values lie from 0 to 1, so that none is NaN."""
    return values.size == 0 or bool(values.min() >= 0 and values.max() <= 1)
