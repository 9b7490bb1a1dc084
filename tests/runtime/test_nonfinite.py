"""Steps whose loss or gradient is not finite: which, why, and what comes of it."""

import math

import pytest
import torch

from runtime.microbatch import nothing
from runtime.nonfinite import Check, Fault, SkippedSteps, explain
from runtime.signals import CannotGoOn


def sample(case, value=1.0, voxel=(1, 2, 3)):
    return {"case": case, "value": value, "voxel": voxel}


def draw(samples):
    return (torch.stack([torch.full((1, 2, 2, 2), s["value"]) for s in samples]),)


class Network(torch.nn.Module):
    """exp(weight * x), as two scales: beyond 88 that is more than float32 holds."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return [self.weight * 0 + x, torch.exp(self.weight * x)]


def parts(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


ONE = torch.tensor(1.0)

# ---------------------------------------------------------------------------- which


def test_finite_losses_and_gradients_are_no_fault():
    assert Check([parts(dice=0.5, total=1.0), parts(dice=0.1, total=0.2)], ONE).names() == []


def test_the_terms_are_named_once_and_not_their_sum():
    batches = [parts(bce=1.0, dice=math.nan, total=math.nan), parts(dice=math.inf, total=math.inf)]
    assert Check(batches, torch.tensor(math.nan)).names() == ["dice", "gradient"]


def test_a_sum_that_overflows_alone_is_named_itself():
    assert Check([parts(dice=1.0, total=math.inf)], ONE).names() == ["total"]


def test_a_gradient_can_be_wrong_where_no_loss_is():
    assert Check([parts(dice=1.0, total=1.0)], torch.tensor(math.inf)).names() == ["gradient"]


# ---------------------------------------------------------------------------- why


def test_an_image_of_nan_is_named_with_its_case_and_place():
    samples = [sample("good"), sample("bad", math.nan, voxel=(4, 5, 6))]
    fault = explain(["dice"], samples, Network(), draw)
    assert fault.broken and fault.cases == ["bad"]
    assert fault.text == ("dice not finite; case bad: the image is not (patch around voxel 4x5x6)")


def test_a_patch_that_the_network_makes_no_number_of_is_told_apart():
    fault = explain(["dice"], [sample("good"), sample("far", 100.0)], Network(), draw)
    assert fault.broken and fault.cases == ["far"]
    assert "case far: the network's output is not" in fault.text


@pytest.mark.parametrize("first", [True, False])
def test_of_two_patches_of_one_case_the_broken_one_counts(first):
    samples = [sample("x", math.nan, voxel=(7, 7, 7)), sample("x")]
    fault = explain(["dice"], samples if first else samples[::-1], Network(), draw)
    assert (
        fault.cases == ["x"] and "case x: the image is not (patch around voxel 7x7x7)" in fault.text
    )


def test_weights_that_are_not_finite_are_no_fault_of_a_case():
    fault = explain(["dice"], [sample("a"), sample("b"), sample("a")], Network(math.nan), draw)
    assert fault.broken and fault.cases == ["a", "b"]
    assert "the weights are not (weight); lower optim.lr" in fault.text


def test_a_gradient_beyond_fp16_where_all_losses_are_finite_is_told_without_a_look():
    fault = explain(["gradient"], [sample("a")], network=None, augment=None, fp16_scale=65536.0)
    assert not fault.broken and fault.cases == ["a"]
    assert "an overflow of fp16 at a loss scale of 65536, with the cases a" in fault.text


def test_a_loss_that_is_finite_in_fp32_is_an_overflow_of_fp16_that_breaks_nothing():
    fault = explain(["dice"], [sample("a")], Network(), draw, fp16_scale=65536.0)
    assert not fault.broken and fault.cases == ["a"]
    assert "an overflow of fp16 at a loss scale of 65536, with the cases a" in fault.text


def test_a_compiled_network_is_looked_at_without_compiling():
    network, compiled = Network(), []
    network.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    explain(["dice"], [sample("a"), sample("far", 100.0)], network, draw)
    assert not compiled
    network(torch.ones(1, 1, 2, 2, 2))
    assert compiled


@pytest.mark.parametrize("scale", [None, 0.5])
def test_what_no_scale_of_the_loss_explains_is_broken(scale):
    fault = explain(["gradient"], [sample("a"), sample("b")], Network(), draw, fp16_scale=scale)
    assert fault.broken and fault.text == (
        "gradient not finite, with the cases a, b, none of them alone"
    )


def test_what_is_finite_in_fp32_alone_says_so_of_bf16_and_is_broken():
    fault = explain(["gradient"], [sample("a")], Network(), draw, bf16=True)
    assert fault.broken and "in bf16" in fault.text and "training.precision=fp32" in fault.text


def test_a_broken_batch_is_no_overflow_however_large_the_scale():
    fault = explain(["dice"], [sample("a", math.nan)], Network(), draw, fp16_scale=65536.0)
    assert fault.broken and "fp16" not in fault.text


def test_looking_for_the_cause_changes_no_later_draw():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    explain(["dice"], [sample("a")], torch.nn.Dropout(0.5), draw)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------- what comes of it


def test_faults_are_reported_and_counted_by_case():
    skipped, reports = SkippedSteps(9), []
    for cases in (["a"], ["a", "b"]):
        skipped.add(
            Fault("why", True, cases), lambda kind, text, **figures: reports.append(figures)
        )
    again = SkippedSteps(9)
    again.load_state_dict(skipped.state_dict())
    assert again.state_dict() == {"in_a_row": 2, "since_log": 2, "cases": {"a": 2, "b": 1}}
    assert reports == [{"cases": ["a"]}, {"cases": ["a", "b"]}]
    assert again.describe() == ["steps without an update, by case: a (2), b (1)"]
    assert SkippedSteps(9).describe() == []


def test_overflows_of_fp16_are_reported_but_count_for_no_case_and_stop_no_run():
    skipped = SkippedSteps(2)
    for _ in range(5):
        skipped.add(Fault("fp16", False, ["a"]), nothing)
    assert skipped.state_dict() == {"in_a_row": 0, "since_log": 5, "cases": {}}


def test_as_many_broken_batches_in_a_row_as_allowed_are_too_many():
    skipped = SkippedSteps(2)
    skipped.add(Fault("why", True, ["a"]), nothing)
    with pytest.raises(CannotGoOn, match=r"^2 steps in a row.*max_skipped.*why.*a \(2\)$"):
        skipped.add(Fault("why", True, ["a"]), nothing)
