"""What each loss term brings: one training per set of terms, all else the same, scored alike.

    python benchmarks/ablation.py quickstart --steps 160 --out runs/ablation_quickstart.csv
    python benchmarks/ablation.py vessels --steps 600 --jobs 2 --out runs/ablation_vessels.csv
    python benchmarks/ablation.py membranes --steps 600 --terms none,cldice,all --out runs/m.csv

The sets are `none` (BCE + Dice alone), each other term beside these two, `all`, and `all-<term>`;
--terms picks among them. Each is trained from the same seed on one thread by train.py, predicts the
test cases by infer.py from its last checkpoint, and adds one row to the CSV as soon as it is done,
the mean over test cases. Rows that are there are not made again: give the same command after an
interruption. Runs lie in the folder beside the CSV that is named after it. skeleton_recall needs
cases that prepare.py made with skeletons. Exit status 1 if a run failed.

    dice, surface_dice        as metrics.score, at the config's tolerance
    cldice                    of the masks and their 3D skeletons, see `centreline_dice`
    b0_, b1_, b2_error        |pieces, handles, cavities of the prediction less those of the truth|
    components, _truth        26-connected, of the prediction and of the truth
    seconds_per_step          while --jobs runs share the machine
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import cc3d
import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime import checkpoint, config
from runtime import folder as runs
from scoring import metrics
from volumes import casefile
from volumes import files as volumes
from volumes.inputs import default_inputs

# What a term weighs where it is on.
BASE = {"weighted_bce": 0.5, "soft_dice": 0.5}
WEIGHTS = {
    "cldice": 0.2,
    "morph_skeleton": 1.0,  # its values are small
    "surface_distance": 0.2,
    "skeleton_recall": 0.2,
    "toploss": 0.05,
}
SETS = {
    "none": {},
    **{name: {name: weight} for name, weight in WEIGHTS.items()},
    "all": WEIGHTS,
    **{f"all-{name}": {k: w for k, w in WEIGHTS.items() if k != name} for name in WEIGHTS},
}
KEYS = ("config", "steps", "seed", "terms", "weights")  # of a row: what makes it the same one
SCORES = ("dice", "surface_dice", "cldice", "b0_error", "b1_error", "b2_error")
SCORES += ("components", "components_truth")
COLUMNS = (*KEYS, *SCORES, "seconds_per_step", "cases", "lamina")
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


def score_case(case, prediction, foreground, tolerance):
    """The SCORES of one predicted mask (D, H, W); unlabeled voxels are background of both sides."""
    with h5py.File(case.path) as file:
        label = file["label"][:]
    truth = np.where(label == case.ignore_label, label, np.isin(label, foreground))
    scores = metrics.score(prediction, truth, case.spacing, case.ignore_label, tolerance)
    masks = metrics.labeled_masks(prediction, truth, case.ignore_label)
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


def make_row(identity, settings, arguments, folder):
    """Train, predict and score one set of terms: its row, a dict of COLUMNS.

    folder: for its runs alone, since a link to the newest one lies in it.
    """
    name = identity["terms"]
    weights = {**dict.fromkeys(WEIGHTS, 0.0), **BASE, **SETS[name]}
    per_epoch = settings.training.train_iterations_per_epoch
    per_epoch = per_epoch if arguments.steps % per_epoch == 0 else arguments.steps
    overrides = {
        "run.folder": folder,
        "run.name": name,
        "run.seed": arguments.seed,
        "run.threads": 1,
        "data.root": settings.data.root,
        "training.train_iterations_per_epoch": per_epoch,
        "training.max_epochs": arguments.steps // per_epoch,
        "validation.every": arguments.steps // per_epoch,
        "validation.untrained": "false",
        "monitor.tensorboard": "false",
        "monitor.picture": "false",
        **{f"loss.{term}.weight": weight for term, weight in weights.items()},
    }
    given = [f"{key}={value}" for key, value in overrides.items()]
    script("train.py", config_path(arguments.config), *given)
    run = runs.newest_run_folder(folder, name)
    state = checkpoint.load(run / "checkpoints" / "last.pt")
    root = settings.data.root
    script("infer.py", "--ckpt", run / "checkpoints" / "last.pt", f"data.root={root}")
    scores = score_run(run, state["data"], root, settings.validation.tolerance)
    row = {**identity, **{key: f"{x:.4f}" for key, x in metrics.mean_scores(scores).items()}}
    row["seconds_per_step"] = f"{state['loop']['seconds'] / state['loop']['step']:.4f}"
    return row | {"cases": len(scores), "lamina": state["versions"]["lamina"]}


def score_run(run, facts, root, tolerance):
    """The SCORES of each case that infer.py predicted; facts: what the checkpoint holds of data."""
    files, _ = default_inputs(facts, root)
    scores = []
    for case in map(casefile.read_case, files):
        (path,) = (run / "predictions").glob(f"{case.id}.*")
        prediction = volumes.read_label(str(path)).array
        scores.append(score_case(case, prediction, facts["foreground"], tolerance))
    return scores


def identity_of(name, arguments):
    weights = {**BASE, **SETS[name]}
    written = " ".join(f"{term}={weight:g}" for term, weight in weights.items())
    values = (arguments.config, arguments.steps, arguments.seed, name, written)
    return dict(zip(KEYS, map(str, values), strict=True))


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
    columns = ("terms", *SCORES, "seconds_per_step")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in sorted(rows, key=lambda row: list(SETS).index(row["terms"])):
        print(f"| {' | '.join(row[column] for column in columns)} |")


# ---------------------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", choices=("vessels", "membranes", "quickstart"), help="of configs/")
    add("--steps", type=int, required=True, help="of every training")
    add("--terms", default=",".join(SETS), help="which sets, with commas between; default: all")
    add("--out", type=Path, required=True, metavar="FILE.csv")
    add("--jobs", type=int, default=1, help="runs at a time, one thread each")
    add("--data", metavar="DIR", help="the prepared cases; default: data.root of the config")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.terms = arguments.terms.split(",")
    for name in arguments.terms:
        if name not in SETS:
            parser.error(f"--terms: expected some of {', '.join(SETS)}, got {name!r}")
    if arguments.out.suffix != ".csv":
        parser.error(f"--out: expected a name that ends in .csv, got {arguments.out}")
    for name in ("steps", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(arguments, name)}")
    return arguments


def make_rows(wanted, rows, settings, arguments):
    """Add each wanted row to `rows` and to the file as it comes; sentences on those that failed."""
    runs = arguments.out.with_suffix("")
    failed, pool = [], ThreadPoolExecutor(arguments.jobs)
    try:
        futures = {
            pool.submit(
                make_row, identity, settings, arguments, runs / identity["terms"]
            ): identity["terms"]
            for identity in wanted
        }
        for future in as_completed(futures):
            name = futures[future]
            try:
                row = future.result()
            except (RuntimeError, ValueError, OSError) as error:
                failed.append(f"{name}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            rows.append({key: str(value) for key, value in row.items()})
            write_rows(arguments.out, rows)
            print(f"{name}: " + " ".join(f"{k} {row[k]}" for k in SCORES), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def main(argv=None):
    arguments = parse(argv)
    settings = config.load(
        config_path(arguments.config), [f"data.root={arguments.data}"] if arguments.data else ()
    )
    try:
        rows = read_rows(arguments.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    known = [[row[key] for key in KEYS] for row in rows]
    identities = [identity_of(name, arguments) for name in dict.fromkeys(arguments.terms)]
    wanted = [i for i in identities if list(i.values()) not in known]
    print(f"{len(identities) - len(wanted)} of {len(identities)} rows are in {arguments.out}")
    failed = make_rows(wanted, rows, settings, arguments)
    show([row for row in rows if {key: row[key] for key in KEYS} in identities])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
