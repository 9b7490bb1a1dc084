"""Turn raw volumes, or a synthetic phantom, into the case files that training reads.

    python prepare.py --phantom scroll --cases 8 --shape 96 96 96 --seed 0 --out data/scroll
    python prepare.py --images raw/images --labels raw/labels --out data/mine --spacing 5 1 1
    python prepare.py --images 'raw/{id}_img.tif' --labels 'raw/{id}_lbl.tif' --out data/mine
    python prepare.py --images nnUNet_raw/Dataset001_X --out data/x     # or a Vesuvius root
    python prepare.py --images scroll.zarr --labels ink.tif --bbox a=0:64,0:256,0:256 --out data/y

Every case is checked first: all faults of a folder are printed at once, one sentence each, and
then nothing is written (exit status 2). Leaves `<out>/<case>.h5` and `<out>/dataset.json`; cases
are added to a dataset that is already there, and those of the same id are replaced.

--sheet draws what the dataset looks like: slices with the label outlined, intensities, numbers;
without --images or --phantom that of a dataset which is there.

Labels of several classes: --classes artery=3 vein=7 names the values that they hold.

A labeled case also gets the skeleton of its label, for the loss skeleton_recall: 3 s of a core and
3 MB for 320 x 320 x 320 voxels. Give --no-skeletons if you do not train with it. --compression lzf
halves the files, and makes a box that is read from one take 26 ms instead of 1.4.
"""

import argparse
import collections
import contextlib
import itertools
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from volumes import classes, data_sheet, layouts, phantoms, pieces
from volumes.casefile import DATASET_FILE, is_dataset, read_dataset, write_dataset
from volumes.files import counted, few, split_dataset
from volumes.ingest import PhantomCase, Rules, prepare_case
from volumes.processes import cores, run_script
from volumes.volume import UNITS, collect_errors, is_spacing

MAX_ROWS = 40  # of the summary


class Stopped(RuntimeError):
    """Preparation cannot go on for a reason outside the input, such as memory or disk."""


# ---------------------------------------------------------------------------- all cases


def prepare_all(cases, rules, workers):
    """The outcomes of all cases, in their order. Stopped if memory or disk end."""
    outcomes, run = [], map
    on_terminal = sys.stdout.isatty()
    with contextlib.ExitStack() as stack:
        if workers > 1 and len(cases) > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(min(workers, len(cases)), mp_context=spawn)
            run = stack.enter_context(pool).map
        progress = stack.enter_context(Progress(disable=not on_terminal))
        results = run(prepare_case, cases, itertools.repeat(rules))
        for number, case in enumerate(progress.track(cases, description="cases"), start=1):
            try:
                outcomes.append(next(results))
            except BrokenProcessPool as error:
                raise Stopped(
                    f"case {case.id} or one beside it: a worker process was killed, most likely "
                    "for memory; try fewer --workers"
                ) from error
            except (OSError, MemoryError) as error:
                raise Stopped(f"case {case.id}: {type(error).__name__}: {error}") from error
            except Exception as error:
                error.add_note(f"while preparing case {case.id}")
                raise
            if not on_terminal:
                print(f"[{number}/{len(cases)}] {case.id}", flush=True)
    return outcomes


def merge_faults(rows, kept, declared):
    """What is wrong with the new cases together, and with those kept in the dataset they join.

    declared: how many channels each must have, 0 for any number.
    """
    new = {}
    for row in rows:
        if (other := new.setdefault(row["case"], row)) is not row:
            yield (
                f"case {row['case']}: expected one case of this id, got one of {other['source']} "
                f"and one of {row['source']}; choose other names for --crop"
            )
        if declared not in (0, row["channels"]):
            yield (
                f"case {row['case']}: expected {declared} channels as in dataset.json, got "
                f"{row['channels']} in {row['source']}"
            )
    units = {row["unit"]: row["case"] for row in rows} | {case.unit: case.id for case in kept}
    channels = {row["channels"]: row["case"] for row in rows} | {c.channels: c.id for c in kept}
    units_advice = "give --unit to convert them, or prepare them apart"
    if "" in units:
        units_advice = f"give --spacing Z Y X --unit {max(units)} where the files state none"
    if kept and not kept[0].unit:  # a dataset has one
        there = few([case.id for case in kept])
        units_advice = f"prepare what was there before ({there}) again with --unit {max(units)}"
    for what, examples, advice in (
        ("unit", units, units_advice),
        ("number of channels", channels, "prepare them apart"),
    ):
        if len(examples) > 1:
            named = ", ".join(f"{value or 'unknown'} (case {i})" for value, i in examples.items())
            yield f"dataset: expected one {what} in all cases, got {named}; {advice}"


def notes_on_existing(out, rows, existing, kept):
    """What became of the cases that were in out before, as sentences."""
    new = {row["case"]: row["source"] for row in rows}
    replaced = sorted(new.keys() & existing.keys())
    for number, case in enumerate(map(existing.get, replaced)):
        if os.path.isabs(case.source) and case.source != new[case.id]:
            replaced[number] += f" (of {case.source} before)"
    if replaced:
        yield f"replaced in {out}: {', '.join(replaced)}"
    folded = collections.Counter(name.casefold() for name in {*new, *existing})
    if twins := sorted(name for name in {*new, *existing} if folded[name.casefold()] > 1):
        yield f"ids that Windows and macOS take for one, by upper and lower case: {few(twins)}"
    if kept:
        yield f"kept in {out} from before, not in this run: {few([case.id for case in kept])}"
    if gone := [case.id for case in kept if _is_gone(case.source)]:
        yield (
            f"kept although their raw files are gone: {few(gone)}; to drop them, remove "
            f"{out} and prepare again"
        )


def _is_gone(source):
    """Whether the raw image of a case is not where it was; several channels are joined."""
    paths = [split_dataset(path)[0] for path in (source, *source.split(", "))]
    return os.path.isabs(source) and not any(map(os.path.exists, paths))


def publish(folder, out, rows, rules, existing):
    """Move the finished case files into out and write its `dataset.json`."""
    out.mkdir(parents=True, exist_ok=True)
    names = [row["case"] for row in rows]
    for name in names:
        os.replace(folder / f"{name}.h5", out / f"{name}.h5")
    write_dataset(
        out,
        classes=rules.classes,
        regions=rules.regions,
        ignore_label=rules.ignore_label,
        unit=rows[0]["unit"],
        case_ids={*names, *existing},
    )


# ---------------------------------------------------------------------------- the command


def parse(argv):
    """The command line as a namespace; argparse leaves with status 2 where it is malformed."""
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add, zyx = parser.add_argument, ("Z", "Y", "X")
    what = "file, file.h5:dataset, folder, glob, '{id}' pattern, root"
    add("--images", metavar="PATH", help=what)
    add("--labels", metavar="PATH", help="the same for the labels; left out: cases without label")
    add("--out", metavar="DIR", type=Path, required=True, help="made, or added to")
    add("--phantom", choices=sorted(phantoms.PHANTOMS), help="make synthetic cases instead")
    add("--cases", type=int, default=8, help="phantoms to make (8)")
    add("--shape", type=int, nargs=3, default=(96,) * 3, metavar=zyx, help="of a phantom")
    add("--seed", type=int, default=0, help="of the phantoms")
    add("--ignore-label", type=int, metavar="ID", help="label value of unlabeled voxels")
    what = "foreground classes: NAME=ID, ID being the value in the labels; ids 1 to N without"
    add("--classes", nargs="+", metavar="NAME", help=what)
    add("--spacing", type=float, nargs=3, metavar=zyx, help="wins over headers")
    add("--spacing-csv", metavar="FILE", help="columns id,z,y,x[,unit]; wins over --spacing")
    add("--unit", choices=sorted({*UNITS.values(), "um"}), help="of the spacing")
    add("--group-from", metavar="RULE", help="csv:COLUMN, csv:FILE:COLUMN or regex:PATTERN")
    add("--crop", nargs="+", default=[], metavar="NAME=Z0:Z1", help="cut every case in z")
    what = "a case for every box of every volume, of a .zarr read alone: NAME=Z0:Z1,Y0:Y1,X0:X1"
    add("--bbox", nargs="+", default=[], metavar="BOX", help=what)
    add("--no-skeletons", action="store_true", help="leave out what skeleton_recall trains on")
    add("--compression", choices=("lzf", "gzip"), help="smaller files, slower to read")
    add("--test-images", action="store_true", help="add imagesTs of an nnU-Net root, unlabeled")
    add("--sheet", action="store_true", help="draw all cases of DIR: DIR/sheet-1.png and on")
    add("--workers", type=int, default=cores(), help="processes; default: all cores")
    options = parser.parse_args(argv)
    options.alone = options.sheet and not (options.images or options.labels or options.phantom)
    if options.alone and not is_dataset(options.out):
        parser.error(f"--sheet alone: expected a dataset made by prepare.py in {options.out}")
    if bool(options.images) == bool(options.phantom) and not options.alone:
        parser.error("expected either --images PATH or --phantom KIND")
    if options.phantom and options.labels:
        parser.error("--labels goes with --images; a phantom brings its own label")
    if options.bbox and (options.phantom or options.crop):
        parser.error("--bbox goes with --images and without --crop")
    if options.phantom and (options.group_from or "").startswith("csv:"):
        parser.error("--group-from csv: goes with --images; a phantom takes regex:PATTERN")
    if options.test_images and not (Path(options.images or "") / "imagesTs").is_dir():
        parser.error("--test-images: expected --images ROOT with a folder imagesTs")
    return options


def make_rules(options, layout, faults):
    """The `Rules` (without a folder) of the command line and of what the layout declares.

    Everything that is wrong with the options is added to faults.
    """
    named, regions = layout.classes or classes.UNNAMED, layout.regions
    ignore = layout.ignore_label if options.ignore_label is None else options.ignore_label
    if options.spacing and not is_spacing(options.spacing):
        got = tuple(options.spacing)
        faults.append(f"--spacing: expected three numbers above 0, got {got}")
    if options.workers < 1:
        faults.append(f"--workers: expected at least 1, got {options.workers}")
    rows = None
    with collect_errors(faults):
        if options.classes is not None:
            named = classes.from_words(options.classes)
            if regions:
                layout.notes.append(f"--classes replaces the regions {', '.join(regions)}")
            regions = {}
        faults += classes.faults_of(named, regions, ignore)
    with collect_errors(faults):
        if options.spacing_csv:
            ids = [case.id for case in layout.cases]
            rows, notes = layouts.read_spacings(options.spacing_csv, ids)
            layout.notes += notes
    crops = pieces.parse("--crop", options.crop, "z", faults)
    if not options.group_from and any(case.group == case.id for case in layout.cases):
        faults += pieces.faults_of_crops(crops)
    unit = options.unit and UNITS[options.unit]
    store = {"skeleton": not options.no_skeletons, "compression": options.compression}
    return Rules(named, regions, ignore, options.spacing, unit, rows, crops, store, "")


def _phantom_layout(options):
    kind, shape = options.phantom, tuple(options.shape)
    if options.cases < 1 or min(shape) < 2 or options.seed < 0:
        got = f"--cases {options.cases} --shape {shape} --seed {options.seed}"
        sentence = f"--phantom {kind}: expected cases >= 1, a shape >= 2 and a seed >= 0, got {got}"
        return layouts.Layout(faults=[sentence])
    names = [f"{kind}_{index:03d}" for index in range(options.cases)]
    cases = [PhantomCase(n, kind, shape, options.seed, i, n) for i, n in enumerate(names)]
    ignore = phantoms.UNLABELED if kind == "scroll" else None
    return layouts.Layout(cases, phantoms.CLASSES.get(kind), ignore_label=ignore)


def existing_cases(out, cases, rules, faults):
    """{id: case} of the dataset already in out; what forbids adding to out is added to faults."""
    sources = [path for case in cases for path in getattr(case, "images", ())]
    if out.resolve() in {Path(split_dataset(path)[0]).resolve().parent for path in sources}:
        faults.append(f"--out {out}: expected another folder than that of the images")
    if not os.path.lexists(out / DATASET_FILE):  # a link to nothing is a fault
        return {}
    dataset = read_dataset(out)
    for name in ("classes", "regions", "ignore_label"):
        there, here = getattr(dataset, name), getattr(rules, name)
        if repr(there) != repr(here):  # their order counts too: of channels, and of painting
            faults.append(
                f"--out {out}: expected the {name.replace('_', ' ')} of the dataset there, "
                f"{there}, got {here}; delete that folder, choose another, or prepare all alike"
            )
    return dataset.cases


def report(outcomes, notes):
    """Print notes, each once with its cases, and the table of what was written."""
    cases_of = {}
    for outcome in outcomes:
        for note in outcome.notes:
            cases_of.setdefault(note, []).append(outcome.id)
    for note in notes:
        print(f"note: {note}")
    for note, names in cases_of.items():
        print(f"note: {note} ({counted(len(names), 'case')}: {few(names)})")
    rows = [row for outcome in outcomes for row in outcome.rows]
    columns = ("case", "shape", "spacing", "dtype", "fg %", "unlabeled %", "group")
    table = Table(*columns)
    for row in rows[:MAX_ROWS]:
        table.add_row(*(row[column] for column in columns))
    plain = {"highlight": False, "markup": False, "emoji": False}  # a class may be "[red]"
    Console(width=None if sys.stdout.isatty() else 160, **plain).print(table)
    if len(rows) > MAX_ROWS:
        print(f"... and {len(rows) - MAX_ROWS} more")


def refuse(faults, cases, notes=()):
    """Print every fault to stderr, and the notes that may explain it; returns the exit status."""
    for note in notes:
        print(f"note: {note}")
    among = f" in {counted(len(cases), 'case')}" if cases else ""
    last = f"{counted(len(faults), 'fault')}{among}; nothing was written"
    print(*faults, last, sep="\n", file=sys.stderr)
    return 2


def draw_sheet(out):
    for path in data_sheet.write_sheet(read_dataset(out), out):
        print(f"drawn: {path}")
    return 0


def main(argv=None):
    """Prepare what the command line says; returns the exit status."""
    options = parse(argv)
    out, existing = options.out, {}
    if options.alone:
        with collect_errors(faults := []):
            return draw_sheet(out)
        return refuse(faults, ())
    if options.phantom:
        layout = _phantom_layout(options)
    else:
        layout = layouts.find_cases(options.images, options.labels, options.test_images)
    faults, notes, option_faults = layout.faults, layout.notes, []
    boxes = pieces.parse("--bbox", options.bbox, "zyx", option_faults)
    cases = layout.cases = pieces.boxed(layout.cases, boxes)
    rules = make_rules(options, layout, option_faults)
    if option_faults:
        return refuse(option_faults + faults, cases)
    with collect_errors(faults):
        cases = layouts.assign_groups(cases, options.group_from, options.images)
    if out.exists() and not out.is_dir():
        return refuse([*faults, f"--out {out}: expected a folder, got a file"], cases, notes)
    with collect_errors(faults):
        existing = existing_cases(out, cases, rules, faults)
    if not cases:
        none = f"--images {options.images}: expected cases, got none that is whole"
        return refuse(faults or [none], cases, notes)
    try:
        # On the disk of out, so that finished files are moved; out stays as it was if none are.
        nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        with tempfile.TemporaryDirectory(prefix=".preparing_", dir=nearest) as folder:
            outcomes = prepare_all(cases, replace(rules, folder=folder), options.workers)
            rows = [row for outcome in outcomes for row in outcome.rows]
            faults += [fault for outcome in outcomes for fault in outcome.faults]
            labels = [outcome.label for outcome in outcomes]
            faults += classes.undeclared(labels, rules.classes, rules.ignore_label)
            new = {row["case"] for row in rows}
            kept = [case for case in existing.values() if case.id not in new]
            # Channel files that are missing were named already, by the folder alone.
            faults += merge_faults(rows, kept, 0 if faults else layout.channels)
            pieces.merge_overlaps(rows, kept, faults, notes)
            if faults:
                return refuse(faults, cases, notes)
            publish(Path(folder), out, rows, rules, existing)
    except Stopped as error:
        print(f"{error}; nothing was written", file=sys.stderr)
        return 1
    except OSError as error:
        return refuse([f"--out {out}: expected a folder to write to, got {error}"], cases)
    notes += notes_on_existing(out, rows, existing, kept)
    ids = {row["case"]: row["ids"] for row in rows if row["ids"] is not None}
    notes += classes.rare(rules.classes, ids | {c.id: c.counts for c in kept if c.labeled})
    report(outcomes, notes)
    print(f"{counted(len(new), 'case')} written to {out}")
    return draw_sheet(out) if options.sheet else 0


if __name__ == "__main__":
    run_script(main)
