"""The inputs of evaluate.py: files matched by case id; masks read and checked, and made 0 and 1
unless classes are named.

    pairs, dataset = match([("new", "runs/new/predictions")], "labels", None, errors, notes)
    masks = read(pairs[0], ReadOptions(ignore_label=2), errors)

What is wrong is collected as sentences in errors.
"""

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scoring import metrics
from scoring.classes import described, ids_of, voxels_of
from scoring.masks import is_probability
from volumes import casefile, files, zarr_store
from volumes.statistics import clip_fill
from volumes.volume import WHITE, compare, is_spacing, with_unit

OTSU = "otsu"  # the method of that name
VOXELS = "voxels"  # the unit where no file has a spacing, and none is given


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
    classes: dict | None = None  # {name: ids} of those that are scored each, None: one foreground
    # Declared values of no class that is scored: background; None: all others are.
    background: tuple | None = ()
    spacing: tuple | None = None  # z, y, x, instead of that of the files
    check_spacing: bool = True  # whether files must agree on it
    otsu: bool = False  # whether the image is thresholded too
    invert: bool = False  # whether its dark side is the mask
    # Classes whose probabilities are read, (None,) those of one foreground.
    probs: tuple = ()


@dataclass(frozen=True)
class Masks:
    """The masks of a case, of 0 and 1 or, with classes, of their ids."""

    masks: dict  # {method: (D, H, W)}
    truth: np.ndarray | None  # the same, and ignore_label
    spacing: tuple  # z, y, x
    unit: str
    notes: list  # on their headers and values
    absent: dict  # {method, or None for the truth: [classes without a voxel]}
    probs: dict  # {method: {class, or None: (D, H, W)}} of those that the options ask for


def find_sources(text, role, errors, notes):
    """({case id: path} of the volumes that text names, the dataset if it is one or None).

    role is "prediction", "truth" or "image". Where a folder or pattern names labels and images
    together, each role uses its own; probability maps beside predictions are left out.
    """
    dataset, there = None, []
    try:
        if casefile.is_dataset(text):
            dataset = casefile.read_dataset(text)
            cases = dataset.cases.values()
            if role == "image":
                volumes = [files.Source(case.id, f"{case.path}:image") for case in cases]
            else:
                volumes = [files.Source(c.id, f"{c.path}:label") for c in cases if c.labeled]
        else:
            there = files.find_volumes(text, notes)
            volumes = _of_role(there, role)
            if role == "truth" and (left := [s.path for s in there if s not in volumes]):
                notes.append(f"{text}: not named as labels, left out: {listed(left)}")
    except (ValueError, FileNotFoundError) as error:
        errors += str(error).split("\n")
        return {}, None
    sources = _one_of_each_id([(source.id, source.path) for source in volumes], role, errors)
    if not sources:
        got = f"only {listed(s.path for s in there)}" if there else "none"
        errors.append(f"{text}: expected one {role} or more, got {got}; check the path")
    return sources, dataset


def _one_of_each_id(items, role, errors):
    """{id: path} of (id, path); a second path of one id is an error."""
    paths = {}
    for case, path in items:
        if paths.setdefault(case, path) != path:
            errors.append(
                f"{path}: expected one {role} of case {case}, got {paths[case]} too; move one away"
            )
    return paths


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
    said = []  # the same folder may be named twice
    methods = {
        name: find_sources(path, "prediction", errors, said)[0] for name, path in predictions
    }
    truths, dataset = find_sources(truth, "truth", errors, said)
    shown = find_sources(images, "image", errors, said)[0] if images else None
    known = {i: c.path for i, c in dataset.cases.items()} | truths if dataset else truths
    # One file and one file are a pair whatever they are called.
    alone = all(files.is_volume(t) for _, t in [*predictions, ("", truth)])
    methods = {m: _by_known_id(s, known, alone, errors, said) for m, s in methods.items()}
    notes += dict.fromkeys(said)
    if errors:
        return [], dataset
    predicted = set().union(*methods.values())
    if dataset and (bare := predicted & set(known) - set(truths)):
        notes.append(f"no label, not scored: {listed(bare)}")
        methods = {m: {i: p for i, p in s.items() if i not in bare} for m, s in methods.items()}
        predicted -= bare
    if len(predicted) == 1:  # a single file is of that case, whatever it is called
        if files.is_volume(truth):
            if not alone and predicted != set(truths):
                notes.append(f"the only prediction, {listed(predicted)}, is scored by {truth}")
            truths = dict(zip(predicted, truths.values(), strict=True))
        if images and files.is_volume(images):
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
                "say --cases, rename one, or name the ids with a pattern such as '{id}.tif'"
            )
    if shown is None and dataset:
        shown = {case.id: f"{case.path}:image" for case in dataset.cases.values()}
    return [
        Pair(i, {m: methods[m][i] for m in methods}, truths[i], (shown or {}).get(i))
        for i in sorted(wanted.intersection(*sides.values()))
    ], dataset


def _wanted(ids, only, errors):
    """Those of the ids that a pattern of `only` names; a pattern that names none is an error."""
    matches = {pattern: files.matching(ids, pattern) for pattern in only}
    for pattern, cases in matches.items():
        if not cases:
            errors.append(f"--cases {pattern}: expected a case of it, got {listed(ids)}")
    return set().union(*matches.values()) if only else ids


def _by_known_id(sources, known, alone, errors, notes):
    """{id among known: path} of {id: path}, both by their own stem, their id, or as it begins.

    What goes with an id by the beginning of its name is noted, unless the files are alone.
    """
    items, pairs = [], []
    for case, path in sources.items():
        stem = files.stem_of(path)
        begins = [i for i in known if stem.startswith((f"{i}_", f"{i}-", f"{i}."))]
        name = next((i for i in (stem, case) if i in known), max(begins, key=len, default=case))
        items.append((name, path))
        if name in known and not alone:
            pairs.append((name if name in (stem, case) else stem, path, name, known[name]))
    notes += files.notes_on_pairs(pairs)
    return _one_of_each_id(items, "prediction", errors)


def listed(ids):
    """Ids for people, the first few of many."""
    return files.few(sorted(ids))


def read(pair, options, errors, reader=files.read_label):
    """The `Masks` of a `Pair`, from what reader gives of a path; None if that added to errors."""
    before = len(errors)
    errors += filter(None, map(zarr_store.unfinished, pair.predictions.values()))
    predictions = {m: _read(reader, p, errors) for m, p in pair.predictions.items()}
    truth = _read(reader, pair.truth, errors)
    image = _read(files.read_image, pair.image, errors) if options.otsu else None
    probs = {m: _read_probs(p, options.probs, errors) for m, p in pair.predictions.items()}
    if len(errors) > before:
        return None
    stated = [v for v in (truth, *predictions.values()) if v.spacing is not None]
    sides = [("prediction and truth", p, truth) for p in predictions.values()]
    sides += [("truth and image", truth, image)] if image else []
    of_masks = [(predictions[m], p) for m, own in probs.items() for p in own.values()]
    sides += [("prediction and probabilities", *both) for both in of_masks]
    if truth.spacing is None:  # else each prediction is compared with that of the truth
        sides += [("predictions", p, stated[0]) for p in stated[1:]]
    notes = _notes_on(sides, options, errors)
    for value in options.foreground or ():
        if not (truth.array == value).any():
            notes.append(f"truth: no voxel of class {value}")
    for volume in (*predictions.values(), truth):
        notes += volume.remarks() if options.spacing is None else volume.notes
    for volume in stated if options.spacing is None else ():
        if not is_spacing(volume.spacing):
            got = with_unit(volume.spacing, volume.unit)
            errors.append(f"{volume.path}: expected a spacing above 0, got {got}; give --spacing")
    ignored = options.ignore_label
    absent = {}
    if options.classes:
        predictions = {
            m: _without(p, options.background, "predictions", notes) for m, p in predictions.items()
        }
        truth = _without(truth, options.background, "truth", notes)
        masks, true_mask = {m: p.array for m, p in predictions.items()}, truth.array
        for role, volume in {**predictions, None: truth}.items():
            absent[role] = _absent(volume, options, role is None, errors)
    else:
        masks = {m: _binary(p, None, "predictions", notes, errors) for m, p in predictions.items()}
        if (merged := _merged(truth, options, notes, errors)) is None:
            return None
        true_mask = _binary(merged, ignored, "truths", notes, errors)
    if ignored is not None and (true_mask == ignored).all():
        errors.append(
            f"{truth.path}: expected labeled voxels, got {ignored} (ignored) in all of them; "
            "leave this case out with --cases"
        )
    if image is not None:
        masks[OTSU] = _otsu_mask(image, true_mask, options.invert, notes, errors)
    if len(errors) > before:
        return None
    spacing, unit = _spacing_of(truth, stated, options.spacing, notes)
    values = {m: {which: p.array[0] for which, p in own.items()} for m, own in probs.items()}
    return Masks(masks, true_mask, tuple(spacing), unit, notes, absent, values)


def _spacing_of(truth, stated, given, notes):
    """(spacing, unit): given by hand, else what the truth states, a prediction, or voxels."""
    first = stated[0] if stated else None
    if given:
        if first and not np.allclose(first.spacing, given, rtol=1e-3):
            other = with_unit(first.spacing, first.unit)
            notes.append(f"{first.path} states {other}, --spacing is used")
        return given, ""
    if first is None:
        notes.append("no file has a spacing: tolerance and distances are in voxels (--spacing)")
        return metrics.VOXEL, VOXELS
    if truth.spacing is None:
        notes.append("the truth has no spacing, that of the prediction is used (--spacing)")
    return first.spacing, first.unit


def _read(reader, path, errors):
    try:
        return reader(path)
    except ValueError as error:
        errors.append(str(error))


def _notes_on(sides, options, errors):
    """What is odd about [(what, a volume, one that has to have the same voxels)]."""
    how, notes = {"spacing": options.check_spacing, "axes": options.spacing is None}, []
    for what, volume, other in sides:
        faults, odd = compare(volume, other, **how)
        errors += faults
        notes += [f"{what}: {note}" for note in odd]
    return notes


def _read_probs(prediction, classes, errors):
    """{class: `Volume`} of what infer.py has put beside a prediction; the class None is its all."""
    path = Path(files.split_dataset(prediction)[0])
    if files.suffix_of(path) == ".zarr":  # which holds both
        return {
            c: _read(functools.partial(zarr_store.probability, name=c), path, errors)
            for c in classes
        }
    folder = path.parent / "probabilities"
    return {c: _read(_read_map, folder / (c or "") / path.name, errors) for c in classes}


def _read_map(path):
    if not path.is_file():
        raise files.VolumeError(
            f"{path}: expected the probabilities of this prediction for the ece, got none; predict "
            "with inference.save_probabilities=true"
        )
    volume = files.read_image(str(path))
    if len(volume.array) != 1 or not is_probability(volume.array):
        got = f"{len(volume.array)} channels from {volume.array.min():g} to {volume.array.max():g}"
        raise files.VolumeError(
            f"{path}: expected probabilities of one channel from 0 to 1, got {got}; predict again "
            "with inference.save_probabilities=true"
        )
    return volume


def _merged(truth, options, notes, errors):
    """The truth with 1 where any of the classes that count is, if they are named, and 0 where one
    is that counts as background, which is noted; None and an error if it has other values."""
    if not options.foreground:
        return truth
    known = [0, *options.foreground, *(options.background or ())]
    known += [] if options.ignore_label is None else [options.ignore_label]
    _, others = voxels_of(truth.array, known)
    if others and options.background is not None:
        errors.append(
            f"{truth.path}: expected the values {', '.join(map(str, sorted(known)))}, got "
            f"{', '.join(map(str, others[:8]))}; name every class with --classes NAME=ID ..., and "
            "the value of unlabeled voxels with --ignore-label"
        )
        return None
    truth = _without(truth, [*(options.background or ()), *others], "truth", notes)
    counts, one = np.isin(truth.array, options.foreground), truth.array.dtype.type(1)
    return dataclasses.replace(truth, array=np.where(counts, one, truth.array))


def _without(volume, background, role, notes):
    """A volume with 0 where a class is that counts as background, which is noted."""
    others = np.isin(volume.array, background)
    if not others.any():
        return volume
    values = ", ".join(map(str, np.unique(volume.array[others])))
    notes.append(f"{role}: {values} is of no class that is scored and counts as background")
    zero = volume.array.dtype.type(0)
    return dataclasses.replace(volume, array=np.where(others, zero, volume.array))


def _absent(volume, options, is_truth, errors):
    """Names of the classes that no voxel of a volume has; an error if it has other values."""
    ignored = options.ignore_label if is_truth else None
    known = [0, *ids_of(options.classes), *([] if ignored is None else [ignored])]
    voxels, others = voxels_of(volume.array, known)
    if others:
        also = "" if ignored is None else f" and {ignored} (ignored)"
        advice = "name every class with --classes NAME=ID ..."
        if not is_truth:
            advice += ", or score classes that are merged in predictions with --foreground"
        elif ignored is None:
            advice += ", and the value of unlabeled voxels with --ignore-label"
        errors.append(
            f"{volume.path}: expected 0 and the classes {described(options.classes)}{also}, got "
            f"{', '.join(map(str, others[:8]))}; {advice}"
        )
    return [name for name, ids in options.classes.items() if not any(voxels[i] for i in ids)]


def _binary(volume, ignored, role, notes, errors):
    """The array of a volume with 1 for 255 (or 254), which is noted."""
    array, most = volume.array, int(volume.array.max())
    others = [] if ignored is None else [ignored]
    if most in WHITE and most != ignored and np.isin(array, [0, most, *others]).all():
        notes.append(f"{role} of 0 and {most} read as 0 and 1")
        return np.where(array == most, array.dtype.type(1), array)
    if not np.isin(array, [0, 1, *others]).all():
        advice = "give a mask of one class, or name its classes with --classes NAME=ID ..."
        if role == "truths":
            advice += ", or with --foreground those that count as one"
            if ignored is None:
                advice += ", and the value of unlabeled voxels with --ignore-label"
        wanted = ", ".join(map(str, [0, 1, *others]))
        values = ", ".join(map(str, np.unique(array)[:8]))
        errors.append(f"{volume.path}: expected the values {wanted}, got {values}; {advice}")
    return array


def _otsu_mask(image, truth, invert, notes, errors):
    """What is brighter than Otsu's threshold (darker with invert) as a bool mask (D, H, W). It is
    noted where voxels of the truth, where that is 1, are in it less than half as often as any."""
    if image.array.shape[0] != 1:
        got = f"got {image.array.shape[0]}; give one channel as a volume of its own"
        errors.append(f"{image.path}: expected one channel for --otsu, {got}")
        return None
    try:
        voxels = clip_fill(image.array[0])  # or all others would be one class
        mask = (image.array[0] > metrics.otsu_threshold(voxels)) != invert
    except ValueError as error:
        errors.append(f"{image.path}: {error}; --otsu cannot use this image")
        return None
    if mask.shape == truth.shape and (truth == 1).any():
        if mask[truth == 1].mean() < mask.mean() / 2:
            advice = "leave --invert out" if invert else "give --invert"
            notes.append(f"{OTSU}: the truth is on the other side of the threshold; {advice}")
    return mask
