"""Which raw files make a case: pairs by name, nnU-Net / MSD folders, Vesuvius folders, groups.

Nothing here opens a volume. What does not fit is not raised one by one: it is collected as
sentences, so that all of it is shown at once.
"""

import csv
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from volumes import classes, hdf5
from volumes.files import (
    Source,
    few,
    find_volumes,
    is_label_name,
    is_volume,
    matching,
    nfc,
    notes_on_pairs,
    stem_of,
)
from volumes.volume import UNITS, InputErrors, VolumeError, collect_errors, is_spacing

VESUVIUS_IGNORE_LABEL = 2
_CHANNEL = re.compile(r"^(.+)_(\d{4})$")


@dataclass(frozen=True)
class RawCase:
    """One case before preparation: a path per channel, and the label's path if there is one."""

    id: str
    images: tuple[str, ...]
    label: str | None
    group: str
    box: tuple[slice, slice, slice] | None = None  # what is meant of them, z, y, x; None: all


@dataclass
class Layout:
    """The cases of a folder, what it declares (None: nothing), and what was noticed."""

    cases: list[RawCase] = field(default_factory=list)
    classes: dict[str, int] | None = None
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignore_label: int | None = None
    channels: int = 0  # of each case; 0: any number
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
    layout.notes = list(dict.fromkeys(layout.notes))  # images and labels may be of one folder
    layout.cases = _one_of_each_id(layout.cases, layout, lambda case: case.images[0])
    return layout


def _find(option, text, layout):
    try:
        return find_volumes(text, layout.notes)
    except (VolumeError, InputErrors) as error:
        layout.faults += [f"{option} {line}" for line in str(error).split("\n")]
        return []


def _one_of_each_id(items, layout, path_of=lambda source: source.path):
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


def _add_cases(images, labels, layout):
    """Add a case for each (id, image paths); what has no partner of its id is a fault.

    labels: {id: path}, None where none are expected.
    """
    alone = []
    for name, paths in images:
        if labels is None or name in labels:
            layout.cases.append(RawCase(name, tuple(paths), labels and labels[name], name))
        else:
            alone.append((name, "a label", paths[0]))
    ids = {name for name, _ in images}
    alone += [(i, "an image", path) for i, path in (labels or {}).items() if i not in ids]
    for name, what, path in alone:
        layout.faults.append(
            f"case {name}: expected {what} of this id for {path}, got none; add it, or name the "
            "pairs by patterns such as 'folder/{id}_img.tif', or a single pair by its two files"
        )


# ---------------------------------------------------------------------------- pairs by name


def match_pairs(images, labels):
    """Images and labels of one id, as a list of (id, image, label).

    images, labels: each id once. An image whose id no label has goes with the label whose id is
    the longest beginning of its own, up to a `_`, `-` or `.`: `a_denoised` goes with `a`. What
    has no partner stands alone, with None on the other side.
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
    if len(images) == 1 and images == labels:
        path = images[0].path
        layout.faults.append(f"--labels: expected another file than {path}{hdf5.advice(path)}")
    if labels_text is None and "{id}" not in str(images_text):
        named = [s for s in images if is_label_name(s.path)]
        pairs = match_pairs([s for s in images if s not in named], named)
        if forgotten := [label.path for _, image, label in pairs if image and label]:
            layout.faults.append(
                f"--images {images_text}: expected images, got also files named as their labels, "
                f"{few(forgotten, 3)}; give --labels too, or a pattern of the images alone"
            )
    if layout.faults:
        return
    if [s.path for s in images] == [s.path for s in labels]:  # one folder holds both
        labels = [s for s in labels if is_label_name(s.path)]
    label_paths = {s.path for s in labels}
    images = [s for s in images if s.path not in label_paths]
    if not images:
        layout.faults.append(f"--images {images_text}: expected images, got labels only")
    labels = _one_of_each_id(labels, layout)
    stacked = [(s.id, [s.path]) for s in images]
    if "{id}" not in str(images_text):  # which says what the ids are
        stacked = stack_channels(images, {s.id for s in labels}, layout.faults)
    images = [RawCase(name, tuple(paths), None, name) for name, paths in stacked]
    if len(images) == len(labels) == 1 and all(map(is_volume, (images_text, labels_text))):
        pairs = [(images[0].id, images[0], labels[0])]
    else:
        pairs = match_pairs(images, labels)
        both = [(image, label) for _, image, label in pairs if image and label]
        layout.notes += notes_on_pairs([(a.id, a.images[0], b.id, b.path) for a, b in both])
    images = [(name, image.images) for name, image, _ in pairs if image]
    labels = {name: label.path for name, _, label in pairs if label}
    _add_cases(images, None if labels_text is None else labels, layout)


# ---------------------------------------------------------------------------- nnU-Net and MSD


def _find_nnunet(root, test_images, layout):
    """imagesTr and labelsTr with dataset.json; files `<id>_0000`, `<id>_0001` are channels."""
    try:
        declared = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        layout.classes, layout.regions, layout.ignore_label = classes.from_labels(
            declared["labels"], declared.get("regions_class_order")
        )
        layout.channels = len(declared.get("channel_names") or declared.get("modality") or ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = "none" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise InputErrors(
            f"{root / 'dataset.json'}: expected nnU-Net's or MSD's description with `labels` as "
            f"names and whole numbers or lists of them, got {got}"
        ) from error
    labels = None
    if os.path.lexists(root / "labelsTr"):
        sources = _one_of_each_id(_by_stem(root / "labelsTr", layout), layout)
        labels = {source.id: source.path for source in sources}
    else:
        layout.notes.append(f"{root}: no labelsTr, so its cases are without label")
    _add_channel_cases(root / "imagesTr", labels, layout)
    if not layout.faults:
        layout.notes += _declared_otherwise(declared, layout.cases, root / "dataset.json")
    if test_images:
        _add_channel_cases(root / "imagesTs", None, layout)
    elif (root / "imagesTs").is_dir():
        layout.notes.append(f"{root / 'imagesTs'}: passed over, --test-images adds it")


def _by_stem(folder, layout):
    return [Source(stem_of(s.path), s.path) for s in _find("--images", folder, layout)]


def _declared_otherwise(declared, cases, path):
    """Where the dataset.json of nnU-Net or MSD says another thing than the files, as notes."""
    ids, number = [case.id for case in cases], declared.get("numTraining", len(cases))
    if str(number) != str(len(cases)):
        yield f"{path}: numTraining is {number}, but imagesTr holds {len(cases)} cases"
    ending = str(declared.get("file_ending") or "")
    paths = [path for case in cases for path in (*case.images, case.label) if path]
    if others := [path for path in paths if not path.endswith(ending)]:
        yield f"{path}: file_ending is {ending}, taken too: {few(others, 5)}"
    entries = declared.get("training")
    entries = entries if isinstance(entries, list) else []
    images = [e.get("image") if isinstance(e, dict) else e for e in entries]
    names = [stem_of(image) for image in images if isinstance(image, str)]
    names = [name if name in ids else _CHANNEL.sub(r"\1", name) for name in names]
    if missing := sorted(set(names) - set(ids)):
        yield f"{path}: `training` lists {len(missing)} cases that have no file: {few(missing)}"
    if names and (more := [i for i in ids if i not in names]):
        yield f"{path}: `training` does not list, taken too: {few(more)}"


def stack_channels(sources, ids, faults):
    """[(id, [path of each channel])] of image sources; a number that is missing is a fault.

    `a_0000` and `a_0001` are the channels of `a`. `la_0001` is one of ids, or an id of its own,
    where there is no `la_0000`.
    """
    matches = [_CHANNEL.match(stem_of(source.path)) for source in sources]
    first = {
        match[1]: source.id.removesuffix("_0000")
        for match, source in zip(matches, sources, strict=True)
        if match and match[2] == "0000" and match[0] not in ids
    }
    cases, stacked = {}, []
    for match, source in zip(matches, sources, strict=True):
        name, number, key = source.id, 0, source.path
        if match and match[1] in first and match[0] not in ids:
            name, number, key = first[match[1]], int(match[2]), match[1]
        cases.setdefault(key, (name, []))[1].append((number, source.path))
    for name, channels in cases.values():
        numbers, paths = zip(*sorted(channels), strict=True)
        stacked.append((name, list(paths)))
        if numbers != tuple(range(len(paths))):
            faults.append(
                f"case {name}: expected channels numbered 0000, 0001 and on, each once and none "
                f"missing, got {', '.join(paths)}; add, rename or remove files, or name "
                "the ids by a pattern such as 'folder/{id}.tif'"
            )
    return stacked


def _add_channel_cases(folder, labels, layout):
    """Add the cases of one folder. labels: {id: path}, None if it has none."""
    cases = stack_channels(_by_stem(folder, layout), labels or (), layout.faults)
    for name, paths in cases:
        if stem_of(paths[0]) != name and layout.channels not in (0, len(paths)):
            layout.faults.append(
                f"case {name}: expected {layout.channels} channels as in dataset.json, "
                f"got {len(paths)} ({', '.join(paths)})"
            )
    _add_cases(sorted(cases), labels, layout)


# ---------------------------------------------------------------------------- Vesuvius


def _find_vesuvius(root, layout):
    """train_images, train_labels and train.csv (id, scroll_id); the scroll is the group."""
    layout.ignore_label = VESUVIUS_IGNORE_LABEL
    scrolls = _column_by_id(root / "train.csv", "scroll_id", "id")
    images, labels = (
        {s.id: s.path for s in _one_of_each_id(_find("--images", root / folder, layout), layout)}
        for folder in ("train_images", "train_labels")
    )
    gone = [name for name in scrolls if name not in images or name not in labels]
    if gone:
        layout.notes.append(
            f"{root / 'train.csv'} lists {len(gone)} ids that have no file any more; skipped: "
            + ", ".join(gone)
        )
    images = [(name, [path]) for name, path in images.items() if name not in gone]
    labels = {name: path for name, path in labels.items() if name not in gone}
    for name in labels:
        if name not in scrolls:
            layout.faults.append(f"case {name}: expected its scroll_id in train.csv, got no row")
    _add_cases(sorted(images), labels, layout)
    layout.cases = [replace(case, group=scrolls.get(case.id, "")) for case in layout.cases]


# ---------------------------------------------------------------------------- tables and groups


def read_table(path, *columns):
    """The rows of a CSV file as dicts. InputErrors if it cannot be read or lacks one of columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", skipinitialspace=True, strict=True)
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputErrors(f"{path}: expected a readable CSV file, got {error}") from error
    missing = [column for column in columns if column not in names]
    if missing:
        raise InputErrors(
            f"{path}: expected the columns {', '.join(missing)}, got {', '.join(names) or 'none'}"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputErrors(f"{path}: expected columns of different names, got two of {twice[0]}")
    if longer := [number for number, row in enumerate(rows, start=2) if None in row]:
        raise InputErrors(
            f"{path}, line {longer[0]}: expected {len(names)} fields as in the first line, got "
            "more; quote a field that holds a comma"
        )
    return [{name: value.strip() for name, value in row.items()} for row in rows]


def _column_by_id(path, column, key=None):
    """{id: value of a column} of a CSV file; key: the column of ids, None: `id`, else the first."""
    values, faults = {}, []
    for number, row in enumerate(read_table(path, column, *([key] if key else [])), start=2):
        name = nfc(row[key or ("id" if "id" in row else next(iter(row)))])
        if values.setdefault(name, row[column]) != row[column]:
            faults.append(
                f"{path}, line {number}: expected one {column} of {name}, got {row[column]} after "
                f"{values[name]}; correct one of the rows"
            )
    if faults:
        raise InputErrors(*faults)
    return values


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
        groups = _column_by_id(file or _only_csv(images), column)
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
    root = Path(images) if Path(images).is_dir() else Path(images).parent
    for folder in (root, root.parent):
        files = sorted(folder.glob("*.csv"))
        train = [file for file in files if file.name == "train.csv"]
        if len(train or files) == 1:
            return (train or files)[0]
    raise InputErrors(
        f"--group-from: expected train.csv or one CSV file in {root} or {root.parent}, got none or "
        "several; name it as csv:FILE:COLUMN"
    )


def read_spacings(path, ids):
    """({id: ((z, y, x), unit or "")}, notes) of a CSV with columns id, z, y, x[, unit].

    Its ids may be patterns. A case takes the row of its very id, else the first that matches.
    """
    rows, faults, notes = {}, [], []
    for number, row in enumerate(read_table(path, "id", "z", "y", "x"), start=2):
        unit = row.get("unit", "")
        try:
            spacing = tuple(float(row[axis]) for axis in "zyx")
        except ValueError:
            spacing = (0.0,) * 3
        if not is_spacing(spacing):
            faults.append(f"{path}, line {number}: expected positive numbers for z, y and x")
        if unit and unit not in UNITS:
            faults.append(f"{path}, line {number}: expected a unit, one of mm, micron, nm, m")
        value = spacing, UNITS.get(unit, "")
        if not faults and rows.setdefault(nfc(row["id"]), value) != value:
            faults.append(f"{path}, line {number}: expected one row of {row['id']}, got two")
    if faults:
        raise InputErrors(*faults)
    of_case = {i: rows[i] for i in ids if i in rows}
    matches = {pattern: matching(ids, pattern) for pattern in rows}
    for pattern, names in matches.items():
        for name in names:
            of_case.setdefault(name, rows[pattern])
    if idle := [pattern for pattern, names in matches.items() if not names]:
        notes.append(f"{path}: rows that name no case: {few(idle)}")
    return of_case, notes
