"""Which prediction, truth and image belong together: files of one case, matched by id.

What does not fit is not raised one by one: it is collected as sentences.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import cases
import volumes


@dataclass(frozen=True)
class Pair:
    """Where the prediction, those beside it (by name), the truth and perhaps the image are."""

    id: str
    prediction: str
    beside: dict
    truth: str
    image: str | None


def find_sources(text, role, faults):
    """({case id: path} of the volumes that text names, the dataset if it is one or None).

    role is "prediction", "truth" or "image". Where a folder or pattern names labels and images
    together, each role takes its own; probability maps beside predictions are left out. What is
    wrong is added to faults.
    """
    dataset, sources = None, {}
    try:
        if (Path(text) / cases.DATASET_FILE).is_file():
            dataset = cases.read_dataset(text)
            found = _of_dataset(dataset, role)
        else:
            found = volumes.find_volumes(text)
            found = found if len(found) == 1 else _of_role(found, role)
    except ValueError as error:
        faults.append(str(error))
        return {}, None
    for source in found:
        if source.id in sources:
            faults.append(
                f"{source.path}: expected one {role} of case {source.id}, got "
                f"{sources[source.id]} too; move one away"
            )
        sources[source.id] = source.path
    if not sources:
        faults.append(f"{text}: expected one {role} or more, got none; check the path")
    return sources, dataset


def _of_dataset(dataset, role):
    name = "image" if role == "image" else "label"
    wanted = (case for case in dataset.cases.values() if role == "image" or case.labelled)
    return [volumes.Source(case.id, f"{case.path}:{name}") for case in wanted]


def _of_role(found, role):
    labels = [source for source in found if volumes.is_label_name(source.path)]
    if role == "truth":
        return labels or found
    if role == "image":
        return [source for source in found if source not in labels]
    return [source for source in found if not source.id.endswith(("_probs", "_probabilities"))]


def match(args, faults, notes):
    """(pairs to score, value of unlabeled voxels or None).

    One prediction file and one truth file are a pair whatever their names. A prediction without
    truth (or without image, with --otsu) is a fault; a truth without prediction is a note, since
    it is normal to predict the test cases only.
    """
    predictions, _ = find_sources(args.pred, "prediction", faults)
    truths, dataset = find_sources(args.truth, "truth", faults)
    images, _ = find_sources(args.otsu, "image", faults) if args.otsu else ({}, None)
    beside = {n: find_sources(path, "prediction", faults)[0] for n, path in args.beside}
    ignore_label = args.ignore_label
    if ignore_label is None and dataset is not None:
        ignore_label = dataset.ignore_label
    if faults:
        return [], ignore_label
    known = set(dataset.cases) if dataset else set(truths)
    predictions = {_known_id(i, path, known): path for i, path in predictions.items()}
    beside = {n: {_known_id(i, p, known): p for i, p in f.items()} for n, f in beside.items()}
    unlabelled = known - set(truths)
    if unlabelled & set(predictions):
        notes.append(f"no label, not scored: {listed(unlabelled & set(predictions))}")
        predictions = {i: path for i, path in predictions.items() if i not in unlabelled}
    if len(predictions) == 1:
        (only,) = predictions
        truths = {only: next(iter(truths.values()))} if _is_file(args.truth) else truths
        images = {only: next(iter(images.values()))} if _is_file(args.otsu) else images
    needed = [("truth", truths), *((f"prediction of {n}", found) for n, found in beside.items())]
    for role, sources in [*needed, ("image", images if args.otsu else predictions)]:
        for case in sorted(set(predictions) - set(sources)):
            faults.append(
                f"{predictions[case]}: expected {role} {case} with it, got {listed(sources)}; "
                "rename one, or name the ids with a pattern such as '{id}.tif'"
            )
    left = set(truths) - set(predictions)
    # A spacing given by hand, here or at preparation, wins over what other files state.
    args.check_spacing = args.spacing is None and dataset is None
    if left:
        notes.append(f"truth without a prediction, not scored: {listed(left)}")
    shared = sorted(set(predictions).intersection(*(sources for _, sources in needed)))
    others = {i: {name: found[i] for name, found in beside.items()} for i in shared}
    pairs = [Pair(i, predictions[i], others[i], truths[i], images.get(i)) for i in shared]
    return pairs, ignore_label


def _known_id(case, path, known):
    """The id among known that a file means: its whole stem, its id, or the longest beginning."""
    stem = volumes.stem_of(path)
    begins = [i for i in known if stem.startswith((f"{i}_", f"{i}-", f"{i}."))]
    return next((i for i in (stem, case) if i in known), max(begins, key=len, default=case))


def _is_file(text):
    return bool(text) and os.path.isfile(volumes.split_dataset(text)[0])


def listed(ids, most=8):
    ids = sorted(ids)
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(ids[:most]) + more
