"""Loss terms against plain formulas, hand-computed geometry, and voxels that must not count."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from losses import (
    LOSSES,
    boundary_loss,
    soft_dice_loss,
    surface_distance_loss,
    weighted_bce_loss,
)
from topology.distance import edt

SHAPE = (2, 1, 4, 5, 6)
EVERY = {**LOSSES, "boundary": boundary_loss}
EVERY_LOSS = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)


def draw(seed=0):
    """Random logits, soft target and valid mask of SHAPE."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE, generator=generator) * 2
    target = torch.rand(SHAPE, generator=generator)
    return logits, target, torch.rand(SHAPE, generator=generator) > 0.4


def bar(start, length=3, size=9):
    """A bar along x in an otherwise empty volume: (1, 1, 1, 1, size) float."""
    target = torch.zeros(1, 1, 1, 1, size)
    target[..., start : start + length] = 1.0
    return target


def as_logits(mask, sharp=20.0):
    return (mask * 2 - 1) * sharp


# ---------------------------------------------------------------------------- valid


@EVERY_LOSS
def test_ignored_voxels_get_zero_gradient(loss):
    logits, target, valid = draw()
    logits.requires_grad_()
    loss(logits, target, valid).backward()
    assert bool((logits.grad[~valid] == 0).all())
    assert bool((logits.grad[valid] != 0).any())


@EVERY_LOSS
@pytest.mark.parametrize("content", [1e30, -1e30, math.inf, math.nan])
def test_content_of_ignored_voxels_cannot_change_value_or_gradient(loss, content):
    logits, target, valid = draw()
    results = []
    for fill in (0.0, content):
        x = torch.where(valid, logits, fill).requires_grad_()
        value = loss(x, torch.where(valid, target, fill), valid)
        value.backward()
        results.append((value.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@EVERY_LOSS
def test_all_ignored_gives_zero_loss_and_zero_gradient(loss):
    logits, target, valid = draw()
    logits.requires_grad_()
    value = loss(logits, target, torch.zeros_like(valid))
    value.backward()
    assert value == 0.0
    assert bool((logits.grad == 0).all())


@EVERY_LOSS
def test_no_valid_mask_means_all_valid(loss):
    logits, target, valid = draw()
    assert torch.equal(loss(logits, target), loss(logits, target, torch.ones_like(valid)))


@EVERY_LOSS
def test_low_precision_logits_under_autocast_are_judged_in_float32(loss):
    logits, target, valid = draw()
    half = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, target > 0.5, valid)
    value.backward()
    assert value.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(value, loss(logits.bfloat16().float(), (target > 0.5).float(), valid))


@EVERY_LOSS
def test_perfect_prediction_has_almost_no_loss(loss):
    target = bar(2)
    assert loss(as_logits(target), target) < 1e-6


@EVERY_LOSS
def test_large_logits_stay_finite(loss):
    target = bar(2)
    logits = as_logits(1 - target, sharp=1e4).requires_grad_()
    value = loss(logits, target)
    value.backward()
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(logits.grad).all())


@EVERY_LOSS
def test_shapes_that_differ_are_refused(loss):
    fits = torch.zeros(1, 1, 2, 2, 2)
    for target, valid in [
        (torch.zeros(1, 1, 2, 2, 3), None),
        (fits[0], None),
        (torch.zeros(1, 2, 2, 2, 2), None),
        (fits, torch.zeros(2, 1, 2, 2, 2)),
    ]:
        with pytest.raises(ValueError, match=r"one shape .*, got \(1, 1, 2, 2, 2\)"):
            loss(fits, target, valid)


# ---------------------------------------------------------------------------- classes


@EVERY_LOSS
def test_two_classes_by_softmax_are_one_foreground_by_sigmoid(loss):
    logits, target, valid = draw()
    target = (target > 0.5).float()
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    expected = loss(logits, target, valid)
    torch.testing.assert_close(loss(two, target, valid), expected)  # class ids
    shares = torch.cat([1 - target, target], dim=1)
    torch.testing.assert_close(loss(two, shares, valid), expected)


@EVERY_LOSS
def test_classes_in_another_order_give_the_same_loss(loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 4, 5, 6, generator=generator)
    target = torch.randint(0, 4, (1, 1, 4, 5, 6), generator=generator)
    valid = draw()[2][:1]
    order = torch.tensor([0, 3, 1, 2])
    turned = torch.argsort(order)[target]
    torch.testing.assert_close(loss(logits[:, order], turned, valid), loss(logits, target, valid))


@EVERY_LOSS
def test_ignored_voxels_of_several_classes_get_zero_gradient(loss):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (1, 1, 4, 5, 6), generator=generator)
    valid = draw()[2][:1]
    values = []
    for fill in (0.0, math.nan):
        logits = torch.randn(1, 3, 4, 5, 6, generator=generator.manual_seed(1))
        logits = torch.where(valid, logits, fill).requires_grad_()
        value = loss(logits, torch.where(valid, target, 77), valid)
        value.backward()
        assert bool((logits.grad * ~valid == 0).all())
        values.append(value.detach())
    assert torch.equal(*values)


@EVERY_LOSS
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_a_term_of_three_classes_is_the_mean_of_one_for_each_against_the_rest(loss, weights):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 4, 5, 6, generator=generator)
    target = torch.randint(0, 4, (2, 1, 4, 5, 6), generator=generator)
    valid = draw()[2]
    chosen = [1.0, 1.0, 1.0] if weights is None else weights
    if loss is weighted_bce_loss:  # the cross-entropy of all classes
        entropy = F.cross_entropy(logits, target[:, 0], reduction="none")[valid[:, 0]]
        counts = torch.tensor([1.0, *(w * 3 / sum(chosen) for w in chosen)])[target[valid]]
        expected = (entropy * counts).sum() / counts.sum()
    else:
        rest = torch.logit(torch.softmax(logits, 1).double())
        how = {"windows": 2} if loss is LOSSES["toploss"] else {}  # one for each sample
        values = [loss(rest[:, [c]], (target == c).float(), valid, **how) for c in (1, 2, 3)]
        expected = sum(w * v for w, v in zip(chosen, values, strict=True)) / sum(chosen)
    how = {"windows": 6} if loss is LOSSES["toploss"] else {}
    value = loss(logits, target, valid, class_weights=weights, **how)
    torch.testing.assert_close(value, expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 0.0]])
def test_weights_that_are_not_one_for_each_class_are_refused(weights):
    logits = torch.zeros(1, 4, 2, 2, 2)
    for loss in EVERY.values():
        with pytest.raises(ValueError, match="expected 3 positive numbers, one for each"):
            loss(logits, torch.ones(1, 1, 2, 2, 2), class_weights=weights)


# ---------------------------------------------------------------------------- terms


@pytest.mark.parametrize("weight", [0.25, 1.0, 7.0])
def test_weighted_bce_is_the_weighted_mean_of_cross_entropies(weight):
    logits, target, valid = draw()
    p = 1 / (1 + np.exp(-logits[valid].double().numpy()))
    t = target[valid].double().numpy()
    entropy = -t * np.log(p) - (1 - t) * np.log(1 - p)
    expected = np.average(entropy, weights=weight * t + 1 - t)
    value = weighted_bce_loss(logits, target, valid, positive_weight=weight)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_positive_weight_does_not_change_the_loss_of_an_undecided_network():
    value = weighted_bce_loss(torch.zeros(1, 1, 1, 1, 9), bar(2), positive_weight=10.0)
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("batch", [False, True])
def test_soft_dice_is_the_formula(batch):
    logits, target, valid = draw()
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    t, v = target.double().numpy(), valid.numpy()
    groups = [(p[v], t[v])] if batch else [(p[i][v[i]], t[i][v[i]]) for i in range(2)]
    dice = [(2 * (a * b).sum() + 0.1) / (a.sum() + b.sum() + 0.1) for a, b in groups]
    value = soft_dice_loss(logits, target, valid, smooth=0.1, batch=batch)
    assert value.item() == pytest.approx(1 - np.mean(dice), rel=1e-5)


def test_soft_dice_of_a_shifted_bar_is_one_minus_its_dice():
    value = soft_dice_loss(as_logits(bar(3)), bar(2))
    assert value.item() == pytest.approx(1 - 2 * 2 / (3 + 3), abs=1e-5)


def test_soft_dice_leaves_samples_without_valid_voxels_out_of_the_mean():
    logits, target, valid = draw()
    valid[1] = False
    alone = soft_dice_loss(logits[:1], target[:1], valid[:1])
    assert torch.equal(soft_dice_loss(logits, target, valid), alone)


def test_batch_dice_keeps_the_classes_apart():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    target = torch.randint(0, 3, (2, 1, 4, 5, 6), generator=generator)
    probs = torch.softmax(logits, 1)
    dice = []
    for k in (1, 2):
        p, t = probs[:, k], (target[:, 0] == k).float()
        dice.append(2 * (p * t).sum() / (p.sum() + t.sum()))
    value = soft_dice_loss(logits, target, batch=True)
    assert value.item() == pytest.approx(1 - sum(dice).item() / 2, rel=1e-4)


def test_positive_weight_counts_every_foreground_class():
    logits = torch.zeros(1, 3, 1, 1, 4)
    logits[:, 0, ..., :2] = 5.0  # background and class 1 are called background, surely
    target = torch.tensor([0, 1, 2, 2]).reshape(1, 1, 1, 1, 4)
    entropy = F.cross_entropy(logits[0, :, 0, 0].T, target.flatten(), reduction="none")
    expected = np.average(entropy.numpy(), weights=[1.0, 3.0, 3.0, 3.0])
    value = weighted_bce_loss(logits, target, positive_weight=3.0)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_soft_dice_of_an_empty_target_is_zero_or_close_to_one():
    empty = torch.zeros(1, 1, 1, 1, 9)
    assert soft_dice_loss(torch.full_like(empty, -100.0), empty) == 0.0
    assert soft_dice_loss(torch.zeros_like(empty), empty) > 0.99999


def test_surface_distance_of_a_shifted_bar_is_worked_out_by_hand():
    # Target at x = 2, 3, 4; prediction at 5, 6, 7; tolerance 2 voxels.
    # Prediction's distances to the target: 1, 2, 3 -> 1/2 + 1 + 1; the other way round the same.
    value = surface_distance_loss(as_logits(bar(5)), bar(2), tolerance=2.0)
    assert value.item() == pytest.approx((2.5 + 2.5) / 9, rel=1e-5)


def test_surface_distance_counts_in_units_of_spacing():
    value = surface_distance_loss(as_logits(bar(5)), bar(2), tolerance=2.0, spacing=(1.0, 1.0, 0.5))
    # Distances 0.5, 1, 1.5 in units, over a tolerance of 2, both ways.
    assert value.item() == pytest.approx(2 * 1.5 / 9, rel=1e-5)


def test_surface_distance_lowers_probability_away_from_the_target():
    logits = torch.zeros(1, 1, 1, 1, 9, requires_grad=True)
    surface_distance_loss(logits, bar(2), tolerance=2.0).backward()
    gradient = logits.grad.flatten()
    assert bool((gradient[[0, 1, 5, 6, 7, 8]] > 0).all())
    assert bool((gradient[[2, 3, 4]] < 0).all())
    assert gradient[8].item() == pytest.approx(2 * gradient[5].item(), rel=1e-5)


def test_descending_the_surface_distance_closes_the_gap_of_a_broken_bar():
    target = bar(0, length=9)
    broken = target.clone()
    broken[..., 3:6] = 0.0
    logits = as_logits(broken, sharp=2.0).requires_grad_()
    for _ in range(30):
        (gradient,) = torch.autograd.grad(surface_distance_loss(logits, target), logits)
        logits.data -= 20.0 * gradient
    assert bool((logits > 0).all())


def test_surface_distance_of_empty_sides_is_a_mean():
    p = torch.sigmoid(torch.tensor(1.5))
    logits = torch.full((1, 1, 1, 1, 9), 1.5)
    empty_target = surface_distance_loss(logits, torch.zeros_like(logits))
    empty_prediction = surface_distance_loss(-logits, bar(2), tolerance=0.5)
    assert empty_target.item() == pytest.approx(p.item(), rel=1e-6)
    assert empty_prediction.item() == pytest.approx((6 * (1 - p) + 3 * p).item() / 9, rel=1e-6)


def test_unlabeled_foreground_is_foreground_of_neither_side():
    valid = torch.ones(1, 1, 1, 1, 9, dtype=torch.bool)
    valid[..., 2:5] = False
    value = surface_distance_loss(torch.full((1, 1, 1, 1, 9), -20.0), bar(2), valid)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    value = surface_distance_loss(torch.full((1, 1, 1, 1, 9), 20.0), bar(2), valid)
    assert value.item() == pytest.approx(1.0, abs=1e-6)  # all six voxels are far


def test_soft_dice_agrees_with_monai():
    monai = pytest.importorskip("monai.losses", reason="MONAI is in requirements-bench.txt alone")
    logits, target, _ = draw()
    peer = monai.DiceLoss(sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5)
    expected = peer(logits, target).item()
    assert soft_dice_loss(logits, target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 0.7)])
def test_surface_distance_agrees_with_scipy(spacing):
    logits, target, valid = draw()
    target = (target > 0.8).float()
    p = torch.sigmoid(logits.double()).numpy()
    t, v = target.numpy() > 0, valid.numpy()
    expected = 0.0
    for b in range(len(p)):
        masks = [(t[b, 0] & v[b, 0]), (p[b, 0] > 0.5) & v[b, 0]]
        to_target, to_pred = (
            np.minimum(ndimage.distance_transform_edt(~m, sampling=spacing) / 2.5, 1) for m in masks
        )
        away = to_target * p[b, 0] + to_pred * t[b, 0] * (1 - p[b, 0])
        expected += away[v[b, 0]].sum()
    for backend in ("native", "scipy"):
        value = surface_distance_loss(
            logits, target, valid, tolerance=2.5, spacing=spacing, backend=backend
        )
        assert value.item() == pytest.approx(expected / v.sum(), rel=1e-5)


def test_surface_distance_takes_the_downsampled_distance():
    logits = as_logits(bar(4, 1))
    value = surface_distance_loss(logits, bar(2, 1), tolerance=9.0, backend="downsampled")
    downsampled = edt(bar(2, 1) > 0, backend="downsampled")[..., 4].item()
    back = edt(bar(4, 1) > 0, backend="downsampled")[..., 2].item()
    assert value.item() == pytest.approx((downsampled + back) / 9 / 9, rel=1e-4)
    exact = surface_distance_loss(as_logits(bar(5, 1)), bar(2, 1), tolerance=9.0)
    coarse = surface_distance_loss(
        as_logits(bar(5, 1)), bar(2, 1), tolerance=9.0, backend="downsampled"
    )
    assert abs(exact - coarse) > 0.01
