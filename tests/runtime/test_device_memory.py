"""Which errors are of memory, and predictions that make do with less."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from runtime import device_memory
from runtime.device_memory import WindowFit, out_of_memory
from runtime.microbatch import nothing
from runtime.signals import CannotGoOn

GB = 10**9
# As torch, its allocators, cuBLAS and cuDNN say it.
TEXTS = {
    "torch": "CUDA out of memory. Tried to allocate 20.00 GiB",
    "driver": "CUDA error: out of memory",
    "find": "FIND was unable to find an engine to execute this computation",
    "get": "GET was unable to find an engine to execute this computation",
    "plans": "No valid execution plans built.",
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cudnn 8": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cudnn 9": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cpu": "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    "no cublas": "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "no cudnn": "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
}
NO_HANDLE = ["no cublas", "no cudnn"]


def memory_error(name):
    return (torch.OutOfMemoryError if name == "torch" else RuntimeError)(TEXTS[name])


@pytest.fixture
def card(monkeypatch):
    """A GPU in use, by stand-ins: free and total bytes, which a test may change."""
    card = SimpleNamespace(free=GB // 5, total=80 * GB)
    values = {
        "is_initialized": lambda: True,
        "mem_get_info": lambda device=None: (card.free, card.total),
        "get_device_properties": lambda device: SimpleNamespace(total_memory=card.total),
        "max_memory_reserved": lambda device: 7 * GB,
        "empty_cache": lambda: None,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return card


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", TEXTS)
def test_errors_of_memory_are_known_whoever_raises_them(card, name):
    assert out_of_memory(memory_error(name))


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), ValueError("out of memory"), MemoryError("no")]
)
def test_other_errors_are_not_of_memory(error):
    assert not out_of_memory(error)


@pytest.mark.parametrize("name", NO_HANDLE)
def test_a_library_that_was_not_initialized_lacked_memory_only_where_little_is_free(card, name):
    assert out_of_memory(memory_error(name))
    card.free = 2 * GB
    assert not out_of_memory(memory_error(name))


@pytest.mark.parametrize("name", NO_HANDLE)
def test_without_a_gpu_in_use_or_an_answer_from_it_no_memory_was_lacking(monkeypatch, name):
    assert not out_of_memory(memory_error(name))  # and none was asked, for torch here has no CUDA

    def silent():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", silent)
    assert not out_of_memory(memory_error(name))


def test_the_activations_of_a_failed_pass_are_gone_before_the_device_is_asked_for_its_memory():
    kept = []

    def fails():
        activation = torch.zeros(3)
        kept.append(weakref.ref(activation))
        raise memory_error("torch")

    try:
        fails()
    except RuntimeError as error:
        device_memory.free_memory(error, "cpu")
        assert kept[0]() is None  # while the error, which refers to the frame, is still there


# ---------------------------------------------------------------------------- predictions


def lowered(fit, times):
    """(windows, where the slab lies) at first and after each of so many errors."""
    states = [(fit.batch, fit.slab_device)]
    for _ in range(times):
        fit.lower(torch.OutOfMemoryError("CUDA out of memory"))
        states.append((fit.batch, fit.slab_device))
    return states


def test_windows_are_halved_and_then_the_results_lie_on_the_cpu():
    reports, device = [], torch.device("meta")  # as a device that is not the CPU
    fit = WindowFit((4, 5, 6), 6, device, {}, lambda kind, text, **f: reports.append(text))
    cpu = torch.device("cpu")
    assert lowered(fit, 3) == [(6, device), (3, device), (1, device), (1, cpu)]
    assert "3 windows at once" in reports[0] and "results on the CPU" in reports[2]
    assert "volume of 4x5x6" in reports[0]
    with pytest.raises(CannotGoOn, match=r"volume of 4x5x6 with one window.*inference.window"):
        fit.lower(torch.OutOfMemoryError("CUDA out of memory"))


def test_what_a_size_needed_is_where_it_and_larger_ones_begin_and_smaller_ones_do_not():
    known = {}
    lowered(WindowFit((4, 10, 10), 8, "meta", known, nothing), 1)
    lowered(WindowFit((9, 10, 10), 8, "meta", known, nothing), 3)
    assert known == {"4x10x10": [4, False, None], "9x10x10": [1, True, None]}
    begin = {
        shape: WindowFit(shape, 8, "meta", known, nothing)
        for shape in [(3, 10, 10), (10, 4, 10), (8, 10, 10), (30, 30, 30)]
    }
    assert [fit.batch for fit in begin.values()] == [8, 4, 4, 1]
    assert [fit.on_cpu for fit in begin.values()] == [False, False, False, True]


def test_fewer_windows_than_what_fitted_stay_as_they_are():
    fit = WindowFit((4, 4, 4), 1, "meta", {"2x2x2": [4, False]}, nothing)
    assert (fit.batch, fit.on_cpu) == (1, False)


def test_an_error_of_another_kind_in_a_prediction_is_raised_and_nothing_is_remembered():
    known = {}
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        WindowFit((4, 4, 4), 2, "meta", known, nothing).lower(RuntimeError("shapes differ"))
    assert known == {}


def test_the_last_error_of_a_prediction_is_shown_should_it_be_no_lack_of_memory():
    fit = WindowFit((4, 4, 4), 1, "cpu", {"4x4x4": [1, True]}, nothing)
    with pytest.raises(CannotGoOn, match=r"the error was: FIND was unable to find an engine"):
        fit.lower(memory_error("find"))


def test_what_a_gpu_had_no_memory_for_is_tried_again_on_one_with_more(card):
    known, gpu = {"2x2x2": [3, False]}, torch.device("cuda")  # of an older version
    lowered(WindowFit((4, 4, 4), 8, gpu, known, nothing), 1)
    assert known["4x4x4"] == [1, False, 80 * GB]
    for total, windows in ((40 * GB, 1), (80 * GB, 1), (81 * GB, 3)):
        card.total = total
        assert WindowFit((4, 4, 4), 8, gpu, known, nothing).batch == windows
    assert WindowFit((4, 4, 4), 8, "cpu", known, nothing).batch == 1
