"""Compare predicted masks with the truth: tables of scores, a leaderboard, pictures of the worst.

    python evaluate.py --pred runs/exp001 --truth data/vessels --out scores.csv
    python evaluate.py --pred pred.nii.gz --truth truth.nii.gz --spacing 5 1 1 --tolerance 2
    python evaluate.py --pred predictions --truth 'labels/{id}_lbl.tif' --ignore-label 2 \\
        --scores vesuvius_score toposcore surface_dice voi_score --overlays runs/overlays
    python evaluate.py --pred new=runs/b/predictions old=runs/a/predictions --truth data/x \\
        --otsu data/x --out scores.csv scores.json
    python evaluate.py --pred predictions --truth labels --classes artery=1 vein=2 vessel=1+2

Each PATH is a file, a folder, a pattern, or a folder made by prepare.py; a run, by its folder or a
checkpoint, stands for its predictions. Predictions, truth and images are matched by case id.
Several predictions of the same cases are ranked, and compared case by case. What each score means
is explained in scoring/metrics.py; --list-scores names them all.
With --classes, or a folder made by prepare.py that has several, each is scored, and their mean.

Leaves the files of --out (a row per case and method, then mean, median and worst; or the same and
the leaderboards of all scores as JSON) and of --overlays (METHOD.png).

Exit status 2 if any input is wrong: every error is named, and no file is written. 1 if a case could
not be scored (it is named, the others are there), or a file not be written.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from monitoring import machine
from scoring import block_inputs, inputs, metrics, parallel, report
from scoring.classes import MEAN, checked, full_names, ids_of, split_name
from volumes import atomic, files, origins
from volumes.classes import id_of, parsed
from volumes.processes import run_script
from volumes.statistics import clip_fill
from volumes.volume import printable

SCORES = ("dice", "surface_dice", "precision", "recall", "voi_score", "components",
          "components_truth")  # fmt: skip
WRONG_INPUT, FAILED = 2, 1


def with_summaries(rows, names):
    """The rows, then a row for mean, median and worst of each method: in the column summary, for a
    case may have such a name."""
    summaries = report.summary(rows, names)
    return [{"case": row["case"], "summary": ""} | row for row in rows] + [
        {"case": "", "summary": kind, "method": method}
        | {name: scores[name][kind] for name in names}
        for kind in ("mean", "median", "worst")
        for method, scores in summaries.items()
    ]


def write_json(path, rows, names, notes):
    """All that is printed, and the leaderboard of every score with a better end."""
    ranked = [name for name in names if metrics.entry(name)[0].better]
    content = {
        "cases": rows,
        "summary": report.summary(rows, names),
        "leaderboard": {n: [one._asdict() for one in report.leaderboard(rows, n)] for n in ranked},
        "notes": notes,
    }
    with atomic.replacing(path) as partial:
        text = json.dumps(content, indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def write_overlays(folder, pairs, rows, options, args):
    """METHOD.png for each predicted method; yields the paths."""
    by_id = {pair.id: pair for pair in pairs}
    classes = options.classes
    how = {"tolerance": args.tolerance, "ignore_label": options.ignore_label, "classes": classes}
    for method in pairs[0].predictions:
        drawn = []
        for row in report.worst_first(rows, method, args.rank)[: args.overlay_cases]:
            pair = by_id[row["case"]]
            case = inputs.read(pair, options, [])
            image = clip_fill(files.read_image(pair.image).array[0]) if pair.image else None
            masks = case.masks[method], case.truth
            slices = report.worst_slices(*masks, image, case.spacing, **how)
            drawn.append((pair.id, report.rank_text(row, args.rank), slices))
        path = Path(folder) / f"{method}.png"
        tolerance = f"{args.tolerance:g} {case.unit}".rstrip()
        with atomic.replacing(path) as partial:
            how_drawn = {"title": method, "tolerance": tolerance, "classes": classes}
            report.draw_slices(drawn, **how_drawn).savefig(partial)
        yield path


def number(kind, wanted, accepts):
    """A function that reads a number of the command line, or refuses it."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if accepts(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")

    return parse


non_negative = number(float, "a number of 0 or more", lambda value: 0 <= value < math.inf)
positive = number(float, "a number above 0", lambda value: 0 < value < math.inf)
count = number(int, "a whole number of 1 or more", lambda value: value >= 1)


def score_name(text):
    try:
        metrics.entry(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def named(texts):
    """[(method, path)] of NAME=PATH or PATH; ValueError for two of one name.

    A path without a name, of several, is called after its file or folder, or after the run that
    the folder predictions/ lies in.
    """
    predictions = []
    for text in texts:
        given = re.fullmatch(r"([\w.+-]+)=(.+)", text)
        given = None if Path(text).exists() else given
        text = origins.predictions_of_run(given[2] if given else text)
        path = Path(text)
        inside = path.name if path.name != "predictions" else path.absolute().parent.name
        name = "prediction" if len(texts) == 1 else printable(files.stem_of(inside))
        predictions.append((given[1] if given else name, text))
    names = [name for name, _ in predictions]
    if inputs.OTSU in names or len(set(names)) < len(names):
        raise ValueError(
            f"expected predictions of different names, none of them {inputs.OTSU}, got "
            f"{', '.join(names)}; give NAME=PATH"
        )
    return predictions


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pred", required=True, nargs="+", metavar="[NAME=]PATH", action="extend",
        help="predicted masks; several are compared")  # fmt: skip
    add("--truth", required=True, metavar="PATH", help="true masks, or a prepared dataset")
    add("--ignore-label", type=int, metavar="V", help="value of unlabeled voxels in the truth")
    add("--classes", nargs="+", metavar="NAME=ID", help="classes to score each, or regions "
        "NAME=ID+ID (default: those of a prepared dataset that has several)")  # fmt: skip
    add("--foreground", nargs="+", metavar="CLASS", help="classes of the truth that count as one, "
        "by number, or by the name that --classes or a prepared dataset gives them")  # fmt: skip
    add("--cases", nargs="+", default=[], metavar="ID", help="ids, or patterns, to score alone")
    add("--spacing", type=positive, nargs=3, metavar=("Z", "Y", "X"),
        help="default: the header of the truth, else of the prediction, else 1 1 1")  # fmt: skip
    add("--scores", type=score_name, nargs="+", default=SCORES, metavar="NAME",
        help=f"default: {' '.join(SCORES)}; also surface_dice@4 at another tolerance, and "
        "dice/CLASS or dice/mean of several classes")  # fmt: skip
    add("--tolerance", type=non_negative, metavar="T", help="of surface Dice, in the unit of the "
        "spacing (default: validation.tolerance of the run that predicted, else 2)")  # fmt: skip
    add("--rank", type=score_name, metavar="NAME",
        help="the score that ranks methods and cases (default: surface_dice if it is among "
        "--scores, else the first)")  # fmt: skip
    add("--out", nargs="+", default=[], metavar="FILE", help="write the scores: CSV, or .json")
    add("--otsu", metavar="PATH", help="images: score their Otsu threshold too")
    add("--invert", action="store_true", help="--otsu looks for dark structures")
    add("--overlays", metavar="DIR", help="write a picture of the worst slices of each prediction")
    add("--overlay-cases", type=count, default=4, metavar="N", help="cases in it (default 4)")
    add("--images", metavar="PATH",
        help="images under the overlays (default: those of --otsu or of the dataset)")  # fmt: skip
    add("--jobs", type=count, metavar="N", help="cases at one time (default: as many as fit)")
    add("--memory-gb", type=positive, metavar="GB", help="for all of them (default: what is free)")
    add("--list-scores", action=ListScores, nargs=0, help="name all scores, and leave")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


class ListScores(argparse.Action):
    def __call__(self, parser, *_):
        for name, kind in metrics.SCORES.items():
            also = f"  (also {name}@{kind.number.upper()})" if kind.number else ""
            print(f"{name:24}{kind.better or 'describes':12}{kind.cost}{also}")
        print("\nOf several classes, /CLASS or /mean may follow: dice/artery, surface_dice@4/mean")
        parser.exit()


def check(parser, args):
    """Leave with status 2 if options do not go together; complete those that depend on others."""
    if args.invert and not args.otsu:
        parser.error("--invert: expected --otsu PATH with it")
    if args.images and args.otsu:
        parser.error("--images: expected either this or --otsu, whose images are shown too")
    if args.ignore_label in ((0,) if args.classes and not args.foreground else (0, 1)):
        parser.error(f"--ignore-label: expected neither 0 nor 1, got {args.ignore_label}")
    if folder := next((path for path in args.out if Path(path).is_dir()), None):
        parser.error(f"--out: expected a file to write, got the folder {folder}")
    if args.overlays and Path(args.overlays).is_file():
        parser.error(f"--overlays: expected a folder to write to, got the file {args.overlays}")
    try:
        args.pred = named(args.pred)
    except ValueError as error:
        parser.error(f"--pred: {error}")
    ranking = [name for name in args.scores if metrics.entry(name)[0].better]
    if args.rank and not metrics.entry(args.rank)[0].better:
        parser.error(f"--rank: expected a score where higher or lower is better, got {args.rank}")
    if not args.rank and not ranking:
        parser.error("--scores: expected one where higher or lower is better among them")
    args.rank = args.rank or ("surface_dice" if "surface_dice" in ranking else ranking[0])
    args.scores = tuple(dict.fromkeys([*args.scores, args.rank]))
    if args.otsu and any(metrics.entry(name)[0].probs for name in args.scores):
        parser.error("--otsu: expected scores of masks with it, got ece, of probabilities")


def settle_classes(args, dataset):
    """({name: ids} of the classes to score each, or None; ids that count as one foreground; those
    that are declared and count as background, None for any other value).

    Completes the names of args.scores and args.rank. ValueError where these do not go together.
    """
    known = {name: i for name, i in dataset.classes.items() if i} if dataset else {}
    named = parsed(args.classes, known) if args.classes else {}
    declared = {*known.values(), *ids_of(named)}
    classes, foreground = None, ()
    if args.foreground:
        own = known | {name: ids[0] for name, ids in named.items()}
        ids = [named.get(t) or (id_of(t, own, "--foreground"),) for t in args.foreground]
        foreground = tuple(dict.fromkeys(i for several in ids for i in several))
        if args.ignore_label in foreground:
            raise ValueError(f"--foreground: expected classes, got {args.ignore_label} (ignored)")
    elif named or len(known) > 1:
        classes = checked(named or dataset.regions or known, args.ignore_label)
    else:  # predictions of one class are of 0 and 1, whatever its id
        foreground = tuple(i for i in known.values() if i != 1)
    if not classes and args.ignore_label == 1:
        raise ValueError(
            f"{args.truth}: expected another value than 1 of unlabeled voxels, as 1 is foreground; "
            "name the classes with --classes NAME=ID ..."
        )
    if classes and args.otsu:
        raise ValueError(
            f"--otsu: expected one foreground, got the classes {', '.join(classes)}; "
            "name those that count together with --foreground"
        )
    args.scores = full_names(args.scores, classes)
    if classes and split_name(args.rank)[1] is None:
        args.rank = f"{args.rank}/{MEAN}"
    if args.foreground and not declared:
        return classes, foreground, None
    return classes, foreground, tuple(declared - {*foreground, *ids_of(classes or {})})


def unwritable(paths):
    """An error for each path that no file can be written to."""
    for path in map(Path, paths):
        there = next(p for p in path.absolute().parents if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            yield f"{path}: expected a file to write, but {there} is no folder that may be written"


def notes_on(pairs, results, classes):
    """What a reader of the results must know, as sentences."""
    cases = {}
    for pair, result in zip(pairs, results, strict=True):
        for note in dict.fromkeys(result.masks.notes):
            cases.setdefault(note, []).append(pair.id)
    notes = [f"{note}: {inputs.listed(ids)}" for note, ids in cases.items()]
    for method in pairs[0].predictions:
        notes += origins.doubts({pair.id: pair.predictions[method] for pair in pairs})
    if classes:
        notes += absences(pairs, results, classes)
    rows = [row for result in results for row in result.rows]
    if needs_tolerance(rows[0]) and any(
        row["tolerance"] < min(map(float, row["spacing"].split())) for row in rows
    ):
        notes.append(f"the tolerance {rows[0]['tolerance']:g} is less than one voxel")
    return notes


def needs_tolerance(names):
    """Whether a score among these names takes --tolerance: surface_dice@5 has one of its own."""
    return bool({split_name(name)[0] for name in names} & metrics.OF_TOLERANCE)


def absences(pairs, results, classes):
    """A note on each class that the truth of a case lacks, or all predictions of a method."""
    lacking = [result.masks.absent for result in results]
    without = {name: [] for name in classes}  # cases
    for pair, absent in zip(pairs, lacking, strict=True):
        for name in absent[None]:
            without[name].append(pair.id)
    for name, cases in without.items():
        where = inputs.listed(cases) if len(cases) < len(pairs) else "all cases"
        if cases:
            yield (
                f"no {name} in the truth of {where}: ratios are 1 there if the prediction has none "
                "either, else 0"
            )
    for method in pairs[0].predictions:
        never = [c for c in classes if all(c in a[method] for a in lacking)]
        if never := [c for c in never if len(without[c]) < len(pairs)]:
            which = f"any prediction of {method}" if len(lacking[0]) > 2 else "any prediction"
            yield (
                f"no {' and no '.join(never)} in {which}; if one value stands for several classes, "
                "name them with --foreground"
            )


def score(pairs, options, args, unit):
    """[parallel.Result] of the pairs, with a bar on a terminal; unit: of the tolerance."""
    scorer = parallel.Scorer(options, args.scores, args.tolerance, unit)
    budget = args.memory_gb * machine.GB if args.memory_gb else machine.available().free
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("scoring", total=len(pairs))
        advance = functools.partial(bar.advance, task)
        return parallel.score_all(pairs, scorer, jobs=args.jobs, budget=budget, progress=advance)


def main(argv=None):
    args = parse(argv)
    errors, notes = list(unwritable([*args.out, *([args.overlays] if args.overlays else [])])), []
    images = args.otsu or args.images
    pairs, dataset = inputs.match(args.pred, args.truth, images, errors, notes, only=args.cases)
    if not pairs and not errors:
        errors.append(f"{args.truth}: expected a label of a predicted case, got none of any")
    if args.ignore_label is None and dataset is not None:
        args.ignore_label = dataset.ignore_label
    classes, foreground, background = None, (), ()
    try:
        if args.overlays and any(map(block_inputs.is_large, pairs)):
            raise ValueError("--overlays: expected volumes that fit into memory; leave it out")
        classes, foreground, background = settle_classes(args, dataset)
    except ValueError as error:
        if pairs or not errors:  # else the truth was not read: nobody knows its classes
            errors.append(str(error))
        pairs = []
    options = inputs.ReadOptions(
        ignore_label=args.ignore_label,
        foreground=foreground,
        classes=classes,
        background=background,
        spacing=args.spacing,
        # A spacing given by hand, here or at preparation, wins over that of other files.
        check_spacing=args.spacing is None and dataset is None,
        otsu=bool(args.otsu),
        invert=args.invert,
        probs=metrics.of_probabilities(args.scores, classes) if pairs else (),
    )
    unit = None
    if args.tolerance is None:
        args.tolerance, unit = parallel.tolerance_of_runs(pairs, notes)
    results = score(pairs, options, args, unit)
    errors += [error for result in results for error in result.errors]
    rows = [row for result in results for row in result.rows]
    if rows and unit is not None:
        said = notes if needs_tolerance(args.scores) else []
        args.tolerance = parallel.one_tolerance(rows, unit, errors, said)
    if errors:
        total = f"{files.counted(len(errors), 'error')}; nothing was written"
        print(*errors, total, sep="\n", file=sys.stderr)
        return WRONG_INPUT
    failures = [result.failure for result in results if result.failure]
    scored = [(p, r) for p, r in zip(pairs, results, strict=True) if not r.failure]
    status = FAILED if failures else 0
    if failures:
        notes.append(f"{len(failures)} of {len(pairs)} cases are not scored, and count in no mean")
    if scored:
        pairs, results = zip(*scored, strict=True)
        notes += notes_on(pairs, results, options.classes)
        status = write_report(rows, pairs, options, args, notes) or status
    for failure in failures:
        print(failure, file=sys.stderr)
    return status


def write_report(rows, pairs, options, args, notes):
    """Print and write everything; the exit status."""
    # Without a terminal rich assumes 80 columns and would cut the ids; [x] in one is no markup.
    plain = {"highlight": False, "markup": False, "emoji": False}
    console = Console(width=None if sys.stdout.isatty() else 200, **plain)
    for note in notes:
        print(f"note: {note}")
    all_rows, units = with_summaries(rows, args.scores), {row["unit"] for row in rows}
    unit = units.pop() if len(units) == 1 else ""
    shown = all_rows if len(pairs) > 1 else all_rows[: len(rows)]
    report.print_scores(console, shown, args.scores, unit, len(rows))
    if len(report.methods_of(rows)) > 1:
        board = report.leaderboard(rows, args.rank)
        report.print_leaderboard(console, board, args.rank, len(pairs))
    try:
        for path in args.out:
            if path.lower().endswith(".json"):
                write_json(path, rows, args.scores, notes)
            else:
                out = "" if needs_tolerance(args.scores) else "tolerance"
                report.write_csv(path, [{k: row[k] for k in row if k != out} for row in all_rows])
            print(f"wrote {path}")
        if args.overlays:
            path = args.overlays
            for picture in write_overlays(path, pairs, rows, options, args):
                print(f"wrote {picture}")
    except OSError as error:
        print(f"{path}: it cannot be written ({error.strerror})", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    run_script(main)
