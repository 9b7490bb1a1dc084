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
    how = {"hysteresis": 0.3, "min_component_voxels": 2, "closing_radius": 1.5}
    stages = postprocess.stages_of_regions({"sheet": high}, {"sheet": low | high}, **how)
    found = {name: masks["sheet"] for name, masks in stages}
    assert list(found) == ["threshold", "hysteresis", "min_component_voxels", "closing_radius"]
    sizes = [int(mask.sum()) for mask in found.values()]
    assert sizes[:3] == [3, 73, 72] and found["closing_radius"][3, 4, 4]
    assert list(dict(postprocess.stages_of_regions({"sheet": high}))) == ["threshold"]
    assert np.array_equal(postprocess.apply_to_regions({"sheet": high})["sheet"], high)
    assert np.array_equal(
        postprocess.apply_to_regions({"sheet": high}, {"sheet": low | high}, **how)["sheet"],
        found["closing_radius"],
    )


@pytest.mark.parametrize("shape", [(1, 5, 5), (5, 3, 1), (3, 3, 3)])
def test_isolated_voxels_of_a_thin_volume_are_components(shape):
    mask = np.zeros(shape, bool)
    mask[::2, ::2, ::2] = True  # no two of them touch
    assert (postprocess.apply_hysteresis(mask, mask) == mask).all()
    assert not postprocess.remove_small_components(mask, 2).any()
    assert (postprocess.remove_small_components(mask, 1) == mask).all()


# ---------------------------------------------------------------------------- regions


def regions(**boxes):
    masks = {name: empty() for name in boxes}
    for name, box in boxes.items():
        masks[name][box] = True
    return masks


def test_regions_that_may_overlap_are_each_processed_as_if_alone():
    rng = np.random.default_rng(0)
    high = {name: rng.random((9, 12, 12)) > 0.6 for name in ("vessel", "artery")}
    low = {name: mask | (rng.random(mask.shape) > 0.8) for name, mask in high.items()}
    steps = {"hysteresis": 0.3, "max_hole_voxels": 4, "closing_radius": 1.0}
    sizes = {"vessel": 9, "artery": 2}
    masks = postprocess.apply_to_regions(high, low, min_component_voxels=sizes, **steps)
    for name in high:
        alone = postprocess.apply_hysteresis(high[name], low[name])
        alone = postprocess.remove_small_components(alone, sizes[name])
        alone = postprocess.close(postprocess.fill_holes(alone, 4), 1.0)
        assert np.array_equal(masks[name], alone)
    assert not np.array_equal(masks["vessel"], high["vessel"])


def test_each_region_has_a_size_of_its_own_and_0_where_none_is_given():
    bar = np.s_[3, 4, 0:4]
    high = regions(artery=bar, vein=bar, other=bar)
    masks = postprocess.apply_to_regions(high, min_component_voxels={"artery": 5, "vein": 4})
    assert [mask.sum() for mask in masks.values()] == [0, 4, 4]
    masks = postprocess.apply_to_regions(high, min_component_voxels=5)
    assert [mask.sum() for mask in masks.values()] == [0, 0, 0]


def test_a_hole_is_filled_but_for_voxels_of_another_class():
    high = {"artery": hollow(), **regions(vein=np.s_[3, 4, 4])}
    masks = postprocess.apply_to_regions(high, exclusive=True, max_hole_voxels=27)
    assert masks["artery"].sum() == 125 - 1 and not masks["artery"][3, 4, 4]
    assert masks["vein"].sum() == 1


def test_a_removed_component_is_background_that_another_class_may_fill():
    high = {"artery": hollow(), **regions(vein=np.s_[3, 4, 4])}
    how = {"exclusive": True, "max_hole_voxels": 27, "min_component_voxels": {"vein": 2}}
    masks = postprocess.apply_to_regions(high, **how)
    assert masks["artery"].sum() == 125 and not masks["vein"].any()


def test_a_voxel_that_two_classes_would_fill_goes_to_the_first():
    sheets = regions(artery=np.s_[3], vein=np.s_[:, :, 4])
    sheets["artery"][:, :, 4] = sheets["vein"][3] = False  # each has a slit where they cross
    for names in (["artery", "vein"], ["vein", "artery"]):
        high = {name: sheets[name] for name in names}
        masks = postprocess.apply_to_regions(high, exclusive=True, closing_radius=1.5)
        assert [masks[name][3, :, 4].sum() for name in names] == [9, 0]


def test_filling_takes_no_voxel_from_another_class_and_gives_none_two():
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 4, (9, 12, 12))
    high = {name: classes == i for i, name in enumerate("abc", start=1)}
    how = {"max_hole_voxels": 30, "closing_radius": 1.5}
    masks = postprocess.apply_to_regions(high, exclusive=True, **how)
    assert sum(mask.astype(int) for mask in masks.values()).max() == 1
    for i, name in enumerate("abc", start=1):
        assert np.array_equal(high[name], classes == i)  # the input stays
        assert masks[name][classes == i].all()
        assert masks[name].sum() > high[name].sum()
