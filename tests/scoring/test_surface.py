"""Surface scores of plates and voxels drawn by hand, and against the published package."""

import math
import warnings

import numpy as np
import pytest
from scipy import ndimage, spatial

from scoring import dilation
from scoring import surface as surfaces
from scoring.metrics import Comparison


def surface_pair(prediction, truth, spacing=(1.0, 1.0, 1.0), *, threads=2):
    prediction, truth = (np.asarray(mask, bool) for mask in (prediction, truth))
    return Comparison(prediction, truth, spacing, 2.0, threads).surfaces


def surface_dice(prediction, truth, spacing=(1.0, 1.0, 1.0), tolerance=2.0):
    return surface_pair(prediction, truth, spacing).dice(tolerance)


def plate(z, shape=(9, 8, 8)):
    """One slice of foreground: its corners lie on the planes z and z + 1, half of the area each."""
    mask = np.zeros(shape, bool)
    mask[z] = True
    return mask


def voxel(*place, shape=(5, 5, 9)):
    mask = np.zeros(shape, bool)
    mask[place] = True
    return mask


EMPTY, FULL = np.zeros((9, 8, 8), bool), np.ones((9, 8, 8), bool)


# ---------------------------------------------------------------------------- by hand


def test_distances_of_two_plates_depend_on_the_slice_spacing():
    # From the planes 2 and 3 to the plane 5: 3 and 2 slices; from 5 and 6 to 3: 2 and 3.
    near, far = plate(2), plate(5)
    pair = surface_pair(near, far)
    assert [pair.hausdorff(p) for p in (100, 95, 50)] == [3.0, 3.0, 2.0]
    assert pair.assd() == pytest.approx(2.5)
    pair = surface_pair(near, far, (5, 1, 1))
    assert pair.hausdorff(95) == 15.0 and pair.assd() == pytest.approx(12.5)


def test_surface_dice_of_two_plates_at_several_tolerances():
    # Half of the area is 2 slices away, the other half 3.
    pair = surface_pair(plate(2), plate(5))
    assert list(map(pair.dice, [1.9, 2.0, 2.9, 3.0])) == pytest.approx([0.0, 0.5, 0.5, 1.0])
    pair = surface_pair(plate(2), plate(5), (0.5, 9, 9))
    assert list(map(pair.dice, [0.9, 1.0])) == pytest.approx([0.0, 0.5])


def test_distances_of_two_voxels_in_a_row():
    # Four corners are 3 voxels from the other one, four are 4.
    pair = surface_pair(voxel(2, 2, 1), voxel(2, 2, 5), (1.0, 1.0, 2.0))
    assert (pair.hausdorff(50), pair.hausdorff(51), pair.hausdorff()) == (6.0, 8.0, 8.0)
    assert pair.assd() == pytest.approx(7.0)


def test_directions_differ_where_one_surface_is_a_part_of_the_other():
    # Every corner of the first is one of both; half of both's area is 2 or 3 slices away from it.
    both = plate(2) | plate(5)
    pair = surface_pair(plate(2), both)
    assert (pair.distances[0][0] == 0).all() and (pair.distances[1][0] > 0).any()
    assert pair.assd() == pytest.approx((2 + 3) / 4 * 2 / 3)
    assert pair.hausdorff() == 3.0


def test_a_tolerance_of_whole_steps_reaches_them_whatever_rounding_says():
    step, steps = 0.1 * 3, 31
    assert int(9.3 / step) < steps and steps * step <= 9.3
    first, last = plate(0, (33, 2, 2)), plate(32, (33, 2, 2))  # planes 0 and 1, 32 and 33
    assert surface_dice(first, last, (step, 1, 1), 9.3) == pytest.approx(0.5)


def test_the_largest_distance_is_that_of_the_smallest_area():
    codes, area = np.arange(2), np.array([1.0, 1e-13])
    assert surfaces._percentile(np.array([1.0, 5.0]), codes, area, 100) == 5.0


# ---------------------------------------------------------------------------- degenerate


@pytest.mark.parametrize(
    ("prediction", "truth", "dice", "distance"),
    [
        (EMPTY, EMPTY, 1.0, 0.0),
        (EMPTY, plate(2), 0.0, math.sqrt(18**2 + 8**2 + 8**2)),
        (plate(2), EMPTY, 0.0, math.sqrt(18**2 + 8**2 + 8**2)),
        (FULL, FULL, 1.0, 0.0),
    ],
    ids=["both empty", "prediction empty", "truth empty", "all foreground"],
)
def test_degenerate_masks(prediction, truth, dice, distance):
    pair = surface_pair(prediction, truth, (2.0, 1.0, 1.0))
    assert pair.dice(1.0) == dice
    assert pair.hausdorff(95) == pair.hausdorff() == pair.assd() == pytest.approx(distance)


def test_a_single_voxel_in_a_volume_of_one():
    pair = surface_pair(np.ones((1, 1, 1), bool), np.ones((1, 1, 1), bool))
    assert (pair.dice(0.0), pair.hausdorff(), pair.assd()) == (1.0, 0.0, 0.0)


def test_a_wider_volume_changes_nothing_but_the_diagonal():
    rng = np.random.default_rng(3)
    small = [ndimage.gaussian_filter(rng.normal(size=(7, 8, 9)), 1.0) > 0.1 for _ in range(2)]
    large = [np.pad(mask, ((4, 1), (0, 6), (70, 2))) for mask in small]
    spacing = (2.0, 1.0, 0.7)
    here, there = surface_pair(*small, spacing), surface_pair(*large, spacing)
    for ask in (lambda p: p.dice(1.5), lambda p: p.hausdorff(90), lambda p: p.assd()):
        assert ask(here) == ask(there)
    assert there.diagonal > here.diagonal


@pytest.mark.parametrize(
    "spacing",
    [
        (1, 0, 1),
        (1, 1),
        (1, 1, np.inf),
        (1e-31, 1, 1),
        (1, 1, 1e31),
        2.0,
        None,
        "abc",
        (1, None, 1),
    ],
    ids=str,
)
def test_an_impossible_spacing_is_refused(spacing):
    expected = r"^spacing: expected three positive numbers z, y, x, from 1e-30 to 1e30, got"
    with pytest.raises(ValueError, match=expected):
        surface_dice(plate(2), plate(3), spacing)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, 10**400, None, "2"], ids=str)
def test_an_impossible_tolerance_or_percentile_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^tolerance: expected a number of 0 or more, got"):
        surface_dice(plate(2), plate(3), tolerance=wrong)
    with pytest.raises(ValueError, match=r"^percentile: expected a number from 0 to 100, got"):
        surface_pair(plate(2), plate(3)).hausdorff(wrong)


def test_the_smallest_and_the_largest_spacing_are_worked_with():
    for step in (1e-30, 1e30):
        pair = surface_pair(plate(2), plate(5), (step, step, step))
        assert pair.dice(2 * step) == pytest.approx(0.5)
        assert pair.hausdorff() == pytest.approx(3 * step, rel=1e-12)
        assert pair.assd() == pytest.approx(2.5 * step, rel=1e-12)
        assert (pair.dice(0.0), pair.dice(1e300)) == (0.0, 1.0)


# ---------------------------------------------------------------------------- references


def random_pair(rng):
    """Two blobby masks that are not empty, their spacing, and a tolerance."""
    field = ndimage.gaussian_filter(rng.normal(size=rng.integers(3, 16, 3)), 1.0)
    moved = ndimage.shift(field, rng.uniform(-2, 2, 3), order=1, mode="nearest")
    cuts = np.quantile(field, rng.uniform(0.2, 0.9)), np.quantile(moved, rng.uniform(0.2, 0.9))
    spacing = tuple(rng.uniform(0.3, 5.0, 3))
    return field > cuts[0], moved > cuts[1], spacing, rng.choice([0.0, 0.7, 2.0, 6.0])


# Each way to a distance in turn, and surface Dice by them.
WAYS = {
    "as chosen": {},
    "rows": {"_VOXELS_PER_QUERY": 0, "_ROWS_PER_VOXEL": 10**9},
    "tree": {"_VOXELS_PER_QUERY": 0, "_ROWS_PER_VOXEL": 0},
    "transform": {"_VOXELS_PER_QUERY": 10**9, "_ROWS_PER_VOXEL": 0},
}


@pytest.mark.parametrize("way", WAYS)
def test_surface_scores_agree_with_the_published_package(way, monkeypatch):
    package = pytest.importorskip("surface_distance")
    for name, value in WAYS[way].items():
        monkeypatch.setattr(surfaces, name, value)
    monkeypatch.setattr(dilation, "MOST_ROWS", dilation.MOST_ROWS if way == "as chosen" else 13)
    rng = np.random.default_rng(0)
    found, expected = [], []
    for _ in range(100):
        prediction, truth, spacing, tolerance = random_pair(rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it still calls SciPy by names that are going away
            theirs = package.compute_surface_distances(truth, prediction, spacing)
        averages = package.compute_average_surface_distance(theirs)
        pair = surface_pair(prediction, truth, spacing)
        tolerances = (tolerance, min(spacing), 1.5 * max(spacing))
        found.append((*map(pair.dice, tolerances), pair.assd()))
        found[-1] += tuple(pair.hausdorff(p) for p in (50, 95, 100))
        dices = (package.compute_surface_dice_at_tolerance(theirs, one) for one in tolerances)
        areas = [theirs[f"surfel_areas_{of}"].sum() for of in ("gt", "pred")]
        expected.append((*dices, np.average(averages, weights=areas)))
        expected[-1] += tuple(package.compute_robust_hausdorff(theirs, p) for p in (50, 95, 100))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (np.std(expected, axis=0) > 0.05).all()  # not a hundred times the same


@pytest.mark.parametrize("spacing", [(0.2, 0.3, 0.7), (0.1, 0.1, 0.3), (4.97, 1.03, 1.03)], ids=str)
@pytest.mark.parametrize("way", [10**9, 13], ids=["packed rows", "distances"])
def test_a_tolerance_at_a_distance_is_met_as_in_the_published_package(spacing, way, monkeypatch):
    package = pytest.importorskip("surface_distance")
    monkeypatch.setattr(dilation, "MOST_ROWS", way)
    rng, met = np.random.default_rng(0), 0
    steps = np.stack(np.meshgrid(*[np.arange(5)] * 3), -1).reshape(-1, 3)
    lengths = np.unique(np.sqrt(((steps * spacing) ** 2).sum(axis=1)))  # as rounded
    for _ in range(8):
        masks = rng.random((2, *rng.integers(3, 12, 3))) < rng.choice([0.01, 0.03, 0.2])
        if not masks.any(axis=(1, 2, 3)).all():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = package.compute_surface_distances(masks[1], masks[0], spacing)
        pair, nominal = surface_pair(*masks, spacing), np.round(np.arange(0.3, 2.0, 0.1), 1)
        for tolerance in (*rng.choice(lengths, 8), *nominal[::3]):
            expected = package.compute_surface_dice_at_tolerance(theirs, tolerance)
            assert pair.dice(tolerance) == pytest.approx(expected, abs=1e-6)
            met += tolerance in theirs["distances_gt_to_pred"]
    assert met > 5


def test_a_distance_is_compared_with_the_tolerance_as_rounded():
    assert 3 * 0.2 > 0.6 == 2 * 0.3
    first, third = plate(0), plate(4)  # planes 0 and 1, 4 and 5: 4 and 3 steps apart
    assert surface_dice(first, third, (0.2, 9, 9), 0.6) == 0.0
    assert surface_dice(first, third, (0.2, 9, 9), 3 * 0.2) == pytest.approx(0.5)
    assert surface_dice(plate(0), plate(3), (0.3, 9, 9), 0.6) == pytest.approx(0.5)


def test_percentiles_that_half_of_an_area_meets_agree_with_the_published_package():
    package = pytest.importorskip("surface_distance")
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape, spacing = rng.integers(4, 20, 3), tuple(rng.uniform(0.3, 5.0, 3))
        masks = np.zeros((2, *shape), bool)
        for mask in masks:  # one to three voxels each, whose corners weigh the same
            mask[tuple(rng.integers(0, shape, (rng.integers(1, 4), 3)).T)] = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = package.compute_surface_distances(masks[1], masks[0], spacing)
        pair = surface_pair(*masks, spacing)
        for percentile in (25, 50, 75, 95):
            expected = package.compute_robust_hausdorff(theirs, percentile)
            assert pair.hausdorff(percentile) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 63.0, 64.0, 65.5, 130.0])
def test_rows_of_several_words_are_dilated_as_pairs_of_corners_say(tolerance):
    rng = np.random.default_rng(1)
    prediction, truth = rng.random((2, 2, 3, 200)) < 0.004
    found = [surfaces.extract(mask) for mask in (prediction, truth)]
    both = [(surface, surfaces.is_mixed(surface.codes)) for surface in found]
    lengths = spatial.distance.cdist(*(np.argwhere(mixed) for _, mixed in both))
    areas = surfaces.surfel_areas((1.0, 1.0, 1.0))
    area = np.concatenate([areas[found.codes[mixed]] for found, mixed in both])
    near = np.concatenate([lengths.min(axis=1), lengths.min(axis=0)]) <= tolerance
    expected = area[near].sum() / area.sum()
    assert surface_dice(prediction, truth, tolerance=tolerance) == pytest.approx(expected)


def test_one_thread_finds_what_two_find():
    rng = np.random.default_rng(4)
    prediction, truth, spacing, _ = random_pair(rng)
    one, two = (surface_pair(prediction, truth, spacing, threads=n) for n in (1, 2))
    assert (one.dice(2.0), one.hausdorff(), one.assd()) == (
        two.dice(2.0),
        two.hausdorff(),
        two.assd(),
    )
