"""The check of a GPU, on a CPU; and the peers that it sets beside us."""

import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model
from benchmarks import gpu_verdicts, plain_network, plain_steps
from settings import Settings
from tests import processes

ROOT = Path(__file__).parents[1]
CHECK = ROOT / "benchmarks" / "gpu_check.py"
PATCH, SPACING = (8, 16, 16), (2.0, 1.0, 1.0)
SHAPE = {"base": 4, "multipliers": [1, 2, 2], "blocks": 1, "dropout": 0.15}


def make_plain():
    fit = model.fit(PATCH, SPACING, stages=3)
    return plain_network.PlainUNet(*fit, **SHAPE), fit


def test_the_plain_network_is_ours_parameter_by_parameter_and_gives_what_ours_gives():
    plain, (strides, kernels) = make_plain()
    settings = Settings().model.model_dump() | SHAPE
    ours = model.build_network(1, 1, strides=strides, kernels=kernels, settings=settings)
    plain.load_state_dict(ours.state_dict())
    image = torch.randn(2, 1, *PATCH)
    for network in (ours, plain):
        torch.manual_seed(0)  # the same dropout
        network.logits = network.train()(image)
    for a, b in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("peer", ["monai", "nnunet"])
def test_a_peers_step_learns(peer):
    torch.manual_seed(0)
    network = make_plain()[0].eval()  # without dropout
    if peer == "monai":
        pytest.importorskip("monai")
        step = plain_steps.monai_step(network)
    else:
        step = plain_steps.nnunet_step(network, torch.float16)
    image = torch.randn(2, 1, *PATCH)
    targets = [(image > 0.5).float(), (torch.nn.functional.max_pool3d(image, 2) > 0.5).float()]
    values = [step(image, targets) for _ in range(12)]
    assert values[-1] < 0.99 * values[0]


# ---------------------------------------------------------------------------- the check


def run_check(*words, before=""):
    code = f"import runpy, sys\n{before}\nsys.path.insert(0, {str(CHECK.parent)!r})\n"
    code += f"runpy.run_path({str(CHECK)!r}, run_name='__main__')"
    return processes.run(["-c", code, *words], env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_check_runs_on_a_cpu_and_writes_each_figure(tmp_path):
    words = ["--small", "--device", "cpu", "--out", tmp_path]
    done = run_check(*words, "--sections", "ladder", "step", "inference")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results["ladder"]["the same step twice"] == 0
    assert results["step"][gpu_verdicts.ALL]["s"] > 0
    assert results["step"]["nnU-Net-like step, fp16"]["s"] > 0
    assert results["verdicts"]["step: fastest peer / ours of all terms"]["value"] > 0
    assert {name.split(":")[0] for name in results["verdicts"]} == {"ladder", "step", "inference"}


def test_packages_that_are_missing_are_named_with_their_versions_before_anything_else():
    done = run_check(before="sys.modules['cc3d'] = sys.modules['monai'] = None")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("not here: connected-components-3d==")
    assert "monai==" in done.stderr


def test_a_section_that_takes_too_long_ends_and_what_it_has_noted_stays(monkeypatch):
    monkeypatch.syspath_prepend(CHECK.parent)
    import gpu_check

    before = signal.signal(signal.SIGALRM, gpu_check.too_late)
    notes = {}
    check = SimpleNamespace(end=math.inf, begin=lambda most: None, seconds_left=lambda: 0.05)
    check.note = lambda section, name, value: notes.update({name: value})

    def section(check):
        check.note("a", "figure", 1)
        while True:
            with contextlib.suppress(Exception):
                time.sleep(10)

    assert gpu_check.run_section(check, "a", section, 1)
    signal.signal(signal.SIGALRM, before)
    assert notes["figure"] == 1 and notes["cut short"] == "after 0 s"


def test_each_figure_is_held_against_what_is_asked_of_it():
    steps = {gpu_verdicts.ALL: {"s": 0.09, "GB": 15.0}, gpu_verdicts.PLAIN: {"s": 0.08, "GB": 14.0}}
    steps |= {"MONAI's step, bf16": "not measured", "nnU-Net-like step, fp16": {"s": 0.10}}
    steps |= {"nnU-Net-like step, fp16: kernels": {"ms": 90.0}, "seconds": 30.0}
    verdicts = dict(gpu_verdicts.judge({"step": steps}, ["step"], small=False))
    assert {name: row["verdict"] for name, row in verdicts.items()} == {
        "step: seconds, all terms": "met",
        "step: fastest peer / ours of all terms": "NOT MET",
        "step: time of all terms / of BCE + Dice": "NOT MET",
        "step: memory of all terms / of BCE + Dice": "met",
        "step: GB, all terms": "NOT MET",
        "step: GB, recomputing": "not measured",
    }
    assert verdicts["step: fastest peer / ours of all terms"]["value"] == pytest.approx(10 / 9)


def test_the_ladder_counts_only_steps_with_the_right_gradient():
    rows = {"16 GB": [1e-3, [], ""], "8 GB": [2e-3, [], ""], "4 GB": [0.5, [], ""]}
    rows["2.5 GB"] = ["cannot go on", [], ""]
    assert gpu_verdicts.ladder_end({"ladder": rows}) == 8
