"""Recipes judged on groups that training never saw: one training per recipe, group and seed.

    python benchmarks/left_out.py vessels RECIPES.yaml --groups burgess2014 poon2015 santos2015 \\
        --seeds 0 1 2 --steps 300 --jobs 2 --out runs/left_out.csv
    python benchmarks/left_out.py membranes RECIPES.yaml --steps 300 --out runs/membranes.csv

RECIPES.yaml holds {name: {group.key: value}}, changes of configs/<config>.yaml; {} is the config as
it is. With --groups, each group in turn is the test and all other cases train, else the config's
own split counts. No case validates: nothing of the group that is left out picks a checkpoint, a
threshold or a size. Each recipe is trained on one thread by train.py, predicts the test cases by
infer.py from its last checkpoint (at 0.5, unless the recipe says otherwise), and adds a row to the
CSV as soon as it is done: the mean over the cases of that group. Rows that are there are not made
again: give the same command after an interruption. Runs lie in the folder beside the CSV that is
named after it. Exit status 1 if a run failed. At the end, per recipe: means over groups and seeds,
with the deviation over seeds.

    dice                      as metrics.score
    surface_dice              the same, at 2 voxels of the finest axis
    cldice                    of the masks and their 3D skeletons, see `centreline_dice`
    b0_, b1_, b2_error        |pieces, handles, cavities of the prediction less those of the truth|
    seconds_per_step          while --jobs runs share the machine
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

import cc3d
import h5py
import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime import checkpoint, config
from runtime import folder as runs
from scoring import metrics
from scoring.masks import labeled_masks
from volumes import casefile
from volumes import files as volumes
from volumes.inputs import default_inputs

KEYS = ("config", "recipe", "left_out", "seed", "steps", "changes")  # what makes a row the same one
SCORES = ("dice", "surface_dice", "cldice", "b0_error", "b1_error", "b2_error")
COLUMNS = (*KEYS, *SCORES, "seconds_per_step", "cases", "lamina")
FIXED = {  # of all recipes, before their own changes
    "run.threads": 1,
    "data.validation": [],
    "validation.untrained": False,
    "monitor.tensorboard": False,
    "monitor.picture": False,
    "postprocess.min_component_voxels": 0,
}
ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------- scores


def centreline_dice(prediction, truth):
    """clDice of two masks (D, H, W) bool (Shit et al. 2021), with skeletons thinned in 3D.

    The harmonic mean of the share of the prediction's skeleton that lies in the truth, and of the
    truth's that lies in the prediction. In [0, 1]; 1 if both are empty, 0 if one is.
    """
    from skimage.morphology import skeletonize

    if not (prediction.any() and truth.any()):
        return float(prediction.any() == truth.any())
    of_prediction, of_truth = (skeletonize(mask, method="lee") > 0 for mask in (prediction, truth))
    precision, sensitivity = truth[of_prediction].mean(), prediction[of_truth].mean()
    total = precision + sensitivity
    return float(2.0 * precision * sensitivity / total) if total else 0.0


def betti_numbers(mask):
    """(b0, b1, b2) of a whole mask (D, H, W) bool: its pieces, handles and cavities.

    Foreground touches by faces, background by faces, edges and corners; outside of the volume is
    background, so that a cavity is a piece of it that does not reach the border. b1 follows from
    the Euler number b0 - b1 + b2.
    """
    from skimage.measure import euler_number

    outside = np.pad(~mask, 1, constant_values=True)
    _, pieces = cc3d.connected_components(mask, connectivity=6, return_N=True)
    _, hollows = cc3d.connected_components(outside, connectivity=26, return_N=True)
    cavities = int(hollows) - 1  # one of them is the outside
    return int(pieces), int(pieces) + cavities - int(euler_number(mask, connectivity=1)), cavities


def score_case(case, prediction, foreground):
    """The SCORES of one predicted mask (D, H, W); unlabeled voxels are background of both sides."""
    with h5py.File(case.path) as file:
        label = file["label"][:]
    truth = np.where(label == case.ignore_label, label, np.isin(label, foreground))
    tolerance = 2 * min(case.spacing)
    scores = metrics.score(prediction, truth, case.spacing, case.ignore_label, tolerance)
    masks = labeled_masks(prediction, truth, case.ignore_label)
    scores["cldice"] = centreline_dice(*masks)
    numbers = zip(*map(betti_numbers, masks), strict=True)
    scores |= {f"b{i}_error": abs(ours - true) for i, (ours, true) in enumerate(numbers)}
    return {name: scores[name] for name in SCORES}


# ---------------------------------------------------------------------------- one row


def script(name, *arguments):
    """Run a script of the project; RuntimeError with the last it said, if it fails."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise RuntimeError(f"{name} ended with status {done.returncode}: {' '.join(said)}")


def make_row(identity, changes, arguments, folder):
    """Train, predict and score one recipe: its row, a dict of COLUMNS.

    folder: for its runs alone, since a link to the newest one lies in it.
    """
    given = {"run.folder": str(folder), "run.name": "run", "run.seed": int(identity["seed"])}
    given |= FIXED | {"training.train_iterations_per_epoch": arguments.steps}
    given |= {"data.root": arguments.data, "training.max_epochs": 1, **changes}
    if group := identity["left_out"]:
        others = [case.id for case in arguments.cases if case.group != group]
        given |= {"data.train": others, "data.test": [group]}
    given = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    script("train.py", config_path(arguments.config), *given)
    run = runs.newest_run_folder(folder, "run")
    state = checkpoint.load(run / "checkpoints" / "last.pt")
    script("infer.py", "--ckpt", run / "checkpoints" / "last.pt", f"data.root={arguments.data}")
    scores = score_run(run, state["data"], arguments.data)
    row = {**identity, **{key: f"{x:.4f}" for key, x in metrics.mean_scores(scores).items()}}
    row["seconds_per_step"] = f"{state['loop']['seconds'] / state['loop']['step']:.4f}"
    return row | {"cases": len(scores), "lamina": state["versions"]["lamina"]}


def score_run(run, facts, root):
    """The SCORES of each case that infer.py predicted; facts: what the checkpoint holds of data."""
    files, _ = default_inputs(facts, root)
    scores = []
    for case in map(casefile.read_case, files):
        (path,) = (run / "predictions").glob(f"{case.id}.*")
        prediction = volumes.read_label(str(path)).array
        scores.append(score_case(case, prediction, facts["foreground"]))
    return scores


def identities_of(recipes, arguments):
    """{what makes a row the same one: changes}, seed by seed, so that all recipes advance alike."""
    found = {}
    for seed, (name, changes), group in itertools.product(
        arguments.seeds, recipes.items(), arguments.groups or [""]
    ):
        written = json.dumps(changes, sort_keys=True)
        values = (arguments.config, name, group, seed, arguments.steps, written)
        found[tuple(map(str, values))] = changes
    return found


def config_path(name):
    return ROOT / "configs" / f"{name}.yaml"


# ---------------------------------------------------------------------------- the table


def read_rows(path):
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path}: expected a table that this script wrote, with the columns "
                f"{', '.join(COLUMNS)}, got {reader.fieldnames}; give another --out"
            )
        return list(reader)


def write_rows(path, rows):
    """Write the table whole: under a temporary name first, then renamed."""
    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
    try:
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def show(rows):
    """Per recipe and number of steps: the mean over groups of each seed; mean and deviation."""
    print(f"\n| recipe | steps | seeds | {' | '.join(SCORES)} | seconds_per_step |")
    print(f"|{'---|' * (len(SCORES) + 4)}")
    kinds = dict.fromkeys((row["recipe"], row["changes"], row["steps"]) for row in rows)
    for kind in kinds:
        mine = [row for row in rows if (row["recipe"], row["changes"], row["steps"]) == kind]
        seeds, cells = sorted({row["seed"] for row in mine}), []
        for name in (*SCORES, "seconds_per_step"):
            means = [mean(float(r[name]) for r in mine if r["seed"] == seed) for seed in seeds]
            spread = f" ± {stdev(means):.3g}" if len(means) > 1 else ""
            cells.append(f"{mean(means):.{0 if name[0] == 'b' else 3}f}{spread}")
        print(f"| {kind[0]} | {kind[2]} | {len(seeds)} | {' | '.join(cells)} |")


# ---------------------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", choices=("vessels", "membranes", "quickstart"), help="of configs/")
    add("recipes", type=Path, metavar="RECIPES.yaml")
    add(
        "--groups", nargs="+", default=[], help="each is left out once; default: the config's split"
    )
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, required=True, help="of every training")
    add("--out", type=Path, required=True, metavar="FILE.csv")
    add("--jobs", type=int, default=1, help="runs at a time, one thread each")
    add("--data", metavar="DIR", help="the prepared cases; default: data.root of the config")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".csv":
        parser.error(f"--out: expected a name that ends in .csv, got {arguments.out}")
    for name in ("steps", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(arguments, name)}")
    settings = config.load(config_path(arguments.config))
    arguments.data = arguments.data or settings.data.root
    arguments.cases = list(casefile.read_dataset(arguments.data).cases.values())
    known = {case.group for case in arguments.cases}
    for group in arguments.groups:
        if group not in known:
            parser.error(f"--groups: expected some of {', '.join(sorted(known))}, got {group}")
    return arguments


def make_rows(wanted, rows, arguments):
    """Add each wanted row to `rows` and to the file as it comes; sentences on those that failed."""
    folder = arguments.out.with_suffix("")
    failed, pool = [], ThreadPoolExecutor(arguments.jobs)
    try:
        futures = {}
        for number, (key, changes) in enumerate(wanted.items(), len(rows)):
            identity = dict(zip(KEYS, key, strict=True))
            job = pool.submit(make_row, identity, changes, arguments, folder / str(number))
            futures[job] = f"{identity['recipe']}, {identity['left_out']}, seed {identity['seed']}"
        for future in as_completed(futures):
            try:
                row = future.result()
            except (RuntimeError, ValueError, OSError) as error:
                failed.append(f"{futures[future]}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            rows.append({key: str(value) for key, value in row.items()})
            write_rows(arguments.out, rows)
            print(f"{futures[future]}: " + " ".join(f"{k} {row[k]}" for k in SCORES), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def main(argv=None):
    arguments = parse(argv)
    recipes = yaml.safe_load(arguments.recipes.read_text(encoding="utf-8"))
    try:
        rows = read_rows(arguments.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    known = {tuple(row[key] for key in KEYS) for row in rows}
    asked = identities_of(recipes, arguments)
    wanted = {key: changes for key, changes in asked.items() if key not in known}
    print(f"{len(asked) - len(wanted)} of {len(asked)} rows are in {arguments.out}", flush=True)
    failed = make_rows(wanted, rows, arguments)
    show([row for row in rows if tuple(row[key] for key in KEYS) in asked])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
