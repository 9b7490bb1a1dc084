"""Losses of skeletons and topology: against plain loops, MONAI, and values worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from losses import (
    boundary_loss,
    cldice_loss,
    morph_skeleton_loss,
    skeleton_recall_loss,
    soft_dice_loss,
    soft_skeletons,
    toploss_loss,
)
from tests.test_losses import as_logits, bar, draw

# ---------------------------------------------------------------------------- skeletons


def plain_skeleton(probs, iterations):
    """The soft skeleton of one (D, H, W) float64 array, voxel by voxel."""
    cross = ndimage.generate_binary_structure(3, 1)

    def erode(x):
        return ndimage.grey_erosion(x, footprint=cross, mode="constant", cval=np.inf)

    def removed(x):
        opened = ndimage.grey_dilation(erode(x), size=(3, 3, 3), mode="constant", cval=-np.inf)
        return np.maximum(x - opened, 0)

    skeleton = removed(probs)
    for _ in range(iterations):
        probs = erode(probs)
        skeleton = skeleton + np.maximum(removed(probs) - skeleton * removed(probs), 0)
    return skeleton


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_cldice_and_morph_skeleton_agree_with_a_plain_loop(iterations):
    logits, target, _ = draw()
    dice, difference = [], []
    for p, t in zip(torch.sigmoid(logits.double()).numpy(), target.double().numpy(), strict=True):
        s_p, s_t = plain_skeleton(p[0], iterations), plain_skeleton(t[0], iterations)
        precision = ((s_p * t[0]).sum() + 1) / (s_p.sum() + 1)
        sensitivity = ((s_t * p[0]).sum() + 1) / (s_t.sum() + 1)
        dice.append(2 * precision * sensitivity / (precision + sensitivity))
        difference.append(np.abs(s_p - s_t).mean())
    value = cldice_loss(logits, target, iterations=iterations)
    assert value.item() == pytest.approx(1 - np.mean(dice), rel=1e-5)
    value = morph_skeleton_loss(logits, target, iterations=iterations)
    assert value.item() == pytest.approx(np.mean(difference), rel=1e-5)


def test_skeletons_given_are_the_skeletons_made():
    logits, target, valid = draw()
    given = soft_skeletons(logits, target, valid, iterations=2)
    for loss in (cldice_loss, morph_skeleton_loss):
        alone = loss(logits, target, valid, iterations=2)
        assert torch.equal(loss(logits, target, valid, skeletons=given), alone)


def test_cldice_of_a_bar_of_half_the_length_is_worked_out_by_hand():
    # Bars one voxel wide with room around are their own skeletons: precision 1, sensitivity 1/2.
    thin = F.pad(bar(3, 6, 15), (0, 0, 3, 3, 3, 3))
    half = F.pad(bar(3, 3, 15), (0, 0, 3, 3, 3, 3))
    value = cldice_loss(as_logits(half), thin, smooth=1e-6)
    assert value.item() == pytest.approx(1 - 2 * 0.5 / 1.5, rel=1e-4)


def test_samples_without_valid_voxels_are_left_out_of_the_mean():
    logits, target, valid = draw()
    valid[1] = False
    for loss in (cldice_loss, skeleton_recall_loss, boundary_loss):
        alone = loss(logits[:1], target[:1], valid[:1])
        assert torch.equal(loss(logits, target, valid), alone)


def test_cldice_does_not_mind_thickness():
    thin, thick = torch.zeros(2, 1, 1, 7, 7, 12).unbind()
    thin[..., 3, 3, :] = 1.0
    thick[..., 2:5, 2:5, :] = 1.0
    assert cldice_loss(as_logits(thick), thin) < 0.05
    assert soft_dice_loss(as_logits(thick), thin) > 0.7


def test_cldice_of_empty_sides():
    empty = torch.zeros(1, 1, 3, 3, 40)
    assert cldice_loss(torch.full_like(empty, -100.0), empty) == 0.0
    full_line = torch.zeros_like(empty)
    full_line[..., 1, 1, :] = 1.0
    # Of 40 voxels of skeleton none is right: precision (0 + 1) / (40 + 1), sensitivity 1.
    expected = 1 - 2 / 41 / (1 / 41 + 1)
    assert cldice_loss(as_logits(full_line), empty).item() == pytest.approx(expected, rel=1e-4)


def test_skeleton_recall_is_the_share_of_the_tube_that_is_found():
    skeleton = bar(1, length=4)
    # Of 4 voxels of skeleton 2 are predicted, and there is one voxel of smoothing.
    value = skeleton_recall_loss(as_logits(bar(3)), bar(0, length=6), skeleton=skeleton)
    assert value.item() == pytest.approx(1 - (2 + 1) / (4 + 1), rel=1e-5)


def test_skeleton_recall_makes_a_skeleton_where_none_is_given():
    target = bar(1, length=6)
    value = skeleton_recall_loss(as_logits(bar(1, length=3)), target)
    assert value.item() == pytest.approx(1 - (3 + 1) / (6 + 1), rel=1e-5)


def test_skeleton_recall_without_a_skeleton_is_zero():
    empty = torch.zeros(1, 1, 1, 1, 9)
    assert skeleton_recall_loss(torch.zeros_like(empty), empty) == 0.0


def test_skeleton_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"skeleton: expected .* \(1, 1, 1, 1, 9\), got \(1, 1, 9\)"
    ):
        skeleton_recall_loss(bar(3), bar(3), skeleton=torch.ones(1, 1, 9))


def test_each_class_has_its_own_part_of_the_tube():
    # Class 1 at 1 to 4, class 2 at 5 to 7, the skeleton of both at 3 to 6; all is called class 1.
    target = bar(1, 4) + 2 * bar(5, 3)
    logits = torch.cat([bar(0, 0), as_logits(bar(0, 9)), bar(0, 0) - 20], dim=1)
    value = skeleton_recall_loss(logits, target, skeleton=bar(3, 4))
    assert value.item() == pytest.approx(1 - ((2 + 1) / (2 + 1) + 1 / (2 + 1)) / 2, rel=1e-5)


def test_toploss_of_a_prediction_that_is_not_a_number_is_none():
    logits, target, valid = draw()
    logits[valid] = math.nan
    assert toploss_loss(logits, target, valid, window=(2, 2, 2), windows=1).isnan()


def test_ignored_part_of_the_tube_is_not_asked_for():
    valid = torch.ones(1, 1, 1, 1, 9, dtype=torch.bool)
    valid[..., 5:] = False
    skeleton = torch.where(valid, bar(1, length=8), math.nan)
    value = skeleton_recall_loss(as_logits(bar(3, 2)), bar(1, length=8), valid, skeleton=skeleton)
    assert value.item() == pytest.approx(1 - (2 + 1) / (4 + 1), rel=1e-5)


# ---------------------------------------------------------------------------- boundary, topology


def test_boundary_loss_is_the_share_of_differences_that_differ():
    # Each bar has two ends along x; of four differences one is shared.
    value = boundary_loss(as_logits(bar(2, 2)), bar(2, 4), smooth=1e-6)
    assert value.item() == pytest.approx(2 / 4, rel=1e-4)


def test_edge_of_the_unlabeled_region_is_no_boundary():
    valid = torch.ones(1, 1, 1, 1, 9, dtype=torch.bool)
    valid[..., 4:] = False
    target = torch.zeros(1, 1, 1, 1, 9)
    value = boundary_loss(torch.full_like(target, 20.0), target, valid)
    assert value.item() == pytest.approx(0.0, abs=1e-6)


def test_toploss_looks_at_the_windows_that_are_most_wrong():
    target = torch.zeros(1, 1, 4, 4, 12)
    wrong = target.clone()
    wrong[..., 1:3, 1:3, 9:11] = 1.0  # one blob too many, in the last of three windows
    logits = as_logits(wrong, sharp=2.0).requires_grad_()
    value = toploss_loss(logits, target, window=(4, 4, 4), windows=1)
    value.backward()
    p_max = torch.sigmoid(torch.tensor(2.0)).item()
    assert value.item() == pytest.approx(p_max**2 / 2, rel=1e-5)
    assert bool((logits.grad[..., 8:] > 0).any())
    assert bool((logits.grad[..., :8] == 0).all())


def test_toploss_of_several_windows_is_their_mean():
    target = torch.zeros(1, 1, 4, 4, 8)
    wrong = target.clone()
    wrong[..., 1:3, 1:3, 5:7] = 1.0
    values = [
        toploss_loss(as_logits(wrong, 2.0), target, window=(4, 4, 4), windows=n) for n in (1, 2, 9)
    ]
    low = torch.sigmoid(torch.tensor(-2.0)).item() ** 2 / 2  # an empty window has its faint maximum
    assert values[1].item() == pytest.approx((values[0].item() + low) / 2, rel=1e-5)
    assert torch.equal(values[1], values[2])  # there are only two


def test_windows_of_the_whole_batch_are_counted_and_right_ones_left_out():
    target = torch.zeros(2, 1, 4, 4, 4)
    logits = torch.full_like(target, -200.0)  # exactly 0 as a probability
    logits[0, 0, 1, 1, 1] = 2.0
    logits[1, 0, 1, 1, 1] = 1.0
    cost = [torch.sigmoid(torch.tensor(x)).item() ** 2 / 2 for x in (2.0, 1.0)]
    one = toploss_loss(logits, target, window=(4, 4, 4), windows=1)
    assert one.item() == pytest.approx(cost[0], rel=1e-5)
    logits[1] = -200.0
    both = toploss_loss(logits, target, window=(4, 4, 4), windows=2)
    assert both.item() == pytest.approx(cost[0], rel=1e-5)


def test_windows_reach_the_end_of_a_volume_that_they_do_not_divide():
    target = torch.zeros(1, 1, 4, 4, 10)
    logits = torch.full_like(target, -200.0)
    logits[0, 0, 1, 1, 9] = 2.0
    cost = torch.sigmoid(torch.tensor(2.0)).item() ** 2 / 2
    value = toploss_loss(logits, target, window=(4, 4, 4), windows=1)
    assert value.item() == pytest.approx(cost, rel=1e-5)


@pytest.mark.parametrize("numbers", [{"windows": 0}, {"window": (4, 4)}, {"window": (0, 4, 4)}])
def test_toploss_refuses_windows_that_are_none(numbers):
    with pytest.raises(ValueError, match="toploss: expected windows >= 1 and a window of three"):
        toploss_loss(*draw(), **numbers)


# ---------------------------------------------------------------------------- peers


def test_cldice_agrees_with_monai():
    monai = pytest.importorskip("monai.losses", reason="MONAI is in requirements-bench.txt alone")
    logits, target, _ = (x[:1] for x in draw())  # MONAI sums over the batch
    probs = torch.sigmoid(logits)
    two = [torch.cat([torch.zeros_like(x), x], dim=1) for x in (target, probs)]  # drops channel 0
    expected = monai.SoftclDiceLoss(iter_=3, smooth=1.0)(*two).item()
    assert cldice_loss(logits, target).item() == pytest.approx(expected, rel=1e-5)
