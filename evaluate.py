"""Compare predicted masks with the truth: a table of scores in the terminal, and a CSV file.

    python evaluate.py --pred runs/exp001/predictions --truth data/vessels --out scores.csv
    python evaluate.py --pred pred.nii.gz --truth truth.nii.gz --spacing 5 1 1 --tolerance 2
    python evaluate.py --pred predictions --truth 'labels/{id}_lbl.tif' --ignore-label 2
    python evaluate.py --pred predictions --truth data/membranes --otsu data/membranes --invert
    python evaluate.py --pred runs/b/predictions --beside a=runs/a/predictions --truth data/x

Each PATH is a file, a folder, a pattern, or a folder made by prepare.py; predictions, truth and
images are matched by case id. Leaves nothing on disk but the file of --out: one row per case and
method, then the means. What each score means stands in metrics.py.

Exit status 2 if any input is wrong: every fault is named, and no file is written.
"""

import argparse
import csv
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import metrics
import volumes
from pairs import listed, match

WHITE = (254, 255)  # what imaging tools write where they mean 1
RATIOS = ("dice", "surface_dice", "precision", "recall")


@dataclass(frozen=True)
class Loaded:
    """The volumes of a `Pair`: masks with classes 0 and 1, checked against each other."""

    prediction: volumes.Volume
    truth: volumes.Volume
    others: dict  # further masks by method
    white: tuple[int | None, int | None]  # what stood for 1 in prediction and truth, if not 1


# ---------------------------------------------------------------------------- one case


def read_pair(pair, args, ignore_label, faults):
    """The `Loaded` volumes of a pair, checked; None if that added to faults."""
    known = len(faults)
    read = [_read(volumes.read_label, path, faults) for path in (pair.prediction, pair.truth)]
    image = _read(volumes.read_image, pair.image, faults) if pair.image else None
    beside = {n: _read(volumes.read_label, path, faults) for n, path in pair.beside.items()}
    if len(faults) > known:
        return None
    prediction, truth = read
    for other in (truth, image, *beside.values()):
        if other is not None:
            _check_same_grid(prediction, other, args.check_spacing, faults)
    if args.spacing is None and not all(s > 0 for s in truth.spacing or ()):
        faults.append(
            f"{truth.path}: expected a spacing above 0, got {_with_unit(truth)}; give --spacing"
        )
    prediction, white_prediction = binary(prediction, None)
    if args.foreground:
        classes = np.isin(truth.array, args.foreground).astype(truth.array.dtype)
        ignored = truth.array == (-1 if ignore_label is None else ignore_label)
        truth = dataclasses.replace(truth, array=np.where(ignored, truth.array, classes))
    truth, white_truth = binary(truth, ignore_label)
    others = {name: binary(volume, None)[0] for name, volume in beside.items()}
    for volume in (prediction, *others.values()):
        _check_values(volume, None, "give a mask of one class", faults)
    advice = "give a mask of one class"
    if ignore_label is None:
        advice += ", or --ignore-label with the value of unlabeled voxels"
    _check_values(truth, ignore_label, advice, faults)
    if ignore_label is not None and (truth.array == ignore_label).all():
        faults.append(
            f"{pair.truth}: expected labelled voxels, got {ignore_label} (ignored) in all of them; "
            "leave this case out"
        )
    masks = {name: volume.array for name, volume in others.items()}
    if image is not None:
        masks["otsu"] = otsu_mask(image, args.invert, faults)
    if len(faults) > known:
        return None
    return Loaded(prediction, truth, masks, (white_prediction, white_truth))


def _read(reader, path, faults):
    try:
        return reader(path)
    except volumes.VolumeError as error:
        faults.append(str(error))
        return None


def binary(volume, ignore_label):
    """(volume with 0/1 for 0/255 or 0/254, that white value or None); other values stay."""
    array, white = volume.array, int(volume.array.max())
    known = [0, white] if ignore_label is None else [0, white, ignore_label]
    if white not in WHITE or white == ignore_label or not np.isin(array, known).all():
        return volume, None
    array = np.where(array == white, array.dtype.type(1), array)
    return dataclasses.replace(volume, array=array), white


def same_spacing(a, b):
    """Whether two volumes agree on spacing to 1 %, as far as both state it."""
    if a.spacing is None or b.spacing is None:
        return True
    known = a.unit in volumes.METRES and b.unit in volumes.METRES
    scale = volumes.METRES[a.unit] / volumes.METRES[b.unit] if known else 1.0
    return np.allclose(np.asarray(a.spacing) * scale, b.spacing, rtol=0.01, atol=0.0)


def _check_same_grid(prediction, other, check_spacing, faults):
    if other.array.shape[-3:] != prediction.array.shape:
        faults.append(
            f"{prediction.path}: expected the shape of {other.path}, {other.array.shape[-3:]}, got "
            f"{prediction.array.shape}; give volumes of the same voxels"
        )
    if check_spacing and not volumes.same_axes(prediction, other):
        faults.append(f"{prediction.path}: expected the axes of {other.path}, got other ones")
    if check_spacing and not same_spacing(prediction, other):
        faults.append(
            f"{prediction.path}: expected the spacing of {other.path}, {_with_unit(other)}, got "
            f"{_with_unit(prediction)}; correct the header that is wrong"
        )


def _with_unit(volume):
    return f"{' '.join(f'{s:g}' for s in volume.spacing)} {volume.unit}".rstrip()


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


def score_pair(pair, loaded, args, ignore_label):
    """The CSV rows of one case: of the prediction, and of the other masks asked for."""
    stated = loaded.truth if loaded.truth.spacing is not None else loaded.prediction
    spacing = tuple(args.spacing or stated.spacing or (1.0, 1.0, 1.0))
    about = {
        "tolerance": args.tolerance,
        "spacing": " ".join(f"{s:g}" for s in spacing),
        "unit": "" if args.spacing or stated.spacing is None else stated.unit,
    }
    rows = []
    for method, mask in {"prediction": loaded.prediction.array, **loaded.others}.items():
        scores = metrics.score(mask, loaded.truth.array, spacing, ignore_label, args.tolerance)
        rows.append({"case": pair.id, "method": method} | scores | about)
    return rows


def score_pairs(pairs, args, ignore_label, faults, notes):
    """All rows. After the first fault the rest is only read and checked, so that all are named."""
    from rich.progress import track

    rows, white, unspaced = [], {}, []
    for pair in track(pairs, "scoring", disable=not sys.stdout.isatty(), transient=True):
        loaded = read_pair(pair, args, ignore_label, faults)
        if loaded is None:
            continue
        for role, value in zip(("predictions", "truths"), loaded.white, strict=True):
            if value is not None:
                white.setdefault((role, value), []).append(pair.id)
        if not (args.spacing or loaded.prediction.spacing or loaded.truth.spacing):
            unspaced.append(pair.id)
        if not faults:
            rows += score_pair(pair, loaded, args, ignore_label)
    for (role, value), ids in white.items():
        notes.append(f"{role} of 0 and {value} read as 0 and 1: {listed(ids)}")
    if rows and args.tolerance < min(min(map(float, row["spacing"].split())) for row in rows):
        notes.append(f"the tolerance {args.tolerance:g} is less than one voxel")
    if unspaced:
        notes.append(f"no file states a spacing, 1 1 1 is taken (--spacing): {listed(unspaced)}")
    return rows


# ---------------------------------------------------------------------------- report


def with_means(rows):
    """The rows, then for each method the mean over cases under the name `mean`."""
    out = list(rows)
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        names = (*RATIOS, "components", "components_truth")
        mean = metrics.mean_scores([{name: row[name] for name in names} for row in of_method])
        out.append({"case": "mean", "method": method} | mean)
    return out


def print_table(rows, tolerance):
    from rich.console import Console
    from rich.table import Table

    units = {row["unit"] for row in rows if "unit" in row}
    unit = units.pop() if len(units) == 1 else ""
    heads = ["dice", f"surface dice @ {tolerance:g} {unit}".rstrip(), "precision", "recall"]
    several = len({row["method"] for row in rows}) > 1
    table = Table()
    for head in ["case"] + ["method"] * several:
        table.add_column(head, no_wrap=True)
    for head in [*heads, "components", "in truth"]:
        table.add_column(head, justify="right")
    for i, row in enumerate(rows):
        if row["case"] == "mean" and rows[i - 1]["case"] != "mean":
            table.add_section()
        counts = [f"{row[name]:g}" for name in ("components", "components_truth")]
        ratios = [f"{row[name]:.3f}" for name in RATIOS]
        table.add_row(row["case"], *[row["method"]] * several, *ratios, *counts)
    # Without a terminal rich assumes 80 columns and would cut the ids.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write_csv(path, rows):
    """Write the rows whole: under a temporary name first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
    try:
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), restval="")
            writer.writeheader()
            for row in rows:
                rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(rounded)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def non_negative(text):
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text}")
    return value


def positive(text):
    if non_negative(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return float(text)


def named(text):
    name, equals, path = text.partition("=")
    if not (name and equals and path) or name in ("prediction", "otsu"):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH with a name of its own, got {text}")
    return name, path


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pred", required=True, metavar="PATH", help="predicted masks")
    add("--truth", required=True, metavar="PATH", help="true masks, or a prepared dataset")
    add("--ignore-label", type=int, metavar="V", help="value of unlabeled voxels in the truth")
    add("--foreground", type=int, nargs="+", metavar="V", help="classes of the truth that count")
    add("--spacing", type=positive, nargs=3, metavar=("Z", "Y", "X"),
        help="default: the header of the truth, else of the prediction, else 1 1 1")  # fmt: skip
    add("--tolerance", type=non_negative, default=2.0, metavar="T",
        help="of surface Dice, in the unit of the spacing (default 2)")  # fmt: skip
    add("--out", metavar="FILE", help="write the scores as CSV")
    add("--otsu", metavar="PATH", help="images: score their Otsu threshold beside the predictions")
    add("--beside", type=named, action="append", default=[], metavar="NAME=PATH",
        help="further predictions of the same cases, as method NAME; may be repeated")  # fmt: skip
    add("--invert", action="store_true", help="--otsu finds what is dark")
    args = parser.parse_args(argv)
    if args.invert and not args.otsu:
        parser.error("--invert: expected --otsu PATH with it")
    if args.ignore_label in (0, 1):
        parser.error(f"--ignore-label: expected neither 0 nor 1, got {args.ignore_label}")
    if args.out and Path(args.out).is_dir():
        parser.error(f"--out: expected a file to write, got the folder {args.out}")
    return args


def main(argv=None):
    args = parse(argv)
    faults, notes = [], []
    pairs, ignore_label = match(args, faults, notes)
    rows = score_pairs(pairs, args, ignore_label, faults, notes)
    for note in notes:
        print(f"note: {note}")
    if not faults:
        rows = with_means(rows)
        print_table(rows, args.tolerance)
        if args.out:
            try:
                write_csv(args.out, rows)
                print(f"wrote {args.out}")
            except OSError as error:
                faults.append(f"{args.out}: expected a file to write, got {error.strerror}")
    if faults:
        plural = "" if len(faults) == 1 else "s"
        print(*faults, f"{len(faults)} fault{plural}; nothing was written",
              sep="\n", file=sys.stderr)  # fmt: skip
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
