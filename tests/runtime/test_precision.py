from types import SimpleNamespace

import pytest
import torch

import train
from runtime import checkpoint
from runtime.precision import keep_precision, resolve_precision
from tests.test_train import root, settings  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture
def able(monkeypatch):
    """Sets whether the processor has instructions for bf16."""
    name = "_is_avx512_bf16_supported"
    return lambda value: monkeypatch.setattr(torch.cpu, name, lambda: value)


def test_auto_takes_bf16_on_a_processor_that_has_its_instructions_and_fp32_on_others(able):
    able(True)
    assert resolve_precision("auto", CPU) == ("bf16", "the processor has its instructions")
    able(False)
    assert resolve_precision("auto", CPU) == ("fp32", "the processor has none for bf16")


@pytest.mark.parametrize("has_them", [True, False])
def test_what_is_set_holds_on_a_cpu_save_fp16_which_it_has_not(able, has_them):
    able(has_them)
    chosen = [resolve_precision(name, CPU)[0] for name in ("fp32", "bf16", "fp16")]
    assert chosen == ["fp32", "bf16", "fp32"]


def plan_of(setting, precision, device=CPU):
    training = SimpleNamespace(precision=setting)
    plan = {"settings": SimpleNamespace(training=training), "device": device}
    return SimpleNamespace(precision=precision, precision_reason="", **plan)


@pytest.mark.parametrize(
    ("setting", "now", "saved", "kept"),
    [
        ("auto", "bf16", "fp32", "fp32"),
        ("auto", "bf16", None, "fp32"),  # of a version whose auto was fp32
        ("auto", "bf16", "bf16", "bf16"),
        ("auto", "fp32", "bf16", "fp32"),  # a processor without the instructions
        ("bf16", "bf16", "fp32", "bf16"),  # a setting wins
        ("fp32", "fp32", "bf16", "fp32"),
    ],
)
def test_a_resumed_run_keeps_its_precision_where_auto_would_choose_another(
    setting, now, saved, kept
):
    plan = plan_of(setting, now)
    notes = keep_precision(plan, saved)
    assert plan.precision == kept
    assert bool(notes) == (setting == "auto" and (saved or "fp32") != now)


def test_a_gpu_chooses_its_precision_anew_when_a_run_is_resumed():
    plan = plan_of("auto", "bf16", torch.device("cuda"))
    assert keep_precision(plan, "fp32") == [] and plan.precision == "bf16"


@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_a_run_of_auto_resumes_bit_for_bit_in_the_precision_that_it_began_with(
    root,  # noqa: F811
    tmp_path,
    able,
    began,
):
    changes = ["training.precision=auto", "training.max_epochs=2", "loss.surface_distance.weight=0"]
    weights = []
    for name, stops in (("straight", [6]), ("resumed", [3, 6])):
        able(began == "bf16")
        for stop in stops:
            own = [*changes, f"run.name={name}", f"training.max_steps={stop}"]
            assert train.main(settings(root, tmp_path, *own), resume=stop != stops[0]) == 0
            able(True)
        weights.append(checkpoint.load(tmp_path / "runs" / name / "checkpoints" / "last.pt"))
    assert all(saved["loop"]["precision"] == began for saved in weights)
    for a, b in zip(*(saved["model"].values() for saved in weights), strict=True):
        assert torch.equal(a, b)
