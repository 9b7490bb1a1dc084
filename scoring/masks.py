"""The masks of a case as they are scored: read, checked against each other, brought to 0 and 1.

What is wrong with a case is not raised one by one: it is collected as sentences.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from scoring import metrics
from volumes import files as volumes

WHITE = (254, 255)  # what imaging tools write where they mean 1
OTSU = "otsu"  # the method of that name


@dataclass(frozen=True)
class Reading:
    """How masks are read; plain values.

    ignore_label: value of unlabeled voxels in the truth, None: there are none; foreground: classes
    of the truth that count, None: it has one; spacing (z, y, x): instead of what files state;
    check_spacing: whether files must agree on it; otsu, invert: whether the image is thresholded
    too, and what is dark then is found.
    """

    ignore_label: int | None = None
    foreground: tuple | None = None
    spacing: tuple | None = None
    check_spacing: bool = True
    otsu: bool = False
    invert: bool = False


@dataclass(frozen=True)
class Masks:
    """What `read` gives. masks: {method: (D, H, W) of 0 and 1}; truth: the same, and ignore_label.

    spacing z, y, x, and whether any file stated it; white: what stood for 1, by role, if not 1.
    """

    masks: dict
    truth: np.ndarray
    spacing: tuple
    unit: str
    stated: bool
    white: dict


def read(pair, reading, faults):
    """The `Masks` of a `pairs.Pair`; None if that added to faults."""
    known = len(faults)
    predictions = {m: _read(volumes.read_label, p, faults) for m, p in pair.predictions.items()}
    truth = _read(volumes.read_label, pair.truth, faults)
    image = _read(volumes.read_image, pair.image, faults) if reading.otsu else None
    if len(faults) > known:
        return None
    for prediction in predictions.values():
        _check_same_grid(prediction, truth, reading.check_spacing, faults)
    if image is not None:
        _check_same_grid(truth, image, reading.check_spacing, faults)
    if reading.spacing is None and not all(s > 0 for s in truth.spacing or ()):
        faults.append(
            f"{truth.path}: expected a spacing above 0, got {_with_unit(truth)}; give --spacing"
        )
    white = {}
    for method, prediction in predictions.items():
        predictions[method] = _binary(prediction, None, "predictions", white)
        _check_values(predictions[method], None, "give a mask of one class", faults)
    truth = _binary(_of_classes(truth, reading), reading.ignore_label, "truths", white)
    _check_truth(truth, reading.ignore_label, faults)
    masks = {method: prediction.array for method, prediction in predictions.items()}
    if image is not None:
        masks[OTSU] = otsu_mask(image, reading.invert, faults)
    if len(faults) > known:
        return None
    states = (volume for volume in (truth, *predictions.values()) if volume.spacing is not None)
    about = next(states, None)
    spacing = reading.spacing or (about.spacing if about else metrics.VOXEL)
    unit = about.unit if about and not reading.spacing else ""
    return Masks(masks, truth.array, tuple(spacing), unit, about is not None, white)


def _read(reader, path, faults):
    try:
        return reader(path)
    except volumes.VolumeError as error:
        faults.append(str(error))
        return None


def _of_classes(truth, reading):
    """The truth with 1 where any of the classes that count is, if they are named."""
    if not reading.foreground:
        return truth
    classes = np.isin(truth.array, reading.foreground).astype(truth.array.dtype)
    ignored = -1 if reading.ignore_label is None else reading.ignore_label
    classes = np.where(truth.array == ignored, truth.array, classes)
    return dataclasses.replace(truth, array=classes)


def _binary(volume, ignore_label, role, white):
    """The volume with 0 and 1 for 0 and 255 (or 254), which is noted; other values stay."""
    array, most = volume.array, int(volume.array.max())
    known = [0, most] if ignore_label is None else [0, most, ignore_label]
    if most not in WHITE or most == ignore_label or not np.isin(array, known).all():
        return volume
    white[role] = most
    return dataclasses.replace(volume, array=np.where(array == most, array.dtype.type(1), array))


def same_spacing(a, b):
    """Whether two volumes agree on spacing to 1 %, as far as both state it."""
    if a.spacing is None or b.spacing is None:
        return True
    known = a.unit in volumes.METRES and b.unit in volumes.METRES
    scale = volumes.METRES[a.unit] / volumes.METRES[b.unit] if known else 1.0
    return np.allclose(np.asarray(a.spacing) * scale, b.spacing, rtol=0.01, atol=0.0)


def _check_same_grid(volume, other, check_spacing, faults):
    if volume.array.shape != other.array.shape[-3:]:
        faults.append(
            f"{volume.path}: expected the shape of {other.path}, {other.array.shape[-3:]}, got "
            f"{volume.array.shape}; give volumes of the same voxels"
        )
    if check_spacing and not volumes.same_axes(volume, other):
        faults.append(f"{volume.path}: expected the axes of {other.path}, got other ones")
    if check_spacing and not same_spacing(volume, other):
        faults.append(
            f"{volume.path}: expected the spacing of {other.path}, {_with_unit(other)}, got "
            f"{_with_unit(volume)}; correct the header that is wrong"
        )


def _with_unit(volume):
    return f"{' '.join(f'{s:g}' for s in volume.spacing)} {volume.unit}".rstrip()


def _check_truth(truth, ignore_label, faults):
    advice = "give a mask of one class, or name with --foreground the classes that count"
    if ignore_label is None:
        advice += ", and the value of unlabeled voxels with --ignore-label"
    _check_values(truth, ignore_label, advice, faults)
    if ignore_label is not None and (truth.array == ignore_label).all():
        faults.append(
            f"{truth.path}: expected labeled voxels, got {ignore_label} (ignored) in all of them; "
            "leave this case out with --cases"
        )


def _check_values(volume, ignored, advice, faults):
    allowed = [0, 1] if ignored is None else [0, 1, ignored]
    if not np.isin(volume.array, allowed).all():
        found = ", ".join(map(str, np.unique(volume.array)[:8]))
        allowed = ", ".join(map(str, allowed))
        faults.append(f"{volume.path}: expected the values {allowed}, got {found}; {advice}")


def otsu_mask(image, invert, faults):
    """What is brighter than Otsu's threshold (darker with invert) as a bool mask (D, H, W)."""
    if image.array.shape[0] != 1:
        faults.append(
            f"{image.path}: expected one channel for --otsu, got {image.array.shape[0]}; "
            "give one channel as a volume of its own"
        )
        return None
    try:
        return (image.array[0] > metrics.otsu_threshold(image.array[0])) != invert
    except ValueError as error:
        faults.append(f"{image.path}: {error}; --otsu cannot use this image")
        return None
