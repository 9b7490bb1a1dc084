"""Distances from sheet to sheet: planes, tilted and unlabeled ones, and the sheets of a scroll."""

import math

import numpy as np
import pytest
from scipy import ndimage

from scoring import gaps
from scoring.metrics import score
from volumes import phantoms

ISOTROPIC = (1.0, 1.0, 1.0)


def plates(*places, axis=0, length=16):
    """Plates of one voxel at these places of an axis, 9 voxels wide."""
    shape = [9, 9, 9]
    shape[axis] = length
    mask = np.zeros(shape, bool)
    np.moveaxis(mask, axis, 0)[list(places)] = True
    return mask


def widths(truth, spacing=ISOTROPIC):
    return gaps.gap_widths(truth, ~truth, spacing)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("empty", [1, 2, 3, 6])
def test_n_empty_slices_between_two_plates_make_a_distance_of_n_plus_1_steps(axis, empty):
    spacing = (5.0, 2.0, 0.5)
    found = widths(plates(3, 4, 5 + empty, axis=axis), spacing)
    lines = np.moveaxis(found, axis, 0).reshape(16, -1)
    expected = np.full(16, np.inf)
    expected[4 : 6 + empty] = (empty + 1) * spacing[axis]  # from the facing side of each plate
    if spacing[axis] == 0.5:  # or no line but those along x is as short
        assert (lines == expected[:, None]).all()
    assert (lines[:, 40] == expected).all()


def test_each_side_of_a_plate_may_face_another_and_the_nearer_counts():
    found = widths(plates(2, 5, 12))[:, 4, 4]
    expected = [3] * 4 + [7] * 7
    assert found.tolist() == [
        math.inf,
        math.inf,
        *expected[:4],
        *expected[4:10],
        7,
        *[math.inf] * 3,
    ]


def normals(count, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_distance_is_at_most_1_13_times_that_along_the_normal():
    lines = np.array(gaps.LINES) / np.linalg.norm(gaps.LINES, axis=1, keepdims=True)
    assert len(lines) == 13
    longer = 1 / np.abs(normals(100_000, 0) @ lines.T).max(axis=1)
    assert 1.12 < longer.max() < 1.13


def along(normal, shape=(24, 24, 24)):
    """Each voxel's place along a normal, 0 in the middle of the volume."""
    grid = np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij")
    return np.tensordot(normal, np.stack(grid), axes=1)


@pytest.mark.parametrize("normal", normals(6, 1), ids=str)
def test_tilted_plates_have_their_distance_to_a_step(normal):
    place = along(normal)
    found = widths((np.abs(place - 4) <= 1.5) | (np.abs(place + 4) <= 1.5))  # 5 from face to face
    inner = (slice(8, -8),) * 3  # where no line leaves the volume
    middle = found[inner][np.abs(place[inner]) < 1]
    assert middle.size > 50
    assert middle.min() >= 5
    assert middle.max() <= 5 * 1.13 + math.sqrt(3)


@pytest.mark.parametrize("normal", normals(6, 2), ids=str)
def test_a_flat_sheet_has_no_gap_to_itself_however_it_is_tilted(normal):
    assert np.isinf(widths(np.abs(along(normal)) <= 1.5)).all()
    assert np.isinf(widths(along(normal) > 0)).all()


def test_no_way_leads_through_an_unlabeled_voxel():
    truth = plates(3, 7).astype(np.uint8)
    truth[5, :, :5] = 2
    found = gaps.gap_widths(truth == 1, truth == 0, ISOTROPIC)
    assert found[3, 4, 7] == found[4, 4, 7] == found[7, 4, 7] == 4
    assert np.isinf(found[:, 4, 2]).all()


def test_unlabeled_voxels_change_no_score_of_a_gap_whatever_is_predicted_there():
    truth = plates(3, 7).astype(np.uint8)
    truth[5, :, :5] = 2  # between the plates, whose gap is not known there
    prediction = plates(3, 4, 5, 7)
    names = ["sheet_recall", "gap_filled"]
    found = [
        score(p, truth, ignore_label=2, names=names)
        for p in (prediction, prediction & (truth != 2))
    ]
    assert found[0] == found[1] == {"sheet_recall": 1.0, "gap_filled": pytest.approx(2 / 3)}


def test_bounds_of_a_distance_belong_to_the_range_below():
    truth = plates(0, 2, 5, 9)  # distances 2, 3 and 4
    filled = truth | plates(1, 3)
    names = [f"gap_filled@{bounds}" for bounds in ("0:2", "2:3", "3:4", "0:4", "4:inf")]
    assert list(score(filled, truth, names=names).values()) == [1.0, 0.5, 0.0, 2 / 6, 0.0]
    # 3 steps of 0.2 are 0.6 but for rounding.
    found = score(filled, truth, (0.2, 1, 1), names=["gap_filled@0.4:0.6", "gap_filled@0:0.4"])
    assert list(found.values()) == [0.5, 1.0]


def test_a_range_without_a_sheet_or_gap_is_noted_once_by_its_name_and_class():
    truth, notes = plates(0, 5).astype(np.uint8), []  # 5 apart
    truth[2] = 2  # the only sheet of its class
    names = ["sheet_recall@2:4/a", "gap_filled@2:4/a", "gap_filled@2:inf/a", "gap_filled/b"]
    found = score(truth, truth, classes={"a": 1, "b": 2}, names=names, notes=notes)
    assert list(found.values()) == [1.0, 0.0, 0.0, 0.0]
    none = "no sheets so far apart in the truth"
    assert notes == [
        f"{none}, sheet_recall@2:4/a is 1",
        f"{none}, gap_filled@2:4/a is 0",
        f"{none}, gap_filled/b is 0",
    ]


def test_without_a_range_distances_count_up_to_twice_the_tolerance():
    truth = plates(0, 2, 5, 9)
    names = ["gap_filled", "sheet_recall"]
    for tolerance, high in ((1.0, 2), (2.0, 4)):
        found = score(truth | plates(1), truth, tolerance=tolerance, names=names)
        assert (
            found["gap_filled"]
            == score(truth | plates(1), truth, names=[f"gap_filled@0:{high}"])[
                f"gap_filled@0:{high}"
            ]
        )


@pytest.mark.parametrize("name", ["4", "4:2", "3:3", "-1:2", "a:b", "1:2:3", "nan:2", ""])
def test_a_range_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="LOW"):
        score(plates(1), plates(1), names=[f"sheet_recall@{name}"])


# ---------------------------------------------------------------------------- wavy sheets


def wavy(seed, shape=(48, 64, 64)):
    """(wavy sheets in pairs that nearly touch in places, the number of each voxel's sheet)."""
    rng = np.random.default_rng(seed)
    waves, apart = (phantoms.smooth_field(shape, length, rng) for length in (26.0, 24.0))
    place = np.arange(shape[0]).reshape(-1, 1, 1) + 5 * waves
    away = (place + 12) % 24 - 12  # from the middle of a pair
    sheets = np.abs(np.abs(away) - np.clip(4 + 2.5 * apart, 2.2, 6)) <= 1.5
    return sheets, 2 * np.floor((place + 12) / 24) + (away > 0)


@pytest.mark.parametrize("seed", range(3))
def test_nine_in_ten_narrow_gaps_of_wavy_sheets_are_found_and_nine_in_ten_found_lie_between_two(
    seed,
):
    sheets, numbers = wavy(seed)
    masks = [sheets & (numbers == n) for n in np.unique(numbers[sheets])]
    two = np.sort([ndimage.distance_transform_edt(~mask) for mask in masks], axis=0)[:2].sum(axis=0)
    found = gaps.within(widths(sheets), 0, 3) & ~sheets
    assert found.sum() > 500
    assert (two[found] <= 3 * 1.13 + 1).mean() > 0.9
    assert found[(two <= 3) & ~sheets].mean() > 0.9


BOUNDS = ("0:3", "3:6", "6:12")
NAMES = [f"{name}@{bounds}" for name in ("gap_filled", "sheet_recall") for bounds in BOUNDS]


def by_distance(prediction, truth, ignore_label=None):
    """(gap_filled, sheet_recall) at each of BOUNDS, then surface Dice."""
    found = score(
        prediction, truth, ignore_label=ignore_label, names=[*NAMES, "surface_dice"]
    ).values()
    *shares, surface_dice = found
    return shares[:3], shares[3:], surface_dice


@pytest.mark.parametrize("seed", range(3))
def test_sheets_of_a_scroll_that_are_merged_where_they_are_near_are_seen_in_the_narrow_gaps(seed):
    label = phantoms.scroll((64, 64, 64), seed).label
    merged = ndimage.binary_closing(np.pad(label == 1, 2))[2:-2, 2:-2, 2:-2]
    filled, recall, surface_dice = by_distance(merged, label, phantoms.UNLABELED)
    assert filled[0] > 0.5
    assert filled[1:] == [0.0, 0.0]
    assert recall == [1.0, 1.0, 1.0]
    assert surface_dice > 0.99


def test_a_sheet_that_is_lost_where_another_is_near_is_seen_in_recall_and_not_in_surface_dice():
    sheets, numbers = wavy(0)
    others = ndimage.distance_transform_edt(~(sheets & (numbers % 2 == 0)))
    lost = sheets & (numbers % 2 == 1) & (others <= 3)  # the side that faces the other sheet
    filled, recall, surface_dice = by_distance(sheets & ~lost, sheets)
    assert filled == [0.0, 0.0, 0.0]
    assert recall[0] < 0.6
    assert min(recall[1:]) > 0.99
    assert surface_dice == 1.0


def test_a_prediction_that_is_right_fills_no_gap_and_an_empty_one_has_no_recall():
    sheets, _ = wavy(1)
    assert by_distance(sheets, sheets) == ([0.0] * 3, [1.0] * 3, 1.0)
    assert by_distance(sheets & False, sheets) == ([0.0] * 3, [0.0] * 3, 0.0)
    assert by_distance(sheets | True, sheets)[:2] == ([1.0] * 3, [1.0] * 3)
