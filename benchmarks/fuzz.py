"""Malformed and odd inputs for prepare.py, infer.py and evaluate.py: none may pass in silence.

    python benchmarks/fuzz.py                             # 200 inputs: half a minute
    python benchmarks/fuzz.py --count 900 --seed 7 --script infer
    python benchmarks/fuzz.py --only 41                   # one input of that seed again

An input is a format, a fault and a script. Exit status 0 is right with one result that has the
voxels and the geometry that the fuzz wrote, or that an independent reader finds where bits were
flipped: SimpleITK, Pillow through imageio, plain h5py. Exit status 2 is right where the file is
named on stderr and no output is left. All else is a failure. Exit status 1 if there is one.
"""

import argparse
import contextlib
import csv
import io
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import h5py
import nibabel
import numpy as np
import PIL.Image
import tifffile
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import infer
import prepare
import train
from benchmarks.fuzz_inputs import HDF5, NOTED, READ, REFUSE, combinations, make, wavy

SCRIPTS = {"prepare": prepare, "infer": infer, "evaluate": evaluate}
METRES = {"m": 1.0, "mm": 1e-3, "micron": 1e-6, "nm": 1e-9, "": 1e-3}


# ---------------------------------------------------------------------------- what is right


def independent(item):
    """(voxels, spacing in m or None) by a reader that the project does not use; else as written."""
    if item.format in HDF5:
        with contextlib.suppress(Exception), h5py.File(item.path) as file:
            return file[item.dataset][()], item.spacing
    elif item.format != "nii.gz":  # gzip has a checksum: what was written, or nothing
        import imageio.v3
        import SimpleITK

        SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
        with contextlib.suppress(Exception):
            image = SimpleITK.ReadImage(str(item.path))
            if image.GetNumberOfComponentsPerPixel() == 1:  # no picture of what it cannot read
                voxels = SimpleITK.GetArrayFromImage(image)
                if item.affine is None:
                    most = np.iinfo(voxels.dtype).max
                    return (most - voxels if _white_is_zero(item.path) else voxels), None
                return voxels, tuple(s / METRES[item.unit] * 1e-3 for s in image.GetSpacing()[::-1])
        with contextlib.suppress(Exception):
            return imageio.v3.imread(item.path, plugin="pillow", index=...), None
        with contextlib.suppress(Exception):  # tiles, which the others do not read
            return tifffile.imread(item.path), None
    return item.voxels, item.spacing


def _white_is_zero(path):
    """Whether a TIFF says so, which SimpleITK overlooks."""
    with PIL.Image.open(path) as image:
        return image.tag_v2.get(262) == 0


def corners(path):
    """World coordinates of the corners, by SimpleITK; of a NIfTI that it refuses by nibabel."""
    with contextlib.suppress(RuntimeError, ImportError):
        import SimpleITK

        image = SimpleITK.ReadImage(str(path))
        tail = (0,) * (image.GetDimension() - 3)
        ends = corner_indexes(image.GetSize()[:3]).tolist()
        return np.array([image.TransformIndexToPhysicalPoint((*e, *tail)) for e in ends])[:, :3]
    image = nibabel.load(path)
    return nibabel.affines.apply_affine(image.affine, corner_indexes(image.shape[:3]))


def corner_indexes(shape):
    return np.array(np.meshgrid(*((0, n - 1) for n in shape), indexing="ij")).reshape(3, -1).T


def wrong_prepared(out, item, text, _):
    """What is wrong with the case file of an input, or None."""
    with h5py.File(next(out.glob("*.h5"))) as file:
        image, spacing, unit = file["image"][()], file.attrs["spacing"], str(file.attrs["unit"])
        affine = file.attrs.get("affine")
    if not np.array_equal(image.squeeze(), item.voxels.squeeze()):
        return f"other voxels, {image.shape} {image.dtype}"
    if item.spacing is None and not item.flipped and "spacing" not in text:
        return "no word about a spacing that the file has not"
    wanted = np.multiply(item.spacing or spacing, METRES[item.unit if item.spacing else unit])
    if not np.allclose(np.multiply(spacing, METRES[unit]), wanted, rtol=1e-3, atol=0):
        return f"spacing {spacing.tolist()} {unit!r}, not {item.spacing} {item.unit!r}"
    if item.affine is not None and not item.flipped and not np.allclose(affine, item.affine):
        return "another affine"


def read_mask(path):
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return file["segmentation"][()]
    if path.suffix in (".tif", ".tiff"):
        return tifffile.imread(path)
    if path.suffix in (".nrrd", ".mha"):
        import SimpleITK

        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    return np.asanyarray(nibabel.load(path).dataobj).T


def wrong_predicted(out, item, _, ckpt):
    """What is wrong with the prediction of an input, or None."""
    (path,), clean = out.iterdir(), Path(tempfile.mkdtemp(dir=out.parent))
    mask = read_mask(path)
    with h5py.File(clean / "scan.h5", "w") as file:
        file["image"] = item.voxels.reshape(mask.shape)
    if call(infer, "--ckpt", ckpt, "--input", clean, "--output", clean / "out")[0] != 0:
        return "a prediction of voxels that are refused in a plain file"
    if not np.array_equal(mask, read_mask(clean / "out" / "scan.h5")):
        return "another prediction than that of the same voxels in a plain file"
    if item.affine is not None and not np.allclose(corners(path), corners(item.path), atol=1e-3):
        return "a prediction in another place"


def wrong_score(out, item, *_):
    """What is wrong with the score of an input, or None."""
    with open(out / "scores.csv", newline="", encoding="utf-8") as file:
        got = float(next(csv.DictReader(file))["dice"])
    mask, truth = item.voxels.squeeze(), wavy()
    if mask.shape != truth.shape or not set(np.unique(mask)) <= {0, 1, 254, 255}:
        return f"a score of the values {np.unique(mask)[:5]}, shape {mask.shape}"
    wanted = 2 * np.sum((mask > 0) & (truth > 0)) / (np.sum(mask > 0) + truth.sum())
    return None if abs(got - wanted) < 1e-5 else f"Dice {got}, not {wanted:.6f}"


# ---------------------------------------------------------------------------- scripts


def call(script, *arguments):
    """(exit status, stdout, stderr) of a script's main; an exception is a status of its own."""
    texts = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace") for _ in "oe"]
    with contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
        try:
            status = script.main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            status = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return status, *(text.seek(0) or text.read() for text in texts)


def run(script, item, folder, ckpt):
    """("exit 0" or "exit 2", "") where all is as it must be; else ("failure", what was seen)."""
    out, inputs, truth = folder / "out", item.path.parent, folder / "truth.h5"
    names = [path.name.encode("utf-8", "backslashreplace").decode() for path in inputs.iterdir()]
    if script == "prepare":
        check, arguments = wrong_prepared, ("--images", inputs, "--out", out, "--workers", 1)
    elif script == "infer":
        check, arguments = wrong_predicted, ("--ckpt", ckpt, "--input", inputs, "--output", out)
    else:
        with h5py.File(truth, "w") as file:
            file["label"] = wavy()
        scores = ("--scores", "dice", "--jobs", 1, "--out", out / "scores.csv")
        check, arguments = wrong_score, ("--pred", inputs, "--truth", truth, *scores)
    status, text, errors = call(SCRIPTS[script], *arguments)
    left, wrong = [path.name for path in out.rglob("*") if path.is_file()], None
    if status == 0:
        wrong = check(out, item, text, ckpt)
        if wrong and item.flipped:
            item.voxels, item.spacing = independent(item)
            wrong = check(out, item, text, ckpt)
        silent = item.accept == REFUSE or (item.accept == NOTED and "note: " not in text)
        wrong = "exit 0, in silence" if silent else wrong
    elif status != 2:
        wrong = str(status)
    elif not any(name in errors or f"case {name.split('.')[0]}" in errors for name in names):
        wrong = f"exit 2 without the name: {errors}"
    elif item.accept == READ:
        wrong = f"refused: {errors}"
    if partial := [name for name in left if status != 0 or name.startswith(".")]:
        wrong = f"{partial} left in the output"
    return ("failure", wrong) if wrong else (f"exit {status}", "")


def make_checkpoint(folder):
    """That of two training steps on a phantom."""
    size = ("--cases", 2, "--shape", 16, 32, 32, "--no-skeletons", "--workers", 1)
    call(prepare, "--phantom", "scroll", *size, "--out", folder / "data")
    (folder / "tiny.yaml").write_text(
        f"run: {{folder: {folder}/runs, threads: 1, device: cpu}}\n"
        f"data: {{root: {folder}/data, validation: [scroll_001]}}\n"
        "sampling: {patch: [8, 16, 16]}\nmodel: {base: 4, multipliers: [1, 2], blocks: 1}\n"
        "training: {max_epochs: 1, train_iterations_per_epoch: 2, workers: 0}\n"
        "validation: {untrained: false}\nmonitor: {tensorboard: false, picture: false}\n"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train.cli([str(folder / "tiny.yaml")])
    return folder / "runs" / "last.pt"


def run_numbered(number, seed, scripts, root, ckpt):
    """(script, format, fault, outcome, what was seen) of an input; outcome None: there is none."""
    order = list(combinations())
    random.Random(seed).shuffle(order)
    kind, fault = order[number % len(order)]
    chance = random.Random(f"{seed} {number}")
    script = chance.choice(scripts)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        item = make(Path(folder, "in"), kind, fault, script == "evaluate", chance)
        try:
            outcome, seen = run(script, item, Path(folder), ckpt) if item else (None, "")
        except Exception as error:
            outcome, seen = "failure", f"unreadable result: {type(error).__name__}: {error}"
        seen = " ".join(seen.replace(folder, "").split())[:200]
    return script, kind, fault, outcome, seen.encode("utf-8", "backslashreplace").decode()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--script", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these inputs alone")
    options = parser.parse_args(argv)
    counts, failures, number = Counter(), Counter(), -1
    with tempfile.TemporaryDirectory() as root:
        ckpt, waiting = make_checkpoint(Path(root)), list(options.only or ())
        while waiting if options.only else sum(counts.values()) < options.count:
            number = waiting.pop(0) if waiting else number + 1
            script, kind, fault, outcome, seen = run_numbered(
                number, options.seed, options.script, root, ckpt
            )
            counts.update([(script, outcome)] if outcome else [])
            if outcome == "failure":
                failures[fault] += 1
                print(f"--only {number}: {script}, {kind}, {fault}: {seen}", flush=True)
    table = Table("script", "inputs", "exit 0, right", "exit 2, named", "failures")
    for script in options.script:
        row = [counts[script, outcome] for outcome in ("exit 0", "exit 2", "failure")]
        table.add_row(script, *map(str, (sum(row), *row)))
    Console(width=100).print(table)
    print(*(f"{count} failures of: {fault}" for fault, count in failures.most_common()), sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
