"""docs/notebook.ipynb, cell by cell, on a tiny run in the place of the quickstart."""

import base64
import json
import shutil
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

import infer
import prepare
import train
from runtime import config
from runtime.folder import ROOT
from volumes import files

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
TINY = {
    "data": {"root": "data/quickstart", "train": ["scroll_000"], "validation": ["scroll_001"]},
    "sampling": {"patch": [16, 16, 16]},
    "model": {"base": 2, "multipliers": [1, 2]},
    "training": {"max_epochs": 1, "train_iterations_per_epoch": 2, "workers": 0},
    "monitor": {"tensorboard": False, "picture": False},
    "validation": {"untrained": False},
    "run": {"threads": 1, "device": "cpu"},
}


def cells(kind):
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like the project's after `make quickstart`, but for its size."""
    monkeypatch.chdir(tmp_path)
    prepare.main(["--phantom", "scroll", "--cases", "2", "--shape", "16", "24", "24",
                  "--no-skeletons", "--out", "data/quickstart"])  # fmt: skip
    cases = tmp_path / "data" / "quickstart"
    shutil.copy(cases / "scroll_001.h5", cases / "scroll_008.h5")
    (tmp_path / "configs").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(TINY))
    assert train.main(config.load("configs/quickstart.yaml")) == 0
    case = "data/quickstart/scroll_008.h5"
    assert infer.main(["--ckpt", "runs/best.pt", "--input", case, "--output", "out"]) == 0
    monkeypatch.chdir(tmp_path / "docs")
    return tmp_path


def test_the_notebook_runs_and_its_mask_is_that_of_infer_py(folder, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf().axes))
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {}
    for cell in cells("code"):
        exec("".join(cell["source"]), namespace)
    mask = files.read_label(folder / "out" / "scroll_008.nii.gz").array
    np.testing.assert_array_equal(namespace["mask"], mask)
    [axes] = figures
    assert [axis.get_title() for axis in axes][:3] == ["image", "probabilities", "mask"]
    said = capsys.readouterr().out
    assert "surface_dice" in said and "step 11: soft Dice loss" in said
    plt.close("all")


def test_the_notebook_has_its_outputs_and_a_picture():
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    said = "".join(line for output in outputs for line in output.get("text", ()))
    assert "surface_dice" in said and "step 11: soft Dice loss" in said and "/" not in said
    [picture] = [o["data"]["image/png"] for o in outputs if "data" in o]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert NOTEBOOK.stat().st_size < 300_000
