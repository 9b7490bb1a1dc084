"""Evaluations: prediction, the evaluator process, and what remains when something breaks."""

import contextlib
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from runtime import evaluator, signals, validation
from runtime.outputs import Outputs
from runtime.validation import Evaluation, Validator
from volumes import casefile

RESULT = {"scores": {"dice": 0.5}, "cases": {}, "steps": [], "threshold": 0.5, "unread": []}


def evaluate_ids(spec, predictions):
    """Stands for the evaluator; a prediction is the id of its case."""
    return {**RESULT, "cases": {case: {"dice": 0.5} for case in predictions}, "unread": []}


class Pool:
    """A pool of one process, without a process. futures: as it has handed them out."""

    def __init__(self):
        self.futures, self.process = [], SimpleNamespace(pid=77, exitcode=None)

    def submit(self, function, spec, predictions):
        self.futures.append(Future())
        return self.futures[-1]

    def shutdown(self):
        self.process.exitcode = -9  # a process's exit status is known when its pool is shut down


@pytest.fixture
def made(monkeypatch):
    """make(*case ids, ...) -> v: the validator, whose predictions are ids, and what it does."""

    def make(*cases, background=False, unreadable=()):
        pool, reports, polls, tried, said = Pool(), [], [], [], []

        @contextlib.contextmanager
        def worker_process(blocked_signals):
            yield pool, pool.process

        def predict(network, case, spec, *, with_slices, progress, **how):
            tried.append((case.id, network.training))
            if case.id in unreadable:
                raise casefile.Unreadable(f"case {case.id}: expected\na file")
            progress(1, 2)
            return case.id, {"of": case.id} if with_slices else None

        monkeypatch.setattr(validation.parallel, "worker_process", worker_process)
        monkeypatch.setattr(validation.evaluator, "evaluate", evaluate_ids)
        monkeypatch.setattr(data, "PAUSES", (0.0,))
        monkeypatch.setattr(validation, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(validation, "predict", predict)
        validator = Validator(
            [SimpleNamespace(id=case) for case in cases],
            None,
            background=background,
            report=lambda kind, text, **figures: reports.append((kind, text, figures)),
            poll=lambda: polls.append(1),
            progress=said.append,
        )
        about = {"reports": reports, "polls": polls, "tried": tried, "said": said}
        return SimpleNamespace(v=validator, pool=pool, **about)

    return make


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


# ---------------------------------------------------------------------------- predictions


def test_every_case_is_predicted_in_evaluation_mode_which_does_not_stay(made):
    one, net = made("a", "b"), network()
    one.v.start(net, 7)
    assert one.tried == [("a", False), ("b", False)] and net.training and len(one.polls) == 2
    found = one.v.result()
    assert (found.step, found.unread, found.slices) == (7, [], {"of": "a"})
    assert list(found.result["cases"]) == ["a", "b"]
    assert one.v.result() is None and one.v.result(wait=True) is None  # given once


def test_an_evaluation_says_at_which_case_it_is(made):
    one = made("a", "b")
    one.v.start(network(), 7)
    assert one.said == [
        "evaluation of step 7: case 1/2, 50%",
        "evaluation of step 7: case 2/2, 50%",
        "evaluation of step 7: scoring",
    ]


def test_a_case_that_cannot_be_read_is_tried_again_named_and_left_out(made):
    one = made("a", "b", unreadable=("a",))
    one.v.start(network(), 7)
    assert [case for case, _ in one.tried] == ["a", "a", "b"]
    found = one.v.result()
    assert found.unread == ["a"] and list(found.result["cases"]) == ["b"]
    assert found.slices == {"of": "b"}
    ((kind, text, figures),) = one.reports
    assert kind == "case left out" and figures == {"case": "a"}
    assert text == "case a: expected a file; this evaluation goes without it"


@pytest.mark.parametrize("exclusive", [False, True])
def test_predictions_of_classes_come_from_the_rank_that_made_them(exclusive):
    regions = Outputs({"artery": (3,), "vein": (7,)}, exclusive=exclusive)
    spec = evaluator.EvaluationSpec(
        "dice/mean", (), regions, {}, {}, terms={"cldice": {"validation_only": True}}
    )
    cases = [SimpleNamespace(id=name, shape=(2, 3, 4)) for name in "abc"]
    predictions = {case.id: evaluator.empty_prediction(spec, case) for case in cases}
    for number, one in enumerate(predictions.values()):
        one.encoded[:], one.probs[:] = number, number / 4
    assert predictions["a"].encoded.shape == (() if exclusive else (2,)) + (2, 3, 4)
    assert predictions["a"].probs.shape == (2 + exclusive, 2, 3, 4)
    sent = [predictions["b"].encoded, predictions["b"].probs]
    second = Rank(sent, first=False)
    nothing = dict.fromkeys(("report", "poll", "progress"))
    one = Validator(cases, spec, background=True, group=second, **nothing)
    one._brought_together({"b": predictions["b"]}, unread=["c"])
    one.group = Rank(second.moved, first=True)
    found = one._brought_together({"a": predictions["a"]}, unread=["c"])
    assert [prediction.case.id for prediction in found] == ["a", "b"]
    assert np.array_equal(found[1].encoded, sent[0]) and np.array_equal(found[1].probs, sent[1])


class Rank:
    """One of two, which gets these arrays from the other, or sends them."""

    size = 2

    def __init__(self, arrays, first):
        self.arrays, self.first, self.moved = iter(arrays), first, []

    def move(self, array, owner):
        assert owner == 1
        if self.first:
            array[:] = next(self.arrays)
        self.moved.append(array)


def test_without_cases_there_is_no_process_and_an_evaluation_without_scores(made):
    one = made(background=True)
    one.v.start(network(), 0)
    assert one.v.pool is None and one.v.roles() == {}
    assert one.v.result() == Evaluation(0, {**RESULT, "cases": {}}, [], None)


def test_what_poll_raises_ends_the_prediction(made):
    one = made("a", "b")

    def stop():
        raise signals.Stopped

    one.v.poll = stop
    with pytest.raises(signals.Stopped):
        one.v.start(network(), 7)
    assert [case for case, _ in one.tried] == ["a"] and one.v.result() is None


# ---------------------------------------------------------------------------- in the background


def test_an_evaluation_in_the_background_is_not_waited_for(made):
    one = made("a", background=True)
    assert one.v.roles() == {}  # started when it is needed
    one.v.start(network(), 7)
    assert one.v.result() is None and len(one.polls) == 1
    one.pool.futures[0].set_result({**RESULT, "unread": ["a"]})
    evaluation = one.v.result()
    assert evaluation.step == 7 and evaluation.result["scores"] == {"dice": 0.5}
    assert evaluation.unread == ["a"]
    assert one.v.roles() == {77: "evaluator"} and one.v.result() is None


def test_waiting_for_an_evaluation_polls_whether_to_leave(made):
    one = made("a", background=True)
    one.v.start(network(), 7)
    one.v.poll = lambda: (
        one.polls.append(1) or (len(one.polls) == 3 and one.pool.futures[0].set_result(RESULT))
    )
    assert one.v.result(wait=True).result["scores"] == {"dice": 0.5} and len(one.polls) == 3


@pytest.mark.parametrize(
    ("error", "cause", "exitcode"),
    [
        (BrokenProcessPool(), "was killed by SIGKILL", -signal.SIGKILL),
        (MemoryError(), "could not get the memory it asked for", None),
    ],
)
def test_an_evaluator_that_dies_is_reported_and_training_evaluates_from_then_on(
    made, error, cause, exitcode
):
    one = made("a", background=True)
    one.v.start(network(), 7)
    one.pool.futures[0].set_exception(error)
    evaluation = one.v.result(wait=True)
    assert (evaluation.step, evaluation.result) == (7, None)
    ((kind, text, figures),) = one.reports
    assert kind == "evaluator died" and figures == {"pid": 77, "exitcode": exitcode}
    assert "step 7 has no scores" in text and "by itself" in text and cause in text
    one.v.start(network(), 9)
    assert one.v.result().result["scores"] == {"dice": 0.5} and one.v.roles() == {}


def test_an_evaluator_that_died_between_two_evaluations_is_reported_too(made):
    one = made("a", background=True)
    one.v.start(network(), 7)
    one.pool.futures[0].set_result(RESULT)
    assert one.v.result().result["scores"] == {"dice": 0.5}

    def submit(*arguments):
        raise BrokenProcessPool

    one.pool.submit = submit
    one.v.start(network(), 9)
    assert one.v.result(wait=True).result is None
    assert [kind for kind, *_ in one.reports] == ["evaluator died"]


# ---------------------------------------------------------------------------- slices


def test_the_slice_with_most_labeled_foreground_is_shown():
    truth = np.zeros((4, 5, 6), np.uint8)
    truth[1, :, 0:2], truth[2, 0:3], truth[3] = 1, 1, 2
    image = np.arange(truth.size, dtype=np.uint16).reshape(truth.shape)[None]
    slices = validation.middle_slices(image, truth, Outputs({"bar": (1,)}), ignore_label=2)
    assert slices["z"] == 2 and slices["labeled"].all() and slices["truth"]["bar"].sum() == 18
    assert np.array_equal(slices["image"], image[0, 2])
    assert validation.middle_slices(image, truth, Outputs({"all": (1, 2)}), None)["z"] == 3


def test_the_slice_that_is_shown_has_much_of_every_class_the_rare_ones_too():
    label = np.zeros((4, 5, 6), np.uint8)
    label[1:3, :, 0:3], label[1, 0, 0], label[3] = 3, 0, 3  # most of class 3 in the last slice
    label[2, 0, 5] = 7
    regions = Outputs({"artery": (3,), "vein": (7,)}, exclusive=True)
    slices = validation.middle_slices(label[None], label, regions, ignore_label=255)
    assert slices["z"] == 2
    assert {name: mask.sum() for name, mask in slices["truth"].items()} == {"artery": 15, "vein": 1}
