"""Which predictions, truth and image belong together: files of one case, matched by id.

What does not fit is not raised one by one: it is collected as sentences.
"""

import fnmatch
import os
from dataclasses import dataclass
from pathlib import Path

from volumes import casefile as cases
from volumes import files as volumes


@dataclass(frozen=True)
class Pair:
    """Where the predictions of a case (by method), its truth and perhaps its image are."""

    id: str
    predictions: dict
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
    wanted = (case for case in dataset.cases.values() if role == "image" or case.labeled)
    return [volumes.Source(case.id, f"{case.path}:{name}") for case in wanted]


def _of_role(found, role):
    labels = [source for source in found if volumes.is_label_name(source.path)]
    if role == "truth":
        return labels or found
    if role == "image":
        return [source for source in found if source not in labels]
    return [source for source in found if not source.id.endswith(("_probs", "_probabilities"))]


def match(predictions, truth, images, faults, notes, *, only=()):
    """([Pair] by id, the `cases.Dataset` that truth is, or None).

    predictions: [(method, path)]; truth, images: paths (images None: those of the dataset); each as
    `find_sources` takes them. only: ids or patterns, such as scroll_*; all others are left out
    without a word. One prediction file and one truth file are a pair whatever
    their names. An id that any side lacks is a fault. But of a prepared dataset it is normal to
    predict some cases only, and a case without a label cannot be scored: these are notes.
    """
    methods = {name: find_sources(path, "prediction", faults)[0] for name, path in predictions}
    truths, dataset = find_sources(truth, "truth", faults)
    shown = find_sources(images, "image", faults)[0] if images else None
    if faults:
        return [], dataset
    known = set(dataset.cases) if dataset else set(truths)
    methods = {m: {_known_id(i, p, known): p for i, p in f.items()} for m, f in methods.items()}
    predicted = set().union(*methods.values())
    if dataset and (bare := predicted & known - set(truths)):
        notes.append(f"no label, not scored: {listed(bare)}")
        methods = {m: {i: p for i, p in f.items() if i not in bare} for m, f in methods.items()}
        predicted -= bare
    if len(predicted) == 1:  # whatever a single file is called
        truths, shown = _as_only(predicted, truth, truths), _as_only(predicted, images, shown)
    if dataset and (left := set(truths) - predicted):
        notes.append(f"truth without a prediction, not scored: {listed(left)}")
        truths = {i: path for i, path in truths.items() if i in predicted}
    sides = {
        f"prediction of {m}" if len(methods) > 1 else "prediction": methods[m] for m in methods
    }
    sides |= {"truth": truths} | ({"image": shown} if shown is not None else {})
    wanted = _wanted(predicted | set(truths), only, faults)
    _name_missing(sides, wanted, faults)
    if shown is None and dataset:
        shown = {case.id: f"{case.path}:image" for case in dataset.cases.values()}
    complete = sorted(wanted.intersection(*sides.values()))
    return [
        Pair(i, {m: methods[m][i] for m in methods}, truths[i], (shown or {}).get(i))
        for i in complete
    ], dataset


def _as_only(predicted, text, sources):
    """The sources of a role, under the one predicted id if they are one file."""
    if text and os.path.isfile(volumes.split_dataset(text)[0]):
        return dict(zip(predicted, sources.values(), strict=True))
    return sources


def _wanted(ids, only, faults):
    """Those of the ids that a pattern of `only` names; a pattern that names none is a fault."""
    if not only:
        return ids
    for pattern in only:
        if not fnmatch.filter(ids, pattern):
            faults.append(f"--cases {pattern}: expected a case of it, got {listed(ids)}")
    return {i for i in ids if any(fnmatch.fnmatch(i, pattern) for pattern in only)}


def _name_missing(sides, wanted, faults):
    """A fault for each case that one side has and another lacks."""
    for case in sorted(wanted):
        there = next(found[case] for found in sides.values() if case in found)
        for side, found in sides.items():
            if case not in found:
                faults.append(
                    f"{there}: expected {side} {case} with it, got {listed(found) or 'none'}; "
                    "rename one, name the ids with a pattern such as '{id}.tif', or say --cases"
                )


def _known_id(case, path, known):
    """The id among known that a file means: its whole stem, its id, or the longest beginning."""
    stem = volumes.stem_of(path)
    begins = [i for i in known if stem.startswith((f"{i}_", f"{i}-", f"{i}."))]
    return next((i for i in (stem, case) if i in known), max(begins, key=len, default=case))


def listed(ids, most=8):
    ids = sorted(ids)
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(ids[:most]) + more
