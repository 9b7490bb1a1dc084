"""Which raw files make a case: pairs by name, nnU-Net / MSD folders, Vesuvius folders, groups.

Nothing here opens a volume. What does not fit is not raised one by one: it is collected as
sentences, so that all of it is shown at once.
"""

import csv
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from volumes.files import find_volumes, is_label_name, split_dataset, stem_of
from volumes.volume import UNITS, InputErrors, VolumeError, collect_errors

VESUVIUS_IGNORE_LABEL = 2
_CHANNEL = re.compile(r"^(.+)_(\d{4})$")


@dataclass(frozen=True)
class RawCase:
    """One case before preparation: a path per channel, and the label's path if there is one."""

    id: str
    images: tuple[str, ...]
    label: str | None
    group: str


@dataclass
class Layout:
    """The cases of a folder, what it declares (None: nothing), and what was noticed."""

    cases: list[RawCase] = field(default_factory=list)
    classes: dict[str, int] | None = None
    ignore_label: int | None = None
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def find_cases(images, labels=None, test_images=False):
    """The `Layout` of images: a root in a known layout, or anything `find_volumes` understands.

    labels is given for pairs only; test_images adds the imagesTs of an nnU-Net root, unlabeled.
    """
    root, layout = Path(images), Layout()
    nnunet, vesuvius = (root / "imagesTr").is_dir(), (root / "train_images").is_dir()
    with collect_errors(layout.faults):
        if labels is not None and (nnunet or vesuvius):
            raise InputErrors(
                f"--labels {labels}: expected no --labels, for {root} brings its own; "
                "leave it out, or give the folder with the images alone as --images"
            )
        if vesuvius:
            _find_vesuvius(root, layout)
        elif nnunet:
            _find_nnunet(root, test_images, layout)
        else:
            _find_pairs(images, labels, layout)
    layout.cases = _one_of_each_id(layout.cases, lambda case: case.images[0], layout)
    return layout


def _find(option, text, layout):
    try:
        return find_volumes(text)
    except VolumeError as error:
        layout.faults.append(f"{option} {error}")
        return []


def _one_of_each_id(items, path_of, layout):
    """The first of the items of every id; each id that comes again is a fault."""
    by_id = {}
    for item in items:
        by_id.setdefault(item.id, []).append(item)
    for name, same in by_id.items():
        if len(same) > 1:
            layout.faults.append(
                f"case {name}: expected one file of this id, got {len(same)} "
                f"({', '.join(map(path_of, same))}); rename or remove all but one, or choose "
                "them by a pattern such as 'folder/{id}_img.tif'"
            )
    return [same[0] for same in by_id.values()]


def _add_cases(entries, layout, labels_expected=True):
    """Add a case for each (id, image paths, label path or None); what has no partner is a fault."""
    for name, images, label in entries:
        if images and (label or not labels_expected):
            layout.cases.append(RawCase(name, tuple(images), label, name))
            continue
        what, path = ("a label", images[0]) if images else ("an image", label)
        layout.faults.append(
            f"case {name}: expected {what} of this id for {path}, got none; add it, or name the "
            "pairs by patterns such as 'folder/{id}_img.tif'"
        )


# ---------------------------------------------------------------------------- pairs by name


def match_pairs(images, labels):
    """Images and labels of one id, as a list of (id, image, label).

    images, labels: lists of `Source`, each id once. An image whose id no label has goes with the
    label whose id is the longest beginning of its own, up to a `_`, `-` or `.`: `a_denoised`
    goes with `a`. What has no partner stands alone, with None on the other side.
    """
    by_id = {label.id: label for label in labels}
    free = by_id.keys() - {image.id for image in images}
    pairs = []
    for image in images:
        begins = [i for i in free if re.match(re.escape(i) + r"[_.-]", image.id)]
        name = image.id if image.id in by_id else max(begins, key=len, default=image.id)
        pairs.append((name, image, by_id.get(name)))
    used = {name for name, _, _ in pairs}
    return pairs + [(label.id, None, label) for label in labels if label.id not in used]


def _find_pairs(images_text, labels_text, layout):
    images = _find("--images", images_text, layout)
    labels = [] if labels_text is None else _find("--labels", labels_text, layout)
    if layout.faults:
        return
    if [s.path for s in images] == [s.path for s in labels]:  # one folder holds both
        labels = [s for s in labels if is_label_name(s.path)]
    label_paths = {s.path for s in labels}
    images = [s for s in images if s.path not in label_paths]
    if not images:
        layout.faults.append(f"--images {images_text}: expected images, got labels only")
    labels = _one_of_each_id(labels, lambda source: source.path, layout)

    texts = [split_dataset(text)[0] for text in (images_text, labels_text)]
    if len(images) == len(labels) == 1 and all(map(os.path.isfile, texts)):
        pairs = [(images[0].id, images[0], labels[0])]
    else:
        pairs = match_pairs(images, labels)
    entries = [(name, [i.path] if i else [], label and label.path) for name, i, label in pairs]
    _add_cases(entries, layout, labels_expected=labels_text is not None)


# ---------------------------------------------------------------------------- nnU-Net and MSD


def _find_nnunet(root, test_images, layout):
    """imagesTr and labelsTr with dataset.json; files `<id>_0000`, `<id>_0001` are channels."""
    try:
        declared = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        layout.classes, layout.ignore_label = _declared_classes(declared["labels"])
        channels = len(declared.get("channel_names") or declared.get("modality") or ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputErrors(
            f"{root / 'dataset.json'}: expected nnU-Net's or MSD's description with `labels` as "
            f"names and whole numbers, got {type(error).__name__}: {error}"
        ) from error
    labels = _paths_by_stem(root / "labelsTr", layout) if (root / "labelsTr").is_dir() else {}
    _add_channel_cases(root / "imagesTr", labels, channels, layout)
    if test_images:
        _add_channel_cases(root / "imagesTs", {}, channels, layout)


def _paths_by_stem(folder, layout):
    return {stem_of(source.path): source.path for source in _find("--images", folder, layout)}


def _declared_classes(labels):
    """(classes, ignore label) from {"name": id} of nnU-Net v2 or {"id": "name"} of MSD."""
    if all(str(key).isdigit() for key in labels):
        labels = {name: int(key) for key, name in labels.items()}
    if not all(isinstance(value, int) for value in labels.values()):
        raise ValueError("classes made of regions (lists of ids), which need one id per class")
    ignore = labels.pop("ignore", None)
    return {"background": 0, **{name: i for name, i in labels.items() if i != 0}}, ignore


def _add_channel_cases(folder, labels, channels, layout):
    """Add the cases of one folder. labels: {id: path}, empty if it has none; channels 0: any."""
    files = _paths_by_stem(folder, layout)
    # MSD's `la_0001` may be an id and not a channel: then a label of that very name exists.
    split = all(_CHANNEL.match(stem) and stem not in labels for stem in files)
    by_case = {}
    for stem, path in sorted(files.items()):
        by_case.setdefault(_CHANNEL.match(stem)[1] if split else stem, []).append(path)
    for name, paths in by_case.items():
        if split and channels not in (0, len(paths)):
            layout.faults.append(
                f"case {name}: expected {channels} channels as in dataset.json, "
                f"got {len(paths)} ({', '.join(paths)})"
            )
    names = [*by_case, *sorted(labels.keys() - by_case.keys())]
    entries = [(name, by_case.get(name, []), labels.get(name)) for name in names]
    _add_cases(entries, layout, labels_expected=bool(labels))


# ---------------------------------------------------------------------------- Vesuvius


def _find_vesuvius(root, layout):
    """train_images, train_labels and train.csv (id, scroll_id); the scroll is the group."""
    layout.ignore_label = VESUVIUS_IGNORE_LABEL
    rows = read_table(root / "train.csv", "scroll_id", "id")
    scrolls = {row["id"]: row["scroll_id"] for row in rows}
    images = {s.id: s.path for s in _find("--images", root / "train_images", layout)}
    labels = {s.id: s.path for s in _find("--images", root / "train_labels", layout)}
    gone = [name for name in scrolls if name not in images or name not in labels]
    if gone:
        layout.notes.append(
            f"{root / 'train.csv'} lists {len(gone)} ids that have no file any more; skipped: "
            + ", ".join(gone)
        )
    names = [name for name in images if name not in gone]
    for name in names:
        if name in labels and name not in scrolls:
            layout.faults.append(f"case {name}: expected its scroll_id in train.csv, got no row")
    _add_cases([(name, [images[name]], labels.get(name)) for name in names], layout)
    layout.cases = [replace(case, group=scrolls.get(case.id, "")) for case in layout.cases]


# ---------------------------------------------------------------------------- tables and groups


def read_table(path, *columns):
    """The rows of a CSV file as dicts. InputErrors if it cannot be read or lacks one of columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputErrors(f"{path}: expected a readable CSV file, got {error}") from error
    missing = [column for column in columns if column not in names]
    if missing:
        raise InputErrors(
            f"{path}: expected the columns {', '.join(missing)}, got {', '.join(names) or 'none'}"
        )
    return rows


def assign_groups(cases, rule, images):
    """The cases with the group that rule gives them. InputErrors if a case gets none.

    rule: None keeps them; `csv:COLUMN` and `csv:FILE:COLUMN` look the id up (column `id`, else
    the first); `regex:PATTERN` takes the first capture group, else the match, on the id. A CSV
    that is not named is train.csv, or the only CSV, of the folder images or of its parent.
    """
    if rule is None:
        return cases
    kind, _, rest = rule.partition(":")
    if kind == "csv" and rest:
        file, _, column = rest.rpartition(":")
        rows = read_table(file or _only_csv(images), column)
        groups = {row.get("id", next(iter(row.values()))): row[column] for row in rows}
    elif kind == "regex" and rest:
        try:
            matches = {case.id: re.search(rest, case.id) for case in cases}
        except re.error as error:
            raise InputErrors(f"--group-from {rule}: expected a pattern, got {error}") from error
        groups = {name: m[1] if m.re.groups else m[0] for name, m in matches.items() if m}
    else:
        raise InputErrors(
            f"--group-from {rule}: expected csv:COLUMN, csv:FILE:COLUMN or regex:PATTERN"
        )
    without = [case.id for case in cases if not groups.get(case.id)]
    if without:
        sentence = f"expected a group by --group-from {rule}, got none"
        raise InputErrors(*(f"case {case_id}: {sentence}" for case_id in without))
    return [replace(case, group=groups[case.id]) for case in cases]


def _only_csv(images):
    """The CSV that a rule without a file means."""
    root = Path(images)
    root = root if root.is_dir() else root.parent
    for folder in (root, root.parent):
        files = sorted(folder.glob("*.csv"))
        train = [file for file in files if file.name == "train.csv"]
        if len(train or files) == 1:
            return (train or files)[0]
    raise InputErrors(
        f"--group-from: expected train.csv or one CSV file in {root} or {root.parent}, got none or "
        "several; name it as csv:FILE:COLUMN"
    )


def read_spacings(path):
    """Rows (id pattern, (z, y, x), unit or "") of a CSV with columns id, z, y, x[, unit]."""
    rows, faults = [], []
    for number, row in enumerate(read_table(path, "id", "z", "y", "x"), start=2):
        unit = (row.get("unit") or "").strip()
        try:
            spacing = tuple(float(row[axis]) for axis in "zyx")
        except (TypeError, ValueError):
            spacing = (math.nan,) * 3
        if not all(math.isfinite(s) and s > 0 for s in spacing):
            faults.append(f"{path}, line {number}: expected positive numbers for z, y and x")
        if unit and unit not in UNITS:
            faults.append(f"{path}, line {number}: expected a unit, one of mm, micron, nm, m")
        rows.append((row["id"], spacing, UNITS.get(unit, "")))
    if faults:
        raise InputErrors(*faults)
    return rows
