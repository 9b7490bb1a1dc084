"""Masks drawn by hand, and what each step makes of them."""

import numpy as np
import pytest

from scoring import postprocess


def empty(shape=(7, 9, 9)):
    return np.zeros(shape, bool)


# ---------------------------------------------------------------------------- hysteresis


def test_weak_voxels_stay_where_they_touch_a_strong_one():
    low, high = empty(), empty()
    low[3, 4, 0:5], low[3, 8, 0:5] = True, True  # two bars, of which one has a strong voxel
    high[3, 4, 4] = True
    joined = postprocess.apply_hysteresis(high, low)
    assert joined[3, 4, 0:5].all() and joined.sum() == 5


def test_weak_voxels_join_over_a_corner():
    low, high = empty(), empty()
    low[2, 2, 2], high[3, 3, 3] = True, True
    assert postprocess.apply_hysteresis(high, low).sum() == 2


def test_without_a_strong_voxel_nothing_stays():
    low = empty()
    low[3] = True
    assert not postprocess.apply_hysteresis(empty(), low).any()


# ---------------------------------------------------------------------------- components


def test_components_below_the_size_go_and_those_of_it_stay():
    mask = empty()
    mask[0, 0, 0:3], mask[4, 4, 0:4] = True, True
    kept = postprocess.remove_small_components(mask, 4)
    assert kept.sum() == 4 and kept[4, 4, 0:4].all()


# ---------------------------------------------------------------------------- holes


def hollow():
    mask = empty()
    mask[1:6, 2:7, 2:7] = True
    mask[2:5, 3:6, 3:6] = False  # a cavity of 27, of 9 in each slice
    return mask


def test_a_cavity_is_filled_up_to_its_size():
    assert postprocess.fill_holes(hollow(), 27).sum() == 125
    assert postprocess.fill_holes(hollow(), 9).sum() == 125  # slice by slice
    assert postprocess.fill_holes(hollow(), 8).sum() == 125 - 27


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_pinhole_in_a_sheet_is_plugged_across_each_axis(axis):
    mask = np.moveaxis(empty((9, 9, 9)), axis, 0)
    mask[4] = True
    mask[4, 4, 4:6] = False
    whole = np.moveaxis(mask, 0, axis)
    assert postprocess.fill_holes(whole, 2).sum() == 81
    assert postprocess.fill_holes(whole, 1).sum() == 79


def test_a_notch_at_the_border_is_no_hole():
    mask = empty()
    mask[3] = True
    mask[3, 4, 0] = False
    assert np.array_equal(postprocess.fill_holes(mask, 50), mask)


@pytest.mark.parametrize("value", [False, True])
def test_masks_of_one_value_have_no_holes(value):
    mask = np.full((4, 5, 6), value)
    assert np.array_equal(postprocess.fill_holes(mask, 1000), mask)


# ---------------------------------------------------------------------------- closing


def test_a_gap_is_closed_that_is_narrower_than_the_ball():
    mask = empty()
    mask[3, :, 0:4], mask[3, :, 5:9] = True, True  # a sheet with a slit of one voxel
    closed = postprocess.close(mask, 1.5)
    assert closed[3].all() and not closed[2].any() and not closed[4].any()
    assert not postprocess.close(mask, 1.0)[3, :, 4].any()


def test_the_radius_is_in_the_unit_of_the_spacing():
    mask = empty()
    mask[2], mask[4] = True, True  # two sheets, one slice of 5 between them
    assert not postprocess.close(mask, 2.0, (5, 1, 1))[3].any()
    assert postprocess.close(mask, 5.0, (5, 1, 1))[3, 4, 4]


def test_at_the_border_nothing_is_closed_or_eaten():
    mask = empty()
    mask[1, :, :] = True  # one voxel from the border
    assert np.array_equal(postprocess.close(mask, 3.0), mask)
    assert not postprocess.close(empty(), 3.0).any()


# ---------------------------------------------------------------------------- all of them


def test_stages_come_in_order_and_only_those_that_are_on():
    low, high = empty(), empty()
    low[3, :, 0:4], low[3, :, 5:9] = True, True
    high[3, 4, 0] = high[3, 4, 8] = high[0, 0, 0] = True
    found = dict(
        postprocess.stages(
            high, low | high, hysteresis=0.3, min_component_voxels=2, closing_radius=1.5
        )
    )
    assert list(found) == ["threshold", "hysteresis", "min_component_voxels", "closing_radius"]
    sizes = [int(mask.sum()) for mask in found.values()]
    assert sizes[:3] == [3, 73, 72] and found["closing_radius"][3, 4, 4]
    assert list(dict(postprocess.stages(high))) == ["threshold"]
    assert np.array_equal(postprocess.apply(high), high)


@pytest.mark.parametrize("shape", [(1, 5, 5), (5, 3, 1), (3, 3, 3)])
def test_isolated_voxels_of_a_thin_volume_are_components(shape):
    mask = np.zeros(shape, bool)
    mask[::2, ::2, ::2] = True  # no two of them touch
    assert (postprocess.apply_hysteresis(mask, mask) == mask).all()
    assert not postprocess.remove_small_components(mask, 2).any()
    assert (postprocess.remove_small_components(mask, 1) == mask).all()
