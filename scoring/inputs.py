"""The inputs of evaluate.py: files matched by case id; masks read, checked and made 0 and 1.

    pairs, dataset = match([("new", "runs/new/predictions")], "labels", None, errors, notes)
    masks = read(pairs[0], ReadOptions(ignore_label=2), errors)

What is wrong is collected as sentences in errors.
"""

import dataclasses
import fnmatch
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scoring import metrics
from volumes import casefile, files
from volumes.statistics import clip_fill

FULL_SCALE = (254, 255)  # what imaging tools write where they mean 1
OTSU = "otsu"  # the method of that name


@dataclass(frozen=True)
class Pair:
    """Paths of the predictions of a case (by method), its truth and perhaps its image."""

    id: str
    predictions: dict
    truth: str
    image: str | None


@dataclass(frozen=True)
class ReadOptions:
    """How masks are read; plain values."""

    ignore_label: int | None = None  # of unlabeled voxels in the truth
    foreground: tuple | None = None  # classes of the truth that count, None: it has one
    spacing: tuple | None = None  # z, y, x, instead of that of the files
    check_spacing: bool = True  # whether files must agree on it
    otsu: bool = False  # whether the image is thresholded too
    invert: bool = False  # whether its dark side is the mask


@dataclass(frozen=True)
class Masks:
    """The masks of a case."""

    masks: dict  # {method: (D, H, W) of 0 and 1}
    truth: np.ndarray | None  # the same, and ignore_label
    spacing: tuple  # z, y, x
    unit: str
    spacing_in_file: bool  # whether any file has one
    ones: dict  # {role: 254 or 255, where that meant 1}


def find_sources(text, role, errors):
    """({case id: path} of the volumes that text names, the dataset if it is one or None).

    role is "prediction", "truth" or "image". Where a folder or pattern names labels and images
    together, each role uses its own; probability maps beside predictions are left out.
    """
    dataset, sources = None, {}
    try:
        if (Path(text) / casefile.DATASET_FILE).is_file():
            dataset = casefile.read_dataset(text)
            cases = dataset.cases.values()
            if role == "image":
                volumes = [files.Source(case.id, f"{case.path}:image") for case in cases]
            else:
                volumes = [files.Source(c.id, f"{c.path}:label") for c in cases if c.labeled]
        else:
            volumes = _of_role(files.find_volumes(text), role)
    except ValueError as error:
        errors.append(str(error))
        return {}, None
    for source in volumes:
        if source.id in sources:
            errors.append(
                f"{source.path}: expected one {role} of case {source.id}, got "
                f"{sources[source.id]} too; move one away"
            )
        sources[source.id] = source.path
    if not sources:
        errors.append(f"{text}: expected one {role} or more, got none; check the path")
    return sources, dataset


def _of_role(sources, role):
    """Those of several sources that are for a role; one alone is for any."""
    if len(sources) == 1:
        return sources
    labels = [source for source in sources if files.is_label_name(source.path)]
    if role == "truth":
        return labels or sources
    if role == "image":
        return [source for source in sources if source not in labels]
    return [s for s in sources if not s.id.endswith(("_probs", "_probabilities"))]


def match(predictions, truth, images, errors, notes, *, only=()):
    """([Pair] by id, the `casefile.Dataset` that truth is, or None).

    predictions: [(method, path)]; truth, images: paths (images None: those of the dataset); each as
    in `find_sources`. only: ids or patterns, such as scroll_*; all others are left out silently.
    One prediction file and one truth file are a pair whatever their names. An id that is missing on
    one side is an error, but a note where a prepared dataset has more cases or no label.
    """
    methods = {name: find_sources(path, "prediction", errors)[0] for name, path in predictions}
    truths, dataset = find_sources(truth, "truth", errors)
    shown = find_sources(images, "image", errors)[0] if images else None
    if errors:
        return [], dataset
    known = set(dataset.cases) if dataset else set(truths)
    methods = {m: {_known_id(i, p, known): p for i, p in s.items()} for m, s in methods.items()}
    predicted = set().union(*methods.values())
    if dataset and (bare := predicted & known - set(truths)):
        notes.append(f"no label, not scored: {listed(bare)}")
        methods = {m: {i: p for i, p in s.items() if i not in bare} for m, s in methods.items()}
        predicted -= bare
    if len(predicted) == 1:  # a single file is of that case, whatever it is called
        if os.path.isfile(files.split_dataset(truth)[0]):
            truths = dict(zip(predicted, truths.values(), strict=True))
        if images and os.path.isfile(files.split_dataset(images)[0]):
            shown = dict(zip(predicted, shown.values(), strict=True))
    if dataset and (left := set(truths) - predicted):
        notes.append(f"truth without a prediction, not scored: {listed(left)}")
        truths = {i: path for i, path in truths.items() if i in predicted}
    several = len(methods) > 1
    sides = {f"prediction of {m}" if several else "prediction": s for m, s in methods.items()}
    sides |= {"truth": truths} | ({"image": shown} if shown is not None else {})
    wanted = _wanted(predicted | set(truths), only, errors)
    for case, (side, sources) in itertools.product(sorted(wanted), sides.items()):
        if case not in sources:
            there = next(paths[case] for paths in sides.values() if case in paths)
            errors.append(
                f"{there}: expected {side} {case} with it, got {listed(sources) or 'none'}; "
                "rename one, name the ids with a pattern such as '{id}.tif', or say --cases"
            )
    if shown is None and dataset:
        shown = {case.id: f"{case.path}:image" for case in dataset.cases.values()}
    return [
        Pair(i, {m: methods[m][i] for m in methods}, truths[i], (shown or {}).get(i))
        for i in sorted(wanted.intersection(*sides.values()))
    ], dataset


def _wanted(ids, only, errors):
    """Those of the ids that a pattern of `only` names; a pattern that names none is an error."""
    matches = {pattern: fnmatch.filter(ids, pattern) for pattern in only}
    for pattern, cases in matches.items():
        if not cases:
            errors.append(f"--cases {pattern}: expected a case of it, got {listed(ids)}")
    return set().union(*matches.values()) if only else ids


def _known_id(case, path, known):
    """The id among known that a file means: its whole stem, its id, or the longest beginning."""
    stem = files.stem_of(path)
    begins = [i for i in known if stem.startswith((f"{i}_", f"{i}-", f"{i}."))]
    return next((i for i in (stem, case) if i in known), max(begins, key=len, default=case))


def listed(ids, most=8):
    """Ids for people, the first few of many."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(sorted(ids)[:most]) + more


def read(pair, options, errors):
    """The `Masks` of a `Pair`; None if that added to errors."""
    before = len(errors)
    predictions = {m: _read(files.read_label, p, errors) for m, p in pair.predictions.items()}
    truth = _read(files.read_label, pair.truth, errors)
    image = _read(files.read_image, pair.image, errors) if options.otsu else None
    if len(errors) > before:
        return None
    for prediction in predictions.values():
        _check_same_grid(prediction, truth, options.check_spacing, errors)
    if image is not None:
        _check_same_grid(truth, image, options.check_spacing, errors)
    if options.spacing is None and not all(s > 0 for s in truth.spacing or ()):
        errors.append(
            f"{truth.path}: expected a spacing above 0, got {_with_unit(truth)}; give --spacing"
        )
    ones, ignored = {}, options.ignore_label
    masks = {m: _binary(p, None, "predictions", ones, errors) for m, p in predictions.items()}
    true_mask = _binary(_of_classes(truth, options), ignored, "truths", ones, errors)
    if ignored is not None and (true_mask == ignored).all():
        errors.append(
            f"{truth.path}: expected labeled voxels, got {ignored} (ignored) in all of them; "
            "leave this case out with --cases"
        )
    if image is not None:
        masks[OTSU] = _otsu_mask(image, options.invert, errors)
    if len(errors) > before:
        return None
    source = next((v for v in (truth, *predictions.values()) if v.spacing is not None), None)
    spacing = options.spacing or (source.spacing if source else metrics.VOXEL)
    unit = source.unit if source and not options.spacing else ""
    return Masks(masks, true_mask, tuple(spacing), unit, source is not None, ones)


def _read(reader, path, errors):
    try:
        return reader(path)
    except files.VolumeError as error:
        errors.append(str(error))


def _of_classes(truth, options):
    """The truth with 1 where any of the classes that count is, if they are named."""
    if not options.foreground:
        return truth
    classes = np.isin(truth.array, options.foreground).astype(truth.array.dtype)
    if options.ignore_label is not None:
        classes = np.where(truth.array == options.ignore_label, truth.array, classes)
    return dataclasses.replace(truth, array=classes)


def _binary(volume, ignored, role, ones, errors):
    """The array of a volume with 1 for 255 (or 254), which is noted in ones."""
    array, most = volume.array, int(volume.array.max())
    others = [] if ignored is None else [ignored]
    if most in FULL_SCALE and most != ignored and np.isin(array, [0, most, *others]).all():
        ones[role] = most
        return np.where(array == most, array.dtype.type(1), array)
    if not np.isin(array, [0, 1, *others]).all():
        advice = "give a mask of one class"
        if role == "truths":
            advice += ", or name with --foreground the classes that count"
            if ignored is None:
                advice += ", and the value of unlabeled voxels with --ignore-label"
        wanted = ", ".join(map(str, [0, 1, *others]))
        values = ", ".join(map(str, np.unique(array)[:8]))
        errors.append(f"{volume.path}: expected the values {wanted}, got {values}; {advice}")
    return array


def _check_same_grid(volume, other, check_spacing, errors):
    """Shape, axes as far as both files say, and spacing to 1 % if both have one."""
    if volume.array.shape != other.array.shape[-3:]:
        errors.append(
            f"{volume.path}: expected the shape of {other.path}, {other.array.shape[-3:]}, got "
            f"{volume.array.shape}; give volumes of the same voxels"
        )
    if check_spacing and not files.same_axes(volume, other):
        errors.append(f"{volume.path}: expected the axes of {other.path}, got other ones")
    if not check_spacing or volume.spacing is None or other.spacing is None:
        return
    known = volume.unit in files.METRES and other.unit in files.METRES
    scale = files.METRES[volume.unit] / files.METRES[other.unit] if known else 1.0
    if not np.allclose(np.multiply(volume.spacing, scale), other.spacing, rtol=0.01, atol=0.0):
        errors.append(
            f"{volume.path}: expected the spacing of {other.path}, {_with_unit(other)}, got "
            f"{_with_unit(volume)}; correct the header that is wrong"
        )


def _with_unit(volume):
    return f"{' '.join(f'{s:g}' for s in volume.spacing)} {volume.unit}".rstrip()


def _otsu_mask(image, invert, errors):
    """What is brighter than Otsu's threshold (darker with invert) as a bool mask (D, H, W)."""
    if image.array.shape[0] != 1:
        got = f"got {image.array.shape[0]}; give one channel as a volume of its own"
        errors.append(f"{image.path}: expected one channel for --otsu, {got}")
        return None
    try:
        voxels = clip_fill(image.array[0])  # or all others would be one class
        return (image.array[0] > metrics.otsu_threshold(voxels)) != invert
    except ValueError as error:
        errors.append(f"{image.path}: {error}; --otsu cannot use this image")
