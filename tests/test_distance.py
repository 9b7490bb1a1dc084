"""Distances against scipy, against values worked out by hand, and on degenerate masks."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from distance import truncated_edt


def single(shape, *voxels):
    mask = torch.zeros(shape, dtype=torch.bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def test_one_voxel_gives_distances_in_units_of_spacing():
    distance = truncated_edt(single((3, 3, 3), (0, 0, 0)), 100.0, (5.0, 2.0, 1.0))
    assert distance.dtype == torch.float32
    assert distance[0, 0].tolist() == [0.0, 1.0, 2.0]
    assert distance[1, 0, 0] == 5.0
    assert distance[0, 2, 0] == 4.0
    assert distance[2, 2, 2] == pytest.approx(np.sqrt(100 + 16 + 4), rel=1e-6)


def test_distances_end_at_max_distance():
    distance = truncated_edt(single((1, 1, 6), (0, 0, 0)), 2.5)
    assert distance[0, 0].tolist() == [0.0, 1.0, 2.0, 2.5, 2.5, 2.5]


@pytest.mark.parametrize("max_distance", [0.6, 1.0, 2.0, 3.7, 50.0])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.994, 0.994), (0.3, 2.0, 1.1)])
def test_agrees_with_scipy_up_to_the_cut(spacing, max_distance):
    mask = np.random.default_rng(0).random((7, 11, 13)) > 0.985
    expected = ndimage.distance_transform_edt(~mask, sampling=spacing).clip(max=max_distance)
    distance = truncated_edt(torch.from_numpy(mask), max_distance, spacing)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_cut_of_a_whole_number_of_fractional_steps_agrees_with_scipy():
    mask = single((1, 1, 9), (0, 0, 0))
    for step, count in ((0.1, 3), (0.2, 3), (0.7, 6)):
        expected = np.minimum(np.arange(9) * step, count * step)
        distance = truncated_edt(mask, count * step, (1.0, 1.0, step))
        np.testing.assert_allclose(distance[0, 0].numpy(), expected, rtol=1e-6)


def test_volumes_of_a_batch_do_not_see_each_other():
    masks = torch.stack([single((2, 3, 4), (0, 0, 0)), single((2, 3, 4))])[:, None]
    distance = truncated_edt(masks, 3.0)
    assert distance.shape == (2, 1, 2, 3, 4)
    assert torch.equal(distance[0, 0], truncated_edt(masks[0, 0], 3.0))
    assert bool((distance[1] == 3.0).all())


def test_empty_mask_is_max_distance_everywhere():
    assert bool((truncated_edt(torch.zeros(4, 4, 4, dtype=torch.bool), 2.3) == 2.3).all())


def test_full_mask_is_zero_everywhere():
    assert bool((truncated_edt(torch.ones(4, 4, 4, dtype=torch.bool), 2.0) == 0.0).all())


def test_non_zero_voxels_of_other_dtypes_count_as_foreground():
    mask = single((3, 4, 5), (1, 2, 3), (2, 0, 0))
    expected = truncated_edt(mask, 4.0)
    assert torch.equal(truncated_edt(mask.to(torch.uint8) * 255, 4.0), expected)
    assert torch.equal(truncated_edt(mask.float() * -0.5, 4.0), expected)


def test_the_mask_is_left_as_it_was_and_the_result_has_no_gradient():
    mask = single((3, 3, 3), (1, 1, 1)).float().requires_grad_()
    before = mask.detach().clone()
    assert not truncated_edt(mask, 2.0).requires_grad
    assert torch.equal(mask.detach(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 3), 1.0), "mask"),
        ((torch.zeros(3, 3, 3), 0.0), "max_distance"),
        ((torch.zeros(3, 3, 3), float("inf")), "max_distance"),
        ((torch.zeros(3, 3, 3), 1.0, (1.0, 0.0, 1.0)), "spacing"),
        ((torch.zeros(3, 3, 3), 1.0, (1.0, 1.0)), "spacing"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        truncated_edt(*arguments)
