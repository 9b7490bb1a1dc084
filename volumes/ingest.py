"""One raw case: read, checked, and written as a case file, or described by what is wrong with it.

A fault is one sentence that names the file or case, what was expected and what came; a note is a
sentence that reads the same for every case it holds for, so that notes can be counted.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from volumes import phantoms
from volumes.casefile import write_case
from volumes.files import few, read_channels, read_label
from volumes.ome_zarr import is_url
from volumes.statistics import (
    blank_channels,
    describe_fill,
    faults_of_contrast,
    intensity_statistics,
)
from volumes.volume import (
    HEADER_TOLERANCE,
    METRES,
    WHITE,
    Volume,
    box_within,
    collect_errors,
    compare,
    crop_affine,
    doubt_of_order,
    is_spacing,
    round_spacing,
    scale_affine,
    with_unit,
)


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

    crops: {name: ((z0, z1),)}, an open end being None; store: skeleton, compression of write_case.
    """

    classes: dict[str, int]
    regions: dict[str, tuple[int, ...]]
    ignore_label: int | None
    spacing: tuple[float, float, float] | None
    unit: str | None
    spacing_rows: dict | None  # {case: (spacing, unit)} of a table, which each case must be in
    crops: dict
    store: dict
    folder: str


@dataclass
class Outcome:
    """What became of one raw case: files written (as summary rows), notes, faults.

    label: (path, values, those that are not declared) of its label; with one of these no file is
    written, and all of them make one sentence for the whole folder (classes.undeclared).
    """

    id: str
    label: tuple = ("", (), ())
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def prepare_case(case, rules):
    """Read, check and write one case into rules.folder; returns its `Outcome`.

    Everything that is wrong with the input is a sentence in `faults`, and then no file is
    written. Safe to run in another process.
    """
    outcome = Outcome(case.id)
    image, label = _read(case, rules, outcome)
    if outcome.faults:
        return outcome
    spacing, unit = _spacing_and_unit(case.id, image, label, rules, outcome)
    classes = None if label is None else _class_ids(label, rules, outcome)
    if outcome.faults or outcome.label[2]:
        return outcome
    pieces = _pieces(case.id, image.array.shape[1], rules.crops, outcome.faults)
    box = box_within(image.path, case.box, image.whole)[0] if image.whole else ()
    intensity = {}
    for piece_id, planes in pieces.items():
        if classes is not None:
            _check_label(piece_id, classes[planes], rules.ignore_label, outcome)
        intensity[piece_id] = intensity_statistics(image.array[:, planes])
        _check_contrast(piece_id, intensity[piece_id], classes is not None, outcome)
    if outcome.faults:
        return outcome
    source, source_label = image.path, ""
    if not isinstance(case, PhantomCase):
        source = ", ".join(map(_absolute, case.images))
        source_label = "" if label is None else _absolute(case.label)
    for piece_id, planes in pieces.items():
        voxels, part = image.array[:, planes], None if classes is None else classes[planes]
        affine = image.affine
        if affine is not None:
            affine = scale_affine(crop_affine(affine, (planes.start, 0, 0)), spacing)
        place = tuple(end for s in box or [planes] for end in (s.start, s.stop))
        # A piece of a case without a group of its own is a group too: it may train or test apart.
        group = piece_id if case.group == case.id else case.group
        write_case(
            Path(rules.folder) / f"{piece_id}.h5",
            voxels,
            part,
            spacing=spacing,
            unit=unit,
            affine=affine,
            header=None if image.doubt else image.header,  # which --spacing has overruled
            group=group,
            ignore_label=rules.ignore_label,
            source_image=source,
            source_label=source_label,
            planes=place,
            intensity=intensity[piece_id],
            **rules.store,
        )
        row = {"case": piece_id, "group": group, "unit": unit, "source": source, "planes": place}
        row["voxels"] = (voxels.shape[1:], intensity[piece_id])
        outcome.rows.append(row | _summary(voxels, part, spacing, unit, rules))
    return outcome


def _absolute(path):
    """A path from the root on; a URL as it is."""
    return path if is_url(path) else os.path.abspath(path)


def _read(case, rules, outcome):
    """(image, label or None) where there is no fault. The path names every channel."""
    if isinstance(case, PhantomCase):
        phantom = phantoms.PHANTOMS[case.kind](case.shape, case.seed, case.index)
        source = f"phantom {case.kind} seed {case.seed} index {case.index}"
        image = Volume(phantom.image[None], phantom.spacing, phantom.unit, None, source)
        return image, replace(image, array=phantom.label)
    # A spacing by hand says that headers are wrong.
    by_hand = _by_hand(case.id, rules)[0] is not None
    image = label = None
    with collect_errors(outcome.faults):
        image = read_channels(case.images, by_hand=by_hand, box=case.box)
    with collect_errors(outcome.faults):
        label = read_label(case.label, case.box) if case.label else None
    for volume in (image, label):
        if volume is None:
            continue
        outcome.notes += volume.notes
        if volume.doubt and not by_hand:
            outcome.faults.append(
                f"{volume.path}: {volume.doubt}; correct the header or give --spacing Z Y X"
            )
    if image is not None and label is not None:
        faults, notes = compare(label, image, spacing=not by_hand, axes=not by_hand)
        outcome.faults += faults
        outcome.notes += [f"image and label: {note}" for note in notes]
    return image, label


def _by_hand(name, rules):
    """(spacing, the option that gave it, unit) of a case, None where the headers decide."""
    if name in (rules.spacing_rows or {}):
        spacing, unit = rules.spacing_rows[name]
        return spacing, "--spacing-csv", unit or rules.unit
    return rules.spacing, "--spacing", rules.unit


def _spacing_and_unit(name, image, label, rules, outcome):
    """The spacing that holds for a case: the table's, else the option's, else the header's."""
    stated = label if image.spacing is None and label is not None else image
    header, unit = stated.spacing, stated.unit
    spacing, option, wanted = _by_hand(name, rules)
    converted = bool(wanted and unit and wanted != unit)
    if converted:
        outcome.notes.append(f"unit {wanted} instead of the header's {unit}")
    if spacing is not None:
        if header is not None and not np.allclose(header, spacing, rtol=HEADER_TOLERANCE):
            outcome.notes.append(f"spacing from {option} replaces the header's")
    elif header is None and rules.spacing_rows is not None:
        outcome.faults.append(f"case {name}: expected a row in --spacing-csv, got none for this id")
    elif header is None:
        spacing = (1.0, 1.0, 1.0)
        outcome.notes.append(
            "no spacing in the file; 1 1 1 is used, give --spacing Z Y X if that is wrong"
        )
    elif not is_spacing(header):
        outcome.faults.append(
            f"{stated.path}: expected a spacing above 0 in the header, got "
            f"{with_unit(header, unit)}; correct the header or give --spacing Z Y X"
        )
    else:
        spacing = header
        if converted:
            spacing = round_spacing(s * METRES[unit] / METRES[wanted] for s in header)
    if doubt := spacing and doubt_of_order(image.array.shape[1:], spacing, wanted or unit):
        outcome.notes.append(f"warning: {doubt}")
    return spacing, wanted or unit


def _class_ids(label, rules, outcome):
    """The label as uint8 class ids; a mask of {0, 255} or {0, 254} becomes {0, 1}."""
    # Plane by plane: a sorted copy of a whole volume would cost several times the volume.
    array = label.array
    values = sorted(set().union(*(np.unique(plane).tolist() for plane in array)))
    declared = {*rules.classes.values(), rules.ignore_label}
    unknown = [value for value in values if value not in declared]
    is_mask = {*rules.classes.values()} == {0, 1} and len(unknown) == 1 and 1 not in values
    if is_mask and unknown[0] in WHITE:
        outcome.notes.append(f"label values {{0, {unknown[0]}}} read as classes {{0, 1}}")
        array, unknown = np.where(array == unknown[0], 1, array), []
    outcome.label = (label.path, values, unknown)
    return array.astype(np.uint8)


def _pieces(name, depth, crops, faults):
    """The case files that a case becomes: {id: slice of z}, one of all planes without crops."""
    if not crops:
        return {name: slice(0, depth)}
    pieces = {}
    for crop, ((first, last),) in crops.items():
        start, stop, _ = slice(first, last).indices(depth)
        if start >= stop or max(first or 0, last or 0) > depth:
            faults.append(
                f"case {name}: expected a range of its {depth} slices, got --crop "
                f"{crop}={'' if first is None else first}:{'' if last is None else last}"
            )
            continue
        pieces[f"{name}_{crop}"] = slice(start, stop)
    return pieces


def _check_label(name, label, ignore_label, outcome):
    labeled = label != (0 if ignore_label is None else ignore_label)
    if ignore_label is not None and not labeled.any():
        outcome.faults.append(
            f"case {name}: expected labeled voxels, got label {ignore_label} (unlabeled) "
            "everywhere; leave the case out, or check --ignore-label"
        )
    elif not (labeled & (label != 0)).any():
        outcome.notes.append("the label is empty, no voxel of it is foreground")


def _check_contrast(name, intensity, labeled, outcome):
    """Values beyond float32, channels without contrast, and values that are clipped as no image."""
    if note := describe_fill(intensity):
        outcome.notes.append(note)
    outcome.faults += [f"case {name}: expected {fault}" for fault in faults_of_contrast(intensity)]
    blank, channels = blank_channels(intensity), len(intensity["std"])
    if labeled and len(blank) == channels:
        values = ", ".join(f"{value:g}" for value in blank.values())
        got = f"got {values} in all voxels; leave the case out"
        outcome.faults.append(f"case {name}: expected an image with contrast, {got}")
    for channel, value in blank.items():
        where = "the image" if channels == 1 else f"channel {channel}"
        outcome.notes.append(f"{where} is blank, {value:g} in all voxels")


def _summary(image, label, spacing, unit, rules):
    """What the table of prepare.py says of a case besides its id and group; ids: in its label."""
    channels, *shape = image.shape
    foreground, unlabeled, ids = "no label", "", None
    if label is not None:
        percent = 100 * np.bincount(label.reshape(-1), minlength=256) / label.size
        named = {name: percent[i] for name, i in rules.classes.items() if i}
        foreground = f"{sum(named.values()):.2f}"
        if len(named) > 1:
            foreground = few([f"{name} {share:.3g}" for name, share in named.items()])
        unlabeled = f"{0 if rules.ignore_label is None else percent[rules.ignore_label]:.1f}"
        ids = set(np.flatnonzero(percent).tolist())
    return {
        "shape": "x".join(str(n) for n in (image.shape if channels > 1 else shape)),
        "spacing": with_unit(spacing, unit),
        "channels": channels,
        "dtype": str(image.dtype),
        "fg %": foreground,
        "unlabeled %": unlabeled,
        "ids": ids,
    }
