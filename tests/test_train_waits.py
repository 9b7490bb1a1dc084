"""The order of a training step: the device has work while the host waits for it, once in a step.

A run on a CPU stands for one on a GPU: its calls come in the same order.
"""

import functools
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from patches import augment, transfer
from runtime import microbatch, nonfinite, run, timer
from tests.test_training_step import make_root, make_settings

PREPARE = ["fetch", "copy", "resample"]
EVERY_TERM = [f"loss.{name}.weight=0.1" for name in ("cldice", "morph_skeleton", "skeleton_recall")]
EVERY_TERM += ["loss.surface_distance={weight: 0.1, tolerance: 2}"]
EVERY_TERM += ["loss.toploss={weight: 0.1, window: [8, 8, 8]}"]  # a thread of its own waits


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """Names of the calls of a run, in their order."""
    calls = []
    for name, (owner, function) in {
        "fetch": (data.Batches, "__next__"),
        "copy": (transfer, "to_device"),
        "resample": (augment, "augment_batch"),
        "forward": (microbatch.MicroBatch, "forward"),
        "backward": (microbatch.MicroBatch, "backward"),
        "unscale": (torch.amp.GradScaler, "unscale_"),
        "clip": (torch.nn.utils, "clip_grad_norm_"),
        "check": (nonfinite.Check, "__init__"),
        "wait": (nonfinite.Check, "names"),
        "step": (torch.amp.GradScaler, "step"),
    }.items():
        original = getattr(owner, function)

        def called(*arguments, name=name, original=original, **named):
            result = original(*arguments, **named)
            calls.append(name)
            return result

        monkeypatch.setattr(owner, function, called)
    return calls


def test_the_next_batch_is_made_after_backward_and_before_the_step_waits_for_the_device(
    root, calls
):
    assert train.main(make_settings(root)) == 0  # 3 steps
    computed = ["forward", "backward", "unscale", "clip", "check"]
    middle = [*computed, *PREPARE, "wait", "step"]
    assert calls == [*PREPARE, *middle, *middle, *computed, "wait", "step"]


def test_of_accumulated_batches_the_first_is_made_in_the_step_before(root, calls):
    assert train.main(make_settings(root, "training.accumulate=2", "training.max_steps=2")) == 0
    both = ["forward", "backward", "copy", "resample", "forward", "backward"]
    computed = [*both, "unscale", "clip", "check"]
    fetched = ["fetch", *PREPARE]
    assert calls == [*fetched, *computed, *fetched, "wait", "step", *computed, "wait", "step"]


def test_a_step_that_begins_again_does_not_resample(root, calls, monkeypatch):
    loss, failing = train.composite_loss, [True]

    def fails_once(*arguments, **named):
        if failing and failing.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*arguments, **named)

    monkeypatch.setattr(train, "composite_loss", fails_once)
    settings = make_settings(root, "training.max_steps=1", "training.train_batch_size=2")
    assert train.main(settings) == 0
    assert calls[:6] == [*PREPARE, "forward", "forward", "backward"]


# ---------------------------------------------------------------------------- waits


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU, by name, while `counting` is true."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.counting, self.found = False, Counter()
        self.calls = _HostCalls(self)

    def see(self, name):
        if self.counting:
            self.found[name] += 1

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(
            i is not None and i.dtype == torch.bool for i in arguments[1]
        )
        if name in self.NAMES or by_mask:
            self.see(name)
        return function(*arguments, **(named or {}))


class _HostCalls(TorchFunctionMode):
    """Tells `Waits` of copies to and from the host, which on a CPU run no operation."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, arguments=(), named=None):
        name = getattr(function, "__name__", "")
        copies = name in ("tensor", "as_tensor") and not torch.is_tensor(arguments[0])
        copies |= name in ("tolist", "cpu", "numpy")
        if copies:
            self.waits.see(name)
        return function(*arguments, **(named or {}))


@pytest.fixture
def waits(monkeypatch):
    """`Waits` of the training steps after the first, without what reads data or the log."""
    waits, steps = Waits(), []

    def during(owner, name, counting):
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*arguments, **named):
            before, waits.counting = waits.counting, counting(waits.counting)
            try:
                return original(*arguments, **named)
            finally:
                waits.counting = before

        monkeypatch.setattr(owner, name, wrapped)

    start, log_step = timer.StepTimer.start, run.Run.log_step

    def begins(self):
        start(self)
        steps.append(0)
        waits.counting = len(steps) > 1  # tables are made in the first

    def ends(self, *arguments):
        waits.counting = False
        log_step(self, *arguments)

    monkeypatch.setattr(timer.StepTimer, "start", begins)
    monkeypatch.setattr(run.Run, "log_step", ends)
    during(data.Batches, "__next__", lambda now: False)  # on the host alone
    during(torch.optim.AdamW, "step", lambda now: False)  # on CUDA one kernel, its count there
    with waits, waits.calls:
        yield waits


@pytest.mark.parametrize("changes", [[], ["data.foreground=[slab,rim]"]], ids=["one", "classes"])
def test_a_step_waits_for_the_device_once(tmp_path, waits, changes):
    root = make_root(tmp_path, rim=bool(changes))
    everything = ["augment.elastic=1", "augment.noise=1", "augment.dropout=1", "augment.blur=1"]
    everything += ["training.train_batch_size=2", "training.accumulate=2", "model.dropout=0.1"]
    assert train.main(make_settings(root, *EVERY_TERM, *everything, *changes)) == 0
    assert waits.found == {"tolist": 2}  # of the steps after the first: the losses and the norm


def test_on_cuda_the_check_waits_for_its_own_copy_and_for_nothing_queued_later(monkeypatch):
    calls = []

    class OnDevice(torch.Tensor):
        is_cuda = True

        def to(self, device, non_blocking):
            calls.append(f"copy to {device}" + " at once" * (not non_blocking))
            return self.as_subclass(torch.Tensor)

    class Stream:
        def record_event(self):
            calls.append("event")
            return self

        def synchronize(self):
            calls.append("wait")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    norm = torch.tensor(torch.inf).as_subclass(OnDevice)
    check = nonfinite.Check([{"dice": torch.tensor(0.5)}], norm)
    assert calls == ["copy to cpu", "event"]
    assert check.names() == ["gradient"] and calls[2:] == ["wait"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_no_operation_of_a_step_waits_for_the_device(root, monkeypatch):
    start, log_step, steps = timer.StepTimer.start, run.Run.log_step, []

    def begins(self):
        start(self)
        steps.append(0)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")

    def ends(self, *arguments):
        torch.cuda.set_sync_debug_mode("default")
        log_step(self, *arguments)

    monkeypatch.setattr(timer.StepTimer, "start", begins)
    monkeypatch.setattr(run.Run, "log_step", ends)
    on_cuda = ["run.device=cuda", "augment.elastic=1", "augment.noise=1", "augment.dropout=1"]
    try:
        assert train.main(make_settings(root, *EVERY_TERM, *on_cuda)) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 3
