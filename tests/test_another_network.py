"""The networks of docs/python.md in the place of ours, and the term of docs/losses.md: copies of
the project, changed like that."""

import importlib.util
import re
import shutil

import pytest
import torch

import prepare
from runtime import checkpoint
from runtime.folder import ROOMS, ROOT
from runtime.members import build_network, read_members
from tests import processes
from volumes import files

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EDITS = {text.count("DynUNet") > 0: text for text in re.findall(r"```python\n(.*?)```", PAGE, re.S)
         if "def build_network" in text}  # fmt: skip
SMALL, DYN_UNET = EDITS[False], EDITS[True]
RUN = """
import runpy, sys
folder, script, *words = sys.argv[1:]
sys.path.insert(0, folder)
sys.argv = [script, *words]
runpy.run_path(f"{folder}/{script}", run_name="__main__")
"""
TINY = [
    *("data.root=d", "data.validation=[scroll_001]", "sampling.patch=[16,16,16]", "run.threads=1"),
    *("training.max_epochs=1", "training.train_iterations_per_epoch=4", "training.workers=0"),
    *("monitor.tensorboard=false", "monitor.picture=false", "validation.untrained=false"),
    *("training.precision=fp32", "model.base=4", "optim.ema=0.9", "validation.background=false"),
]


@pytest.fixture
def changed(tmp_path):
    """changed(edit): the folder of a copy of the project with another `build_network`, if any."""

    def change(edit=None):
        copy = tmp_path / "project"
        for room in ROOMS:
            for path in (ROOT / room).glob("*.py"):
                target = copy / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
        if edit is None:
            return copy
        path = copy / "model.py"
        source, (old,) = path.read_text(), re.findall(
            r"^def build_network.*?^(?=def )", path.read_text(), re.S | re.M
        )  # fmt: skip
        path.write_text(source.replace(old, edit + "\n\n"))
        return copy

    return change


def script(copy, *words, cwd, status=0):
    done = processes.run(["-c", RUN, copy, *words], cwd=cwd)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def trained(copy, cwd, *settings):
    """The state of a run of 4 steps that was stopped after 2 and resumed."""
    prepare.main(["--phantom", "scroll", "--cases", "2", "--shape", "16", "24", "24",
                  "--no-skeletons", "--out", str(cwd / "d")])  # fmt: skip
    (cwd / "c.yaml").write_text("{}\n")
    script(copy, "train.py", "c.yaml", *TINY, *settings, "training.max_steps=2", cwd=cwd)
    out = script(copy, "train.py", "--resume", "runs/c", "training.max_steps=4", cwd=cwd)
    assert "last.pt at step 2" in out and "done: step 4" in out
    # The code that the run has kept is enough.
    source = cwd / "runs" / "c" / "source"
    out = script(source, "infer.py", "--ckpt", "runs/best.pt", "--output", "out", cwd=cwd)
    assert "averaged (EMA) weights" in out
    assert files.read_label(cwd / "out" / "scroll_001.nii.gz").array.shape == (16, 24, 24)
    return checkpoint.load(cwd / "runs" / "last.pt")


def test_a_network_of_ones_own_trains_stops_resumes_and_predicts(changed, tmp_path):
    copy = changed(SMALL)
    state = trained(copy, tmp_path, "model.multipliers=[1,2]")
    assert next(iter(state["model"])) == "layers.0.weight"
    assert state["ema"]["layers.1.num_batches_tracked"] == 4
    mean = "layers.1.running_mean"
    assert torch.equal(state["ema"][mean], state["model"][mean]) and state["ema"][mean].any()
    # The same steps without a stop, bit for bit.
    script(
        copy, "train.py", "c.yaml", *TINY, "model.multipliers=[1,2]", "run.name=whole", cwd=tmp_path
    )
    whole = checkpoint.load(tmp_path / "runs/whole/checkpoints/last.pt")
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, state["model"][name]), name
    with pytest.raises(ValueError, match="use the code in the run's source/ folder"):
        read_members([tmp_path / "runs" / "best.pt"])  # by our network


@pytest.mark.skipif(importlib.util.find_spec("monai") is None, reason="MONAI is not installed")
def test_dynunet_of_monai_trains_stops_resumes_and_predicts(changed, tmp_path):
    state = trained(changed(DYN_UNET), tmp_path, "model.multipliers=[1,2,4]")
    assert any(name.startswith("deep_supervision_heads") for name in state["model"])


def test_a_term_of_ones_own_trains_and_is_not_needed_to_predict(changed, tmp_path):
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    function, group = re.findall(r"```python\n(.*?)```", page, re.S)
    (name,), (setting,) = (re.findall(p, page) for p in (r"`(\"focal.*?)`", r"`(focal: F.*?)`"))
    copy = changed()
    for file, before, text in (
        ("losses.py", "LOSSES = {\n", f"{function}\n\nLOSSES = {{\n    {name}\n"),
        ("settings.py", "class Loss(Group):\n", f"{group}\n\nclass Loss(Group):\n    {setting}\n"),
    ):
        source = (copy / file).read_text(encoding="utf-8")
        assert source.count(before) == 1
        (copy / file).write_text(source.replace(before, text), encoding="utf-8")
    prepare.main(["--phantom", "scroll", "--cases", "2", "--shape", "16", "24", "24",
                  "--no-skeletons", "--out", str(tmp_path / "d")])  # fmt: skip
    (tmp_path / "c.yaml").write_text("loss: {focal: {weight: 0.5, gamma: 1.5}}\n")
    settings = *TINY, "model.multipliers=[1,2]", "training.max_steps=1"
    out = script(copy, "train.py", "c.yaml", *settings, cwd=tmp_path)
    assert "focal 0." in out and "done: step 1" in out
    (member,) = read_members([tmp_path / "runs" / "c"])  # a run folder, by our code
    assert member.path.endswith("runs/c/checkpoints/best.pt")


def test_settings_of_another_version_name_the_checkpoint_and_its_source():
    state = {"config": {"model": {"heads": 4}}, "data": {}}
    with pytest.raises(
        ValueError, match=r"a\.pt: expected settings .*model\.heads: no such .* source/"
    ):
        build_network(state, "a.pt")
