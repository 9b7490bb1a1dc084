"""What a run on a GPU does that one on a CPU does not."""

import os
from types import SimpleNamespace

import pytest
import torch

import train
from benchmarks import kills
from runtime import cuda
from tests.test_train import EVERY_TERM, root, settings, weights_of

__all__ = ["root"]  # a fixture
CPU, GPU = torch.device("cpu"), torch.device("cuda")


# ---------------------------------------------------------------------------- deterministic


@pytest.fixture
def switches(monkeypatch):
    """torch's switches as they were, and stand-ins for those that take time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    state = SimpleNamespace(on=False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: state.on)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: setattr(state, "on", on))
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield state
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_on_a_gpu_all_operations_are_asked_to_repeat_and_those_of_cublas_too(switches):
    cuda.set_deterministic(True, GPU)
    assert switches.on and torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    cuda.set_deterministic(False, GPU)  # another run of the process
    assert not switches.on and not torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.benchmark


def test_a_cpu_repeats_without_being_asked(switches):
    cuda.set_deterministic(True, CPU)
    assert not switches.on and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda_a_deterministic_run_repeats_and_resumes_bit_for_bit(root, tmp_path, precision):
    changes = ["run.device=cuda", "run.deterministic=true", f"training.precision={precision}"]
    changes += [*EVERY_TERM, "loss.soft_dice.batch=true", "augment.elastic=0.5"]
    changes += ["training.max_epochs=2", "validation.background=false"]
    try:
        for name in ("straight", "again"):
            assert train.main(settings(root, tmp_path / name, *changes)) == 0
        stopped = settings(root, tmp_path / "resumed", *changes, "training.max_steps=4")
        assert train.main(stopped) == 0
        torch.rand(7, device="cuda")  # whatever else draws numbers must not matter
        resumed = settings(root, tmp_path / "resumed", *changes)
        assert train.main(resumed, resume=True) == 0
    finally:
        cuda.set_deterministic(False, GPU)
    straight, again, resumed = (
        tmp_path / name / "runs" / "r" for name in ("straight", "again", "resumed")
    )
    assert kills.differences(straight, again) == []
    assert kills.differences(straight, resumed) == []


# ---------------------------------------------------------------------------- CPU and GPU


def test_a_run_on_the_cpu_opens_no_cuda_context_where_there_is_a_gpu(root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
        monkeypatch.setattr(module, "_lazy_init", lambda: pytest.fail("a context"), raising=False)
    asked = []
    monkeypatch.setattr(cuda, "set_deterministic", lambda *arguments: asked.append(arguments))
    changes = ["run.deterministic=true", "training.max_steps=2", "validation.untrained=false"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    assert train.main(settings(root, tmp_path, *changes), resume=True) == 0
    assert asked == [(True, CPU)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_run_goes_on_from_a_cpu_and_the_other_way_round(root, tmp_path):
    for number, device in enumerate(("cpu", "cuda", "cpu"), 1):
        changes = [f"run.device={device}", f"training.max_steps={2 * number}"]
        assert train.main(settings(root, tmp_path, *changes), resume=number > 1) == 0
    loop = weights_of(tmp_path / "runs" / "r")["loop"]
    assert loop["step"] == 6 and not loop["skipped"]["cases"]


# ---------------------------------------------------------------------------- notes


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92100)


def test_what_tf32_does_is_said_of_fp32_on_a_gpu_that_has_it(ampere, monkeypatch):
    (line,) = cuda.notes(GPU, "fp32")
    assert "in fp32 convolutions round what they multiply to TF32" in line
    assert cuda.notes(GPU, "bf16") == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda.notes(GPU, "fp32") == []


def test_a_run_on_a_gpu_names_a_release_with_faults_and_one_on_a_cpu_none(ampere, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    (line,) = cuda.notes(GPU, "bf16")
    assert line.startswith("torch 2.9.1+cu128 with cuDNN 9.10.2: 3D convolutions may be several")
    assert "nvidia-cudnn-cu12>=9.15" in line
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: pytest.fail("asked"))
    assert cuda.notes(CPU, "bf16") == cuda.notes(CPU, "fp32") == []


def test_the_notes_are_printed_when_a_run_begins(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cuda, "notes", lambda device, precision: [f"note: {device} {precision}"])
    assert train.main(settings(root, tmp_path, "training.max_steps=0")) == 0
    assert "note: cpu fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "torch_version, cudnn, precision, text",
    [
        ("2.8.0+cu128", 91002, "bf16", "may be wrong"),
        ("2.8.0", 90701, "bf16", None),
        ("2.9.0+cu128", 91600, "fp16", "several times slower"),  # it does not look for the newer
        ("2.9.1+cu130", 91400, "fp16", "install cuDNN 9.15"),
        ("2.9.1+cu130", 91500, "bf16", None),
        ("2.13.0", 91002, "bf16", "install cuDNN 9.15"),
        ("2.10.0.dev20251101+cu130", 91501, "bf16", None),
        ("2.9.1", 91501, "fp32", "TF32 may be wrong"),
        ("2.9.1", 91002, "fp32", "TF32 may be wrong"),
        ("2.9.1", 91600, "fp32", None),
        ("2.9.1", None, "bf16", None),
        ("2.9.0+rocm6.4", 3_004_000, "bf16", None),  # the version of another library
    ],
)
def test_known_faults_are_those_of_the_release_at_hand(torch_version, cudnn, precision, text):
    lines = cuda.faults(torch_version, cudnn, precision)
    assert len(lines) == (text is not None) and all(text in line for line in lines)
