"""Compare predicted masks with the truth: tables of scores, a leaderboard, pictures of the worst.

    python evaluate.py --pred runs/exp001/predictions --truth data/vessels --out scores.csv
    python evaluate.py --pred pred.nii.gz --truth truth.nii.gz --spacing 5 1 1 --tolerance 2
    python evaluate.py --pred predictions --truth 'labels/{id}_lbl.tif' --ignore-label 2 \\
        --scores vesuvius_score toposcore surface_dice voi_score --overlays runs/overlays
    python evaluate.py --pred new=runs/b/predictions old=runs/a/predictions --truth data/x \\
        --otsu data/x --out scores.csv scores.json

Each PATH is a file, a folder, a pattern, or a folder made by prepare.py; predictions, truth and
images are matched by case id. Several predictions of the same cases are ranked, and compared case
by case. Cases are scored side by side, as many as there are cores and memory for. What each score
means stands in metrics.py; --list-scores names them all.

Leaves the files of --out (a row per case and method, then mean, median and worst; or the same and
the leaderboards of all scores as JSON) and of --overlays (METHOD.png).

Exit status 2 if any input is wrong: every fault is named, and no file is written. 1 if a case could
not be scored, or a file not be written.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import re
import sys
from pathlib import Path

from monitoring import machine
from scoring import masks, metrics, overlays, pairs, tables
from scoring import parallel as scoring
from scoring import report as leaderboard
from volumes import files as volumes

SCORES = ("dice", "surface_dice", "precision", "recall", "voi_score", "components",
          "components_truth")  # fmt: skip
SUMMARIES = ("mean", "median", "worst")
LAST = ("tolerance", "spacing", "unit")  # facts beside the scores of a row
WRONG_INPUT, FAILED = 2, 1


# ---------------------------------------------------------------------------- tables


def with_summaries(rows, names):
    """The rows, then a row for mean, median and worst of each method."""
    found = leaderboard.summary(rows, names)
    out = list(rows)
    for kind in SUMMARIES:
        for method, scores in found.items():
            values = {name: scores[name][kind] for name in names}
            out.append({"case": kind, "method": method} | values)
    return out


# ---------------------------------------------------------------------------- files


@contextlib.contextmanager
def whole_file(path):
    """A text file that appears when all of it is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
    try:
        with open(partial, "w", newline="") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path, rows):
    with whole_file(path) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), restval="")
        writer.writeheader()
        for row in rows:
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


def write_json(path, rows, names, notes):
    """All that is printed, and the leaderboard of every score of which more or less is better."""
    ranked = [name for name in names if metrics.entry(name)[0].better]
    content = {
        "cases": rows,
        "summary": leaderboard.summary(rows, names),
        "leaderboard": {
            name: [one._asdict() for one in leaderboard.standings(rows, name)] for name in ranked
        },
        "notes": notes,
    }
    with whole_file(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")


def write_overlays(folder, found, rows, reading, args):
    """METHOD.png for each predicted method; yields the paths."""
    by_id = {pair.id: pair for pair in found}
    for method in found[0].predictions:
        shown_cases = []
        for case in leaderboard.worst_cases(rows, method, args.rank)[: args.overlay_cases]:
            pair, faults = by_id[case], []
            read = masks.read(pair, reading, faults)
            image = volumes.read_image(pair.image).array[0] if pair.image else None
            slices = overlays.worst_slices(
                read.masks[method],
                read.truth,
                image,
                read.spacing,
                tolerance=args.tolerance,
                ignore_label=reading.ignore_label,
            )
            row = next(r for r in rows if (r["case"], r["method"]) == (case, method))
            score = f"{args.rank.replace('_', ' ')} {tables.shown(row[args.rank], args.rank)}"
            shown_cases.append((case, score, slices))
        path = Path(folder) / f"{method}.png"
        tolerance = f"{args.tolerance:g} {read.unit}".rstrip()
        overlays.sheet(path, shown_cases, title=method, tolerance=tolerance)
        yield path


# ---------------------------------------------------------------------------- command line


def non_negative(text):
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text}")
    return value


def positive(text):
    if non_negative(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return float(text)


def count(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return int(text)


def score_name(text):
    try:
        metrics.entry(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def named(texts):
    """[(method, path)] of NAME=PATH or PATH; ValueError for two of one name.

    One path alone is called prediction; of several, each after its file or folder, or after the run
    that the folder predictions/ lies in.
    """
    found = []
    for text in texts:
        given = re.fullmatch(r"([\w.+-]+)=(.+)", text)
        path = Path(text)
        inside = path.name if path.name != "predictions" else path.absolute().parent.name
        name = "prediction" if len(texts) == 1 else volumes.stem_of(inside)
        found.append((given[1], given[2]) if given and not path.exists() else (name, text))
    names = [name for name, _ in found]
    if masks.OTSU in names or len(set(names)) < len(names):
        raise ValueError(
            f"expected predictions of different names, none of them {masks.OTSU}, got "
            f"{', '.join(names)}; give NAME=PATH"
        )
    return found


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pred", required=True, nargs="+", metavar="[NAME=]PATH", action="extend",
        help="predicted masks; several are compared")  # fmt: skip
    add("--truth", required=True, metavar="PATH", help="true masks, or a prepared dataset")
    add("--ignore-label", type=int, metavar="V", help="value of unlabeled voxels in the truth")
    add("--foreground", type=int, nargs="+", metavar="V", help="classes of the truth that count")
    add("--cases", nargs="+", default=[], metavar="ID", help="ids, or patterns, to score alone")
    add("--spacing", type=positive, nargs=3, metavar=("Z", "Y", "X"),
        help="default: the header of the truth, else of the prediction, else 1 1 1")  # fmt: skip
    add("--scores", type=score_name, nargs="+", default=SCORES, metavar="NAME",
        help=f"default: {' '.join(SCORES)}; also surface_dice@4 at another tolerance")  # fmt: skip
    add("--tolerance", type=non_negative, default=2.0, metavar="T",
        help="of surface Dice, in the unit of the spacing (default 2)")  # fmt: skip
    add("--rank", type=score_name, metavar="NAME",
        help="the score that says who is ahead, and what is worst (default: surface_dice if it is "
        "among --scores, else the first)")  # fmt: skip
    add("--out", nargs="+", default=[], metavar="FILE", help="write the scores: CSV, or .json")
    add("--otsu", metavar="PATH", help="images: score their Otsu threshold beside the predictions")
    add("--invert", action="store_true", help="--otsu finds what is dark")
    add("--overlays", metavar="DIR", help="write a picture of the worst slices of each prediction")
    add("--overlay-cases", type=count, default=4, metavar="N", help="cases in it (default 4)")
    add("--images", metavar="PATH",
        help="what is below the overlays (default: that of --otsu or of the dataset)")  # fmt: skip
    add("--jobs", type=count, metavar="N", help="cases at one time (default: as many as fit)")
    add("--memory-gb", type=positive, metavar="GB", help="for all of them (default: what is free)")
    add("--list-scores", action=ListScores, nargs=0, help="name all scores, and leave")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


class ListScores(argparse.Action):
    def __call__(self, parser, *_):
        for name, kind in metrics.SCORES.items():
            number = f"  (also {name}@{kind.number.upper()})" if kind.number else ""
            print(f"{name:24}{kind.better or 'describes':12}{kind.cost}{number}")
        parser.exit()


def check(parser, args):
    """Leave with status 2 if options do not go together; settle what depends on others."""
    if args.invert and not args.otsu:
        parser.error("--invert: expected --otsu PATH with it")
    if args.images and args.otsu:
        parser.error("--images: expected either this or --otsu, whose images are shown too")
    if args.ignore_label in (0, 1):
        parser.error(f"--ignore-label: expected neither 0 nor 1, got {args.ignore_label}")
    for path in args.out:
        if Path(path).is_dir():
            parser.error(f"--out: expected a file to write, got the folder {path}")
    if args.overlays and Path(args.overlays).is_file():
        parser.error(f"--overlays: expected a folder to write to, got the file {args.overlays}")
    try:
        args.pred = named(args.pred)
    except ValueError as error:
        parser.error(f"--pred: {error}")
    args.scores = tuple(dict.fromkeys([*args.scores, *([args.rank] if args.rank else [])]))
    ranking = [name for name in args.scores if metrics.entry(name)[0].better]
    if args.rank and args.rank not in ranking:
        parser.error(f"--rank: expected a score of which more or less is better, got {args.rank}")
    if not ranking:
        parser.error("--scores: expected one of which more or less is better beside these")
    usual = "surface_dice" if "surface_dice" in ranking else ranking[0]
    args.rank = args.rank or usual


def unwritable(paths):
    """A fault for each path that no file can be written to."""
    for path in map(Path, paths):
        there = next(p for p in path.absolute().parents if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            yield f"{path}: expected a file to write, but {there} is no folder that may be written"


def facts_of(found, results):
    """What is said of results beside the scores, as sentences."""
    notes, white = [], {}
    for pair, result in zip(found, results, strict=True):
        for role, value in result.white.items():
            white.setdefault((role, value), []).append(pair.id)
    for (role, value), ids in white.items():
        notes.append(f"{role} of 0 and {value} read as 0 and 1: {pairs.listed(ids)}")
    bare = [pair.id for pair, result in zip(found, results, strict=True) if not result.stated]
    if bare:
        notes.append(f"no file states a spacing, 1 1 1 is taken (--spacing): {pairs.listed(bare)}")
    rows = [row for result in results for row in result.rows]
    if any(row["tolerance"] < min(map(float, row["spacing"].split())) for row in rows):
        notes.append(f"the tolerance {rows[0]['tolerance']:g} is less than one voxel")
    return notes


def score(found, reading, args):
    """[scoring.Result] of the pairs, with a bar on a terminal."""
    from rich.progress import Progress

    scorer = scoring.Scorer(reading, args.scores, args.tolerance)
    budget = args.memory_gb * machine.GB if args.memory_gb else machine.available().bytes
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("scoring", total=len(found))
        return scoring.score_all(
            found,
            scorer,
            jobs=args.jobs,
            budget=budget,
            progress=lambda done: bar.update(task, completed=done),
        )


def main(argv=None):
    args = parse(argv)
    faults, notes = list(unwritable([*args.out, *([args.overlays] if args.overlays else [])])), []
    images = args.otsu or args.images
    found, dataset = pairs.match(args.pred, args.truth, images, faults, notes, only=args.cases)
    if not found and not faults:
        faults.append(f"{args.truth}: expected a label of a predicted case, got none of any")
    ignore_label = args.ignore_label
    if ignore_label is None and dataset is not None:
        ignore_label = dataset.ignore_label
    reading = masks.Reading(
        ignore_label=ignore_label,
        foreground=tuple(args.foreground or ()),
        spacing=args.spacing,
        # A spacing given by hand, here or at preparation, wins over what other files state.
        check_spacing=args.spacing is None and dataset is None,
        otsu=bool(args.otsu),
        invert=args.invert,
    )
    try:
        results = score(found, reading, args)
    except scoring.ScoringError as error:
        print(f"{error}; nothing was written", file=sys.stderr)
        return FAILED
    faults += [fault for result in results for fault in result.faults]
    if faults:
        plural = "" if len(faults) == 1 else "s"
        print(*faults, f"{len(faults)} fault{plural}; nothing was written",
              sep="\n", file=sys.stderr)  # fmt: skip
        return WRONG_INPUT
    return report([row for result in results for row in result.rows], found, reading, args,
                  notes + facts_of(found, results))  # fmt: skip


def report(rows, found, reading, args, notes):
    """Print and write everything; the exit status."""
    from rich.console import Console

    units = {row["unit"] for row in rows}
    # Without a terminal rich assumes 80 columns and would cut the ids.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for note in notes:
        print(f"note: {note}")
    all_rows = with_summaries(rows, args.scores)
    unit = units.pop() if len(units) == 1 else ""
    shown = all_rows if len(found) > 1 else rows
    tables.print_scores(console, shown, args.scores, unit, len(rows))
    if len(leaderboard.methods_of(rows)) > 1:
        standings = leaderboard.standings(rows, args.rank)
        tables.print_leaderboard(console, standings, args.rank, len(found))
    path = None
    try:
        for path in args.out:
            if path.lower().endswith(".json"):
                write_json(path, rows, args.scores, notes)
            else:
                write_csv(path, all_rows)
            print(f"wrote {path}")
        if args.overlays:
            path = args.overlays
            for picture in write_overlays(path, found, rows, reading, args):
                print(f"wrote {picture}")
    except OSError as error:
        print(f"{path}: it cannot be written ({error.strerror})", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
