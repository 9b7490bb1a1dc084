"""The batches of training steps, fetched ahead: nothing is lost, made twice or mistaken."""

from types import SimpleNamespace

import pytest
import torch

from runtime import step_batches, timer
from runtime.signals import Stopped

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch):
    """What was made on the device, in its order; an error in `made.errors` is raised instead."""
    made = SimpleNamespace(batches=[], errors=[])

    def augment_batch(plan, samples):
        if made.errors:
            raise made.errors.pop()
        made.batches.append(samples)
        return f"tensors of {samples[0]}"

    monkeypatch.setattr(step_batches.build, "augment_batch", augment_batch)
    return made


def batches_of(source, accumulate=1):
    training = SimpleNamespace(accumulate=accumulate)
    plan = SimpleNamespace(device=CPU, settings=SimpleNamespace(training=training))
    return step_batches.StepBatches(plan, source, timer.StepTimer(CPU))


def test_each_step_gets_its_own_samples_though_the_next_are_there_already(made):
    batches = batches_of(iter([["a"], ["b"], ["c"], ["d"]]), accumulate=2)
    steps = []
    for _ in range(2):
        samples_of_step = batches.take()
        tensors = [batches.on_device(samples) for samples in samples_of_step]
        batches.fetch_next()
        steps.append((samples_of_step, tensors))
    assert steps == [
        ([["a"], ["b"]], ["tensors of a", "tensors of b"]),
        ([["c"], ["d"]], ["tensors of c", "tensors of d"]),
    ]
    assert made.batches == [["a"], ["b"], ["c"], ["d"]]  # each once


def test_a_step_that_begins_again_gets_the_same_batches(made):
    batches = batches_of(iter([["a"], ["b"]]), accumulate=2)
    first, second = batches.take()
    for _ in range(2):
        assert batches.on_device(first) == "tensors of a"
        assert batches.on_device(second) == "tensors of b"


@pytest.mark.parametrize("error", [Stopped("signal"), RuntimeError("worker 0")])
def test_what_keeps_the_next_batch_away_is_raised_when_the_next_step_asks(made, error):
    def source():
        yield ["a"]
        raise error

    batches = batches_of(source())
    batches.take()
    batches.fetch_next()
    with pytest.raises(type(error), match=str(error)):
        batches.take()


def test_a_batch_that_found_no_memory_is_made_when_it_is_needed(made):
    batches = batches_of(iter([["a"], ["b"]]))
    batches.take()
    made.errors.append(torch.OutOfMemoryError("CUDA out of memory"))
    batches.fetch_next()
    (samples,) = batches.take()
    assert made.batches == [] and batches.on_device(samples) == "tensors of b"


def test_after_the_last_step_nothing_is_made(made):
    batches = batches_of(iter([["a"]]))
    batches.on_device(batches.take()[0])
    batches.fetch_next()
    assert made.batches == [["a"]]
