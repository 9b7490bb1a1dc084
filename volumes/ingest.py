"""One raw case: read, checked, and written as a case file, or described by what is wrong with it.

A fault is one sentence that names the file or case, what was expected and what came; a note is a
sentence that reads the same for every case it holds for, so that notes can be counted.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from volumes import layouts, phantoms
from volumes.casefile import write_case
from volumes.files import METRES, crop_affine, read_image, read_label, same_axes
from volumes.volume import Volume, VolumeError

HEADER_TOLERANCE = 0.01  # relative; headers round, and affines hold float32
WHITE = (254, 255)  # what imaging tools write where they mean 1


@dataclass(frozen=True)
class PhantomCase:
    """A case that is made, not read."""

    id: str
    kind: str
    shape: tuple[int, int, int]
    seed: int
    index: int
    group: str


@dataclass(frozen=True)
class Rules:
    """What holds for every case.

    crops: (name, z0, z1), an open end being None; store: how case files are written, the skeleton
    and compression of cases.write_case.
    """

    classes: dict[str, int]
    ignore_label: int | None
    spacing: tuple[float, float, float] | None
    unit: str | None
    spacing_rows: list
    crops: list
    store: dict
    folder: str


@dataclass
class Outcome:
    """What became of one raw case: files written (as summary rows), notes, faults."""

    id: str
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def prepare_case(case, rules):
    """Read, check and write one case into rules.folder; returns its `Outcome`.

    Everything that is wrong with the input is a sentence in `faults`, and then no file is
    written. Safe to run in another process.
    """
    outcome = Outcome(case.id)
    image, label, sources = _read(case, outcome)
    if image is None or outcome.faults:
        return outcome
    _check_image(image, sources[0], outcome)
    spacing, unit = _spacing_and_unit(case.id, image, label, rules, outcome)
    classes = None
    if label is not None:
        if label.array.shape != image.array.shape[1:]:
            outcome.faults.append(
                f"case {case.id}: expected image and label of one shape, got "
                f"{image.array.shape[1:]} ({sources[0]}) and {label.array.shape} ({sources[1]})"
            )
        classes = _class_ids(case.id, label.array, rules, outcome)
    if outcome.faults:
        return outcome

    pieces = list(_pieces(case, image, classes, rules, outcome))
    for name, _, piece, _ in pieces:
        _check_label(name, piece, rules, outcome)
    if outcome.faults:
        return outcome
    for piece in pieces:
        outcome.rows.append(_write(case, piece, spacing, unit, sources, rules))
    return outcome


def _write(case, piece, spacing, unit, sources, rules):
    """Write one piece as a case file; returns its row of the summary."""
    name, image, label, affine = piece
    # A piece of a case without a group of its own is a group too: it may train or test apart.
    group = name if case.group == case.id else case.group
    write_case(
        Path(rules.folder) / f"{name}.h5",
        image,
        label,
        spacing=spacing,
        unit=unit,
        affine=affine,
        group=group,
        ignore_label=rules.ignore_label,
        source_image=sources[0],
        source_label=sources[1],
        **rules.store,
    )
    return _summary(name, image, label, spacing, unit, group, rules)


def _read(case, outcome):
    """(image, label or None, (image source, label source)); image is None where it failed."""
    if isinstance(case, PhantomCase):
        made = phantoms.PHANTOMS[case.kind](case.shape, case.seed, case.index)
        source = f"phantom {case.kind} seed {case.seed} index {case.index}"
        image = Volume(made.image[None], made.spacing, made.unit, None, source)
        return image, replace(image, array=made.label), (source, source)
    image = label = None
    try:
        channels = [read_image(path) for path in case.images]
        image = channels[0]
        if len({channel.array.shape[1:] for channel in channels}) > 1:
            shapes = ", ".join(f"{c.array.shape[1:]} ({c.path})" for c in channels)
            outcome.faults.append(f"case {case.id}: expected channels of one shape, got {shapes}")
        elif len({channel.spacing for channel in channels}) > 1:
            named = ", ".join(f"{c.spacing} ({c.path})" for c in channels)
            outcome.faults.append(f"case {case.id}: expected channels of one spacing, got {named}")
        elif len(channels) > 1:
            image = replace(image, array=np.concatenate([c.array for c in channels]))
    except VolumeError as error:
        outcome.faults.append(str(error))
    try:
        label = read_label(case.label) if case.label else None
    except VolumeError as error:
        outcome.faults.append(str(error))
    return image, label, (", ".join(case.images), case.label or "")


def _check_image(image, source, outcome):
    if image.array.dtype.kind != "f":
        return
    bad = image.array.size - int(np.isfinite(image.array).sum())
    if bad:
        outcome.faults.append(
            f"{source}: expected finite values, got {bad} voxels of NaN or Inf; "
            "replace them, by 0 for voxels without a measurement"
        )


def _spacing_and_unit(name, image, label, rules, outcome):
    """The spacing that holds for a case: the table's, else the option's, else the header's."""
    stated = label if image.spacing is None and label is not None else image
    header, unit = stated.spacing, stated.unit
    row = layouts.spacing_of(rules.spacing_rows, name)
    given, option = (row[0], "--spacing-csv") if row else (rules.spacing, "--spacing")
    if given is not None:
        if header is not None and not np.allclose(header, given, rtol=HEADER_TOLERANCE):
            outcome.notes.append(f"spacing from {option} replaces the header's")
    elif header is None and rules.spacing_rows:
        outcome.faults.append(f"case {name}: expected a row in --spacing-csv, got none for this id")
    elif header is None:
        given = (1.0, 1.0, 1.0)
        outcome.notes.append(
            "warning: no spacing in the file; 1 1 1 is taken, give --spacing Z Y X if that is wrong"
        )
    elif not all(math.isfinite(s) and s > 0 for s in header):
        outcome.faults.append(
            f"{stated.path}: expected a spacing above 0 in the header, got z, y, x = {header}; "
            "correct the header or give --spacing Z Y X"
        )
    else:
        given = header
        _check_label_header(image, label, outcome)
    wanted = (row[1] if row else "") or rules.unit
    if wanted and unit and wanted != unit:
        if given is header:
            given = tuple(float(f"{s * METRES[unit] / METRES[wanted]:.6g}") for s in header)
        outcome.notes.append(f"unit {wanted} instead of the header's {unit}")
    return given, wanted or unit


def _check_label_header(image, label, outcome):
    """Image and label that both state a spacing must state the same."""
    if label is None or image.spacing is None or label.spacing is None:
        return
    if not np.allclose(image.spacing, label.spacing, rtol=HEADER_TOLERANCE, atol=0):
        outcome.faults.append(
            f"{label.path}: expected the spacing of its image, {image.spacing}, got "
            f"{label.spacing}; correct the header or give --spacing Z Y X"
        )
    elif not same_axes(image, label):
        outcome.faults.append(
            f"{label.path}: expected the axes of its image, got an affine that turns or mirrors "
            "them; bring both to one orientation, or give --spacing if only the header is wrong"
        )
    elif image.unit and label.unit and image.unit != label.unit:
        outcome.faults.append(
            f"{label.path}: expected the unit of its image, {image.unit}, got {label.unit}; "
            "correct the header"
        )


def _class_ids(name, label, rules, outcome):
    """The label as uint8 class ids; a mask of {0, 255} or {0, 254} becomes {0, 1}."""
    # Plane by plane: a sorted copy of a whole volume would cost several times the volume.
    values = sorted(set().union(*(np.unique(plane).tolist() for plane in label)))
    declared = {*rules.classes.values(), rules.ignore_label} - {None}
    unknown = [value for value in values if value not in declared]
    white = [v for v in unknown if v in WHITE]
    if len(rules.classes) == 2 and unknown == white and len(white) == 1 and 1 not in values:
        outcome.notes.append(f"label values {{0, {white[0]}}} read as classes {{0, 1}}")
        return np.where(label == white[0], 1, label).astype(np.uint8)
    if unknown:
        shown = ", ".join(str(v) for v in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        advice = "name every class with --classes NAME ..., or correct the label"
        if len(unknown) > 20:
            advice = "these look like numbered objects; store a mask of classes"
        elif unknown == [2] and rules.ignore_label is None:
            advice = "give --ignore-label 2 if 2 means unlabeled, or --classes A B for two classes"
        outcome.faults.append(
            f"case {name}: expected label values {sorted(declared)}, got also {shown}; {advice}"
        )
        return None
    return label.astype(np.uint8)


def _pieces(case, image, label, rules, outcome):
    """(id, image, label, affine) of the whole case, or of each range of z that crops names."""
    if not rules.crops:
        yield case.id, image.array, label, image.affine
    depth = image.array.shape[1]
    for name, first, last in rules.crops:
        start, stop, _ = slice(first, last).indices(depth)
        if start >= stop or max(abs(first or 0), abs(last or 0)) > depth:
            outcome.faults.append(
                f"case {case.id}: expected a range of its {depth} slices, got --crop "
                f"{name}={'' if first is None else first}:{'' if last is None else last}"
            )
            continue
        affine = None if image.affine is None else crop_affine(image.affine, (start, 0, 0))
        piece = None if label is None else label[start:stop]
        yield f"{case.id}_{name}", image.array[:, start:stop], piece, affine


def _check_label(name, label, rules, outcome):
    if label is None:
        return
    labeled = label != (0 if rules.ignore_label is None else rules.ignore_label)
    if rules.ignore_label is not None and not labeled.any():
        outcome.faults.append(
            f"case {name}: expected labeled voxels, got label {rules.ignore_label} (unlabeled) "
            "everywhere; leave the case out, or check --ignore-label"
        )
    elif not (labeled & (label != 0)).any():
        outcome.notes.append("warning: the label is empty, no voxel of it is foreground")


def _summary(name, image, label, spacing, unit, group, rules):
    shares = np.zeros(256) if label is None else np.bincount(label.reshape(-1), minlength=256)
    unlabeled = 0 if rules.ignore_label is None else shares[rules.ignore_label]
    percent = 100 / math.prod(image.shape[1:])
    foreground = sum(shares[i] for i in rules.classes.values() if i)
    return {
        "case": name,
        "shape": "x".join(str(n) for n in (image.shape if len(image) > 1 else image.shape[1:])),
        "spacing": " ".join(f"{s:g}" for s in spacing) + f" {unit}".rstrip(),
        "unit": unit,
        "channels": len(image),
        "dtype": str(image.dtype),
        "fg %": "no label" if label is None else f"{percent * foreground:.2f}",
        "unlabeled %": "" if label is None else f"{percent * unlabeled:.1f}",
        "group": group,
    }
