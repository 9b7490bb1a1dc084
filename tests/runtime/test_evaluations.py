"""Evaluations of a run that was killed while one was under way."""

from types import SimpleNamespace

import pytest
import torch

from runtime import checkpoint, config, distributed
from runtime.evaluations import Evaluations
from tests.runtime.test_saver import CONSTANT
from tests.runtime.test_validation import network


@pytest.fixture
def files(tmp_path):
    """write(name, step) -> path of a state whose averaged weights are the step."""

    (tmp_path / "checkpoints").mkdir()

    def write(name, step):
        state = dict.fromkeys((*checkpoint.CHANGING, *CONSTANT))
        ema = {key: torch.full_like(value, step) for key, value in network().state_dict().items()}
        path = tmp_path / "checkpoints" / name
        checkpoint.save(state | {"ema": ema, "loop": {"step": step}}, path)
        return path

    return write


class Started:
    """A validator that notes what it is started with."""

    def start(self, net, step, _):
        self.step = step
        self.weights = {value for p in net.parameters() for value in p.flatten().tolist()}


def again(tmp_path, step, pending, resumed_from):
    """(evaluations, validator, reports) of a run that is resumed at a step."""
    validator, reports, net = Started(), [], network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(step)
    run = SimpleNamespace(
        step=step,
        settings=config.build({}),
        folder=tmp_path,
        group=distributed.Group(),
        means=SimpleNamespace(foreground=None),
        report_of_all=lambda kind, text: reports.append((kind, text)),
    )
    evaluations = Evaluations(run)
    evaluations.standing.pending = pending
    evaluations.begin(validator, net, resumed_from)
    return evaluations, validator, reports


def test_the_evaluation_of_an_earlier_step_is_of_the_state_that_was_kept_for_it(files, tmp_path):
    candidate = files("candidate.pt", 3)
    evaluations, validator, reports = again(tmp_path, 5, 3, files("last.pt", 5))
    assert (validator.step, validator.weights, reports) == (3, {3.0}, [])
    assert checkpoint.load(candidate)["loop"]["step"] == 3 and evaluations.standing.pending == 3


@pytest.mark.parametrize("there", ["nothing", "that of an earlier step", "damaged"])
def test_a_run_killed_before_its_state_was_a_candidate_keeps_that_state(files, tmp_path, there):
    candidate = tmp_path / "checkpoints" / "candidate.pt"
    if there == "that of an earlier step":
        files("candidate.pt", 3)
    elif there == "damaged":
        candidate.write_bytes(b"half")
    last = files("last.pt", 6)
    _, validator, reports = again(tmp_path, 6, 6, last)
    assert (validator.step, validator.weights, reports) == (6, {6.0}, [])
    assert checkpoint.load(candidate)["loop"]["step"] == 6


@pytest.mark.parametrize("there", ["nothing", "that of another step", "damaged"])
def test_an_evaluation_whose_state_is_gone_is_reported_and_not_started(files, tmp_path, there):
    candidate = tmp_path / "checkpoints" / "candidate.pt"
    if there == "that of another step":
        files("candidate.pt", 4)
    elif there == "damaged":
        candidate.write_bytes(b"half")
    evaluations, validator, ((kind, text),) = again(tmp_path, 5, 3, files("last.pt", 5))
    assert not hasattr(validator, "step") and evaluations.standing.pending is None
    assert kind == "evaluation lost" and "evaluation of step 3 is lost" in text
