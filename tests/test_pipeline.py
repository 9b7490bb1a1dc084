"""The scripts one after another, as a person runs them, on phantoms and on real volumes."""

import csv
import json
import os
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests import processes

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("LAMINA_SHARED", ROOT.parent / "shared"))
TINY = [
    "run.threads=1",
    "model.base=4",
    "model.multipliers=[1,2]",
    "sampling.patch=[16,32,32]",
    "training.workers=0",
    "monitor.tensorboard=false",
    "monitor.picture=false",
]


def script(name, *arguments, cwd, status=0):
    done = processes.run([ROOT / name, *arguments], cwd=cwd)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def means(path):
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["summary"] == "mean"]
    return {row["method"]: {k: float(row[k]) for k in ("dice", "surface_dice")} for row in rows}


def test_a_trained_network_beats_the_untrained_one_and_otsu_on_an_unseen_phantom(tmp_path):
    shape = ("--shape", 32, 64, 64)
    script("prepare.py", "--phantom", "scroll", "--cases", 5, *shape, "--out", "d", cwd=tmp_path)
    (tmp_path / "c.yaml").write_text(
        "data: {root: d, validation: [scroll_003], test: [scroll_004]}\n"
        "optim: {lr: 1e-2}\nvalidation: {untrained: false}\n"
        "training: {max_epochs: 1, train_iterations_per_epoch: 40}\n"
    )
    untrained = ("run.name=u", "training.max_steps=0")
    script("train.py", "c.yaml", *TINY, *untrained, cwd=tmp_path)
    script("infer.py", "--ckpt", "runs/last.pt", "--output", "u", cwd=tmp_path)
    script("train.py", "c.yaml", *TINY, cwd=tmp_path)
    submission = ("--submission", "s.zip")
    script("infer.py", "--ckpt", "runs/last.pt", *submission, cwd=tmp_path)  # the test case
    assert {*os.listdir(tmp_path / "runs/c/predictions")} == {
        *("predictions.jsonl", "scroll_004.nii.gz")
    }
    assert zipfile.ZipFile(tmp_path / "s.zip").namelist() == ["scroll_004.tif"]
    scored = ("--truth", "d", "--otsu", "d", "--overlays", "o", "--out", "s.csv")
    both = ("prediction=runs/c", "untrained=u")
    script("evaluate.py", "--pred", *both, *scored, cwd=tmp_path)
    assert sorted(os.listdir(tmp_path / "o")) == ["prediction.png", "untrained.png"]
    scores = means(tmp_path / "s.csv")
    best_other = max(scores["untrained"]["dice"], scores["otsu"]["dice"])
    assert scores["prediction"]["dice"] > max(0.5, best_other + 0.1)
    log = [json.loads(line) for line in (tmp_path / "runs/c/log.jsonl").read_text().splitlines()]
    assert log[-1]["event"] == "end" and log[-1]["step"] == 40


def test_the_full_scroll_run_without_data_says_where_they_come_from(tmp_path):
    done = script("train.py", ROOT / "configs" / "exp001_full.yaml", cwd=tmp_path, status=2)
    assert "kaggle.com" in done.stderr and "prepare.py" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and os.listdir(tmp_path) == []


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "x.pt").write_text("no")
    done = script("infer.py", "--ckpt", "x.pt", cwd=tmp_path, status=2)
    assert "x.pt" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"no real volumes in {SHARED}")
def test_real_vessels_train_and_the_prediction_lies_on_the_image(tmp_path):
    folder = SHARED / "data" / "vesselNN_nifti"
    script("prepare.py", "--images", folder, "--labels", folder, "--out", "d", cwd=tmp_path)
    few = ("data.root=d", "data.validation=[]", "training.max_steps=2", "inference.overlap=0.0")
    window = ("sampling.patch=[8,32,32]", "inference.window=[8,128,128]")
    script("train.py", ROOT / "configs" / "vessels.yaml", *TINY, *few, *window, cwd=tmp_path)
    script("infer.py", "--ckpt", "runs/last.pt", cwd=tmp_path)
    written = tmp_path / "runs/vessels/predictions/poon2015_plaqueVessels.nii.gz"
    prediction = nibabel.load(written)
    image = nibabel.load(folder / "poon2015_plaqueVessels_img.nii.gz")
    assert np.array_equal(prediction.affine, image.affine)
    assert prediction.shape == image.shape
    assert prediction.header.get_xyzt_units()[0] == "micron"
    assert set(np.unique(prediction.dataobj)) <= {0, 1}
