"""Runs every command and every Python block of README.md and docs/, in order, on tiny data.

    python -m tests.docs_check                 # all pages, minutes; `make docs-check`
    python -m tests.docs_check docs/data.md    # one page

Each page gets a folder of its own with volumes, datasets, a trained run and small copies of the
configs. The commands are those of the page, but for SUBSTITUTIONS and ADDED. What needs a cluster
or installs packages is not run, but listed with its reason: see NOT_RUN, and the comment
`<!-- not run: REASON -->` above a block. Exit status: 0 if all that ran has exit status 0
(or 1 of `--benchmark`, whose figures of tiny data say nothing).
"""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
import tifffile
import yaml

from tests import processes
from tests.volumes.zarrs import add_label, write_zarr

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (.*?) -->\n)?^```(\w*)\n(.*?)^```", flags=re.M | re.S)
NOT_RUN = {  # {pattern: reason}
    r"\bsbatch\b": "needs SLURM",
    r"^make\b": "installs packages; tests run what it does",
}
SUBSTITUTIONS = [  # (pattern, what stands in for it)
    (r"--nproc-per-node=4", "--nproc-per-node=2"),
    (r"--shape \d+ \d+ \d+", "--shape 24 32 32"),
    (r"(--phantom (?:arteries_veins|spinal_cord)) --out", r"\1 --shape 24 32 32 --out"),
    (r"FILE\.h5", "scan.h5"),
    (r"vesselNN --labels vesselNN --spacing-csv \S+", "vesselNN_nifti --labels vesselNN_nifti"),
    (r"train=0:66 val=70:86 test=90:116", "train=0:12 val=14:22 test=24:32"),
    (r"a=0:64,0:256,0:256 b=64:128,256:512,0:256", "a=0:12,:,: b=12:,:,:"),
    (r"c=512:576,256:512,256:512", "c=0:12,0:16,0:16"),
    (r"512:576 1024:1152 1024:1152", "8:12 10:14 10:14"),
    (r"--pred pred\.zarr --truth", "--pred small.zarr/labels/ink --truth"),
    (r"grey=128 white=255", "artery=3 vein=7"),
    (r"(raw|new)/labels(.*--classes artery=3)", r"\1/classes\2"),
    (r"--pred out --truth (data/mine|labels --classes artery)", r"--pred pairs --truth \1"),
    (r"runs/losses/cldice_\*", "runs/folds/*_fold*"),
    (r"--pred pairs --truth data/mine", "--pred pairs --truth data/pairs"),
    (r"--pred pairs --truth labels", "--pred pairs --truth raw/classes"),
    (r"runs/best\.pt ('postprocess)", r"runs/pairs/checkpoints/best.pt \1"),
    (r"runs/best\.pt ('inference\.threshold={vessel)", r"runs/regions/checkpoints/best.pt \1"),
]
RUNS = ("mine", "vessels", "exp001", "pretrained")  # copies of one run
ADDED = {"tune.py": ["--steps", "15"], "monitor.py": ["--once"]}
TINY = {
    "data": {"cache_gb": 0.01},
    "sampling": {"patch": [8, 16, 16]},
    "model": {"base": 4, "multipliers": [1, 2], "blocks": 1},
    "training": {"max_epochs": 1, "train_iterations_per_epoch": 2, "max_steps": 2, "workers": 0},
    "run": {"threads": 1},
    "inference": {"overlap": 0.0},
    "validation": {"untrained": False},
    "monitor": {"tensorboard": False, "picture": False},
}
TINY_SWEEP = {"folds": 2, "seeds": [0]}


# ---------------------------------------------------------------------------- reading a page


def commands_of(page):
    """[(language, text, reason not to run it or None)] of a page: a Python block is one, each line
    of a shell block is one; YAML is none."""
    found = []
    for reason, language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            found.append((language, text, reason or None))
        elif not language:
            lines = re.sub(r"\\\n\s*", "", re.sub(r"(?<=')\n", "\n", text)).splitlines()
            for line in filter(None, lines):
                reasons = [why for pattern, why in NOT_RUN.items() if re.search(pattern, line)]
                found.append(("shell", line, reason or next(iter(reasons), None)))
    return found


# ---------------------------------------------------------------------------- the world of a page


def make_case(name, image_path, label_path, ids=(1, 1), shape=(24, 32, 32)):
    """An image with two bright bars, and its label: of one class, or of two."""
    label = np.zeros(shape, np.uint8)
    label[4:20, 6:14, 4:28], label[4:20, 18:26, 4:28] = ids
    noise = np.random.default_rng(len(name) + ord(name[-1])).normal(60, 10, shape)
    image = (noise + 80 * (label > 0)).astype(np.uint8)
    for path, array in ((image_path, image), (label_path, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tif":
            tifffile.imwrite(path, array)
        else:
            nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)


def make_volumes(world):
    for folder, names in (("raw", ["a1", "a2", "a3", "a4", "a5"]), ("new", ["unseen"])):
        for name in names:
            place = world / folder
            file = f"{name}.nii.gz"
            make_case(name, place / "images" / file, place / "classes" / file, (3, 7))
            make_case(name, place / "images" / file, place / "labels" / file)
    shutil.copytree(world / "new/images", world / "scans")
    shutil.copytree(world / "new/labels", world / "labels")
    shutil.copytree(world / "new/labels", world / "out")
    shutil.copytree(world / "raw/classes", world / "pairs")
    for run in "ab":
        shutil.copytree(world / "raw/labels", world / "runs" / run / "predictions")
    for name in ("s1", "s2"):
        make_case(name, world / f"raw/{name}_img.tif", world / f"raw/{name}_lbl.tif")
    for name in ("burgess2014_a", "burgess2014_b", "poon2015_c", "santos2015_d"):
        folder = world / "vesselNN_nifti"
        make_case(name, folder / f"{name}_img.nii.gz", folder / f"{name}_lbl.nii.gz")
    nnunet = world / "nnUNet_raw/Dataset001_X"
    for name in ("x1", "x2"):
        image = nnunet / "imagesTr" / f"{name}_0000.nii.gz"
        make_case(name, image, nnunet / "labelsTr" / f"{name}.nii.gz")
    make_case("x3", nnunet / "imagesTs/x3_0000.nii.gz", world / "unused/x3.nii.gz")
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "bar": 1}, "numTraining": 2}
    (nnunet / "dataset.json").write_text(json.dumps(about | {"file_ending": ".nii.gz"}))
    with h5py.File(world / "scan.h5", "w") as file:
        label = np.zeros((32, 32, 32), np.uint8)
        label[:, 8:12] = 1
        file["raw"] = (60 + 80 * label + np.arange(32, dtype=np.uint8)).astype(np.uint8)
        file["membrane"] = label


def make_zarrs(world):
    """scroll.zarr of two levels with the label ink, cube.tif of level 1, and small.zarr."""
    image, label = (tifffile.imread(world / f"raw/s1_{what}.tif") for what in ("img", "lbl"))
    scroll = write_zarr(world / "scroll.zarr", [image, image[::2, ::2, ::2]], "0.5", shard=16)
    add_label(scroll, "ink", [label], "0.5")
    tifffile.imwrite(world / "cube.tif", label[::2, ::2, ::2])
    shutil.copytree(scroll, world / "small.zarr")


def make_world(world):
    """A folder with what the commands of any page find: scripts, volumes, datasets, runs."""
    for path in ROOT.glob("[!.]*"):
        if path.name not in ("configs", "data", "runs", "out", "Makefile"):
            (world / path.name).symlink_to(path)
    shutil.copytree(ROOT / "configs", world / "configs")
    make_volumes(world)
    make_zarrs(world)
    quickstart = "--phantom scroll --cases 12 --shape 24 32 32 --out data/quickstart"
    pairs = "--images raw/images --labels raw/classes --classes artery=3 vein=7 --out data/pairs"
    regions = "data.regions={vessel: [artery, vein], artery: [artery]}"
    mine = {"data": {"root": "data/mine", "folds": 5}}
    (world / "configs/mine.yaml").write_text(yaml.safe_dump(mine))
    for words in (
        ["prepare.py", *quickstart.split()],
        ["prepare.py", *pairs.split()],
        "prepare.py --images raw/images --labels raw/labels --out data/mine".split(),
        "prepare.py --images raw/images --labels raw/labels --out data/vesuvius".split(),
        [
            *"prepare.py --images vesselNN_nifti --labels vesselNN_nifti --out".split(),
            "data/vessels",
        ],
        "train.py configs/mine.yaml data.root=data/pairs run.name=pairs".split(),
        [*"train.py configs/mine.yaml data.root=data/pairs run.name=regions".split(), regions],
        ["train.py", "configs/quickstart.yaml"],
        "infer.py --ckpt runs/best.pt --input scroll.zarr --output pred.zarr".split(),
    ):
        done = run_script(words, world)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in RUNS:
        shutil.copytree(world / "runs/quickstart", world / "runs" / name)


def clear(world, commands):
    """Remove what a page makes itself: datasets, and runs that it trains before it uses them."""
    for name in {name for _, text, _ in commands for name in re.findall(r"--out (data/\w+)", text)}:
        shutil.rmtree(world / name, ignore_errors=True)
    for name in RUNS:
        first = next((t for _, t, _ in commands if re.search(rf"(runs|configs)/{name}\b", t)), "")
        if f"train.py configs/{name}.yaml" in first and "--resume" not in first:
            shutil.rmtree(world / "runs" / name)


def shrink(path):
    """Make a config tiny; what it says of the data stays."""
    content = yaml.safe_load(path.read_text()) or {}
    content |= {group: content.get(group, {}) | values for group, values in TINY.items()}
    path.write_text(yaml.safe_dump(content))


def shrink_all(world):
    for path in world.glob("configs/*.yaml"):
        shrink(path)
    for path in world.glob("configs/sweeps/*.yaml"):
        content = yaml.safe_load(path.read_text()) | TINY_SWEEP
        content["variants"] = dict([*content.get("variants", {"only": {}}).items()][:2])
        path.write_text(yaml.safe_dump(content))


# ---------------------------------------------------------------------------- running


def run_script(words, world):
    """`script.py ...` in a world, its configs made tiny."""
    shrink_all(world)
    matches = [glob.glob(str(world / word)) if "*" in word else [] for word in words]
    words = [w for word, paths in zip(words, matches, strict=True) for w in paths or [word]]
    return processes.run(words, cwd=world, timeout=600)


def run(language, text, world):
    """A finished process: of a Python block, or of a line of shell after the substitutions."""
    if language == "python":
        return processes.run(["-c", f"import sys; sys.path.insert(0, '')\n{text}"], cwd=world)
    for pattern, other in SUBSTITUTIONS:
        text = re.sub(pattern, other, text)
    words = shlex.split(text, comments=True)
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
    if words[0] == "python" and words[1].endswith(".py") and "|" not in words:
        return run_script([*words[1:], *ADDED.get(words[1], ())], world)
    shrink_all(world)
    text = shlex.join(words) if words[0] == "python" and "|" not in words else text
    bin_folder = world / "bin"  # where `python` is the one that runs this
    bin_folder.mkdir(exist_ok=True)
    if not (bin_folder / "python").exists():
        (bin_folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (bin_folder / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    how = {"cwd": world, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(["bash", "-c", text], **how)


def check(page, world):
    """Run a page in a world; (number run, lines on what was not, lines on what failed)."""
    number, skipped, failed = 0, [], []
    commands = commands_of(page)
    clear(world, commands)
    for language, text, reason in commands:
        shown = text.strip().splitlines()[0][:90]
        if reason:
            skipped.append(f"{page.name}: not run, {reason}: {shown}")
            continue
        if "runs/folds" in text and not (world / "runs/folds").exists():
            run_script(["sweep.py", "configs/sweeps/folds.yaml"], world)
        started, done, number = time.monotonic(), run(language, text, world), number + 1
        print(f"{time.monotonic() - started:5.1f} s  {page.name}: {shown}", flush=True)
        # A benchmark may say that tiny data are slow, which is its exit status 1.
        if done.returncode and not (done.returncode == 1 and "--benchmark" in text):
            lines = (done.stdout + done.stderr).strip().splitlines()[-8:]
            about = f"{page.name}: exit status {done.returncode}: {text.strip()}"
            failed.append("\n    ".join([about, *lines]))
    return number, skipped, failed


def main(names):
    pages = [ROOT / name for name in names] or PAGES
    number, skipped, failed = 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        make_world(base)
        for page in pages:
            world = Path(folder) / page.stem
            shutil.copytree(base, world, symlinks=True)
            results = check(page, world)
            number += results[0]
            skipped += results[1]
            failed += results[2]
    print(*skipped, *failed, sep="\n")
    print(f"{number} commands run, {len(skipped)} not run, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
