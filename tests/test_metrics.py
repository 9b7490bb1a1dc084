"""Scores of bars drawn by hand, of degenerate masks, and against the published package."""

import warnings

import numpy as np
import pytest
from scipy import ndimage

import metrics
from metrics import count_components, mean_scores, otsu_threshold, score, surface_dice

RATIOS = ("dice", "precision", "recall", "surface_dice")


def bar(start, length=4, shape=(5, 5, 12)):
    """A bar of one voxel's width along x in the middle of an empty volume."""
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 2, shape[1] // 2, start : start + length] = 1
    return mask


def ratios(prediction, truth, **options):
    scores = score(prediction, truth, **options)
    return [scores[name] for name in RATIOS]


# ---------------------------------------------------------------------------- by hand


def test_a_mask_equals_itself():
    assert ratios(bar(2), bar(2)) == [1.0, 1.0, 1.0, 1.0]


def test_a_shifted_bar_keeps_its_overlap():
    # 4 predicted, 5 true, 3 shared.
    scores = score(bar(3, 4), bar(1, 5))
    assert scores["dice"] == pytest.approx(2 * 3 / 9)
    assert scores["precision"] == pytest.approx(3 / 4)
    assert scores["recall"] == pytest.approx(3 / 5)


def test_surface_within_the_tolerance_counts_whole_and_beyond_it_not_at_all():
    near, far = bar(2, 2), bar(5, 2)  # their nearest corners are one voxel apart
    assert surface_dice(near, far, tolerance=3.0) == 1.0
    assert surface_dice(near, far, tolerance=0.9) == 0.0
    assert 0.0 < surface_dice(near, far, tolerance=1.0) < 1.0


def test_surface_of_a_plate_shifted_by_one_slice_depends_on_the_slice_spacing():
    lower, upper = np.zeros((2, 6, 8, 8), np.uint8)
    lower[2], upper[3] = 1, 1
    assert surface_dice(lower, upper, spacing=(1, 1, 1), tolerance=1.0) == 1.0
    # Corners of the plates lie on planes 2, 3 and 3, 4: at 5 units one of the two is shared.
    assert surface_dice(lower, upper, spacing=(5, 1, 1), tolerance=2.0) == pytest.approx(0.5)
    assert surface_dice(lower, upper, spacing=(5, 1, 1), tolerance=5.0) == 1.0


def test_components_touch_over_corners():
    mask = np.zeros((3, 3, 6), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 5] = 1
    scores = score(mask, bar(0, 2, mask.shape))
    assert (scores["components"], scores["components_truth"]) == (2, 1)


def test_ignored_voxels_are_left_out_of_every_score():
    truth, prediction = bar(2, 4), bar(2, 4)
    prediction[0] = 1  # a false plate, all of it where nobody labelled
    truth[0] = 2
    scores = score(prediction, truth)
    assert [scores[name] for name in RATIOS] == [1.0, 1.0, 1.0, 1.0]
    assert (scores["components"], scores["components_truth"]) == (1, 1)
    assert score(prediction, np.where(truth == 2, 0, truth), ignore_label=None)["dice"] < 0.2


def test_another_ignore_label_is_honoured():
    truth = np.where(bar(6) == 1, 255, bar(2)).astype(np.uint8)
    assert ratios(bar(2, 8), truth, ignore_label=255)[:3] == [1.0, 1.0, 1.0]


def test_bool_and_integer_masks_score_alike():
    expected = score(bar(3), bar(2))
    assert score(bar(3).astype(bool), bar(2).astype(bool)) == expected
    assert score(bar(3).astype(np.int64), bar(2).astype(np.int16)) == expected


def test_means_are_over_cases():
    rows = [{"dice": 1.0, "components": 3}, {"dice": 0.5, "components": 4}]
    assert mean_scores(rows) == {"dice": 0.75, "components": 3.5}
    assert mean_scores([]) == {}


# ---------------------------------------------------------------------------- degenerate


def test_empty_prediction_of_something_scores_zero():
    scores = score(np.zeros_like(bar(2)), bar(2))
    assert [scores[name] for name in RATIOS] == [0.0, 0.0, 0.0, 0.0]
    assert (scores["components"], scores["components_truth"]) == (0, 1)


def test_something_predicted_of_an_empty_truth_scores_zero():
    assert ratios(bar(2), np.zeros_like(bar(2))) == [0.0, 0.0, 0.0, 0.0]


def test_nothing_predicted_of_nothing_scores_one():
    assert ratios(np.zeros((3, 3, 3), int), np.zeros((3, 3, 3), int)) == [1.0, 1.0, 1.0, 1.0]


def test_one_voxel_in_a_volume_of_one_voxel():
    one = np.ones((1, 1, 1), np.uint8)
    assert ratios(one, one) == [1.0, 1.0, 1.0, 1.0]
    assert count_components(one) == 1


def test_all_foreground_has_the_border_of_the_volume_as_surface():
    full = np.ones((4, 5, 6), np.uint8)
    assert ratios(full, full) == [1.0, 1.0, 1.0, 1.0]
    assert surface_dice(full, bar(2, 1, full.shape), tolerance=1.0) < 0.2


def test_all_ignored_scores_as_nothing_of_nothing():
    scores = score(np.ones((3, 3, 3), np.uint8), np.full((3, 3, 3), 2))
    assert [scores[name] for name in RATIOS] == [1.0, 1.0, 1.0, 1.0]
    assert (scores["components"], scores["components_truth"]) == (0, 0)


# ---------------------------------------------------------------------------- the package


def random_pair(rng):
    """Two blobby masks that are not empty, their spacing, and a tolerance."""
    field = ndimage.gaussian_filter(rng.normal(size=rng.integers(3, 16, 3)), 1.0)
    moved = ndimage.shift(field, rng.uniform(-2, 2, 3), order=1, mode="nearest")
    cuts = np.quantile(field, rng.uniform(0.2, 0.9)), np.quantile(moved, rng.uniform(0.2, 0.9))
    spacing = tuple(rng.uniform(0.3, 5.0, 3))
    return field > cuts[0], moved > cuts[1], spacing, rng.choice([0.0, 0.7, 2.0, 6.0])


@pytest.mark.parametrize("most_offsets", [0, metrics._MOST_OFFSETS])
def test_surface_dice_agrees_with_the_published_package(most_offsets, monkeypatch):
    package = pytest.importorskip("surface_distance")
    monkeypatch.setattr(metrics, "_MOST_OFFSETS", most_offsets)  # 0: by distance transform
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(20):
        prediction, truth, spacing, tolerance = random_pair(rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it still calls SciPy by names that are going away
            distances = package.compute_surface_distances(truth, prediction, spacing)
        expected = package.compute_surface_dice_at_tolerance(distances, tolerance)
        seen.append(expected)
        assert surface_dice(prediction, truth, spacing, tolerance) == pytest.approx(
            expected, abs=1e-6
        )
    assert np.std(seen) > 0.1  # not twenty times 0 or 1


# ---------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 3), int), r"of one shape .*got \(2, 2, 2\)"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), r"of one shape \(D, H, W\)"),
        (np.zeros((2, 2, 2)), np.zeros((2, 2, 2), int), "prediction: .* got float64"),
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 2)), "truth: .* got float64"),
        (np.full((2, 2, 2), 2), np.zeros((2, 2, 2), int), "prediction: .* 0 and 1, got 2"),
        (np.zeros((2, 2, 2), int), np.full((2, 2, 2), 3), r"truth: .* 0, 1 and 2 .*, got 3"),
    ],
)
def test_what_is_no_pair_of_masks_is_refused_by_name(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        score(prediction, truth)


def test_impossible_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^spacing: expected three positive numbers"):
        score(bar(1), bar(1), spacing=(1, 0, 1))
    with pytest.raises(ValueError, match=r"^tolerance: expected"):
        score(bar(1), bar(1), tolerance=-1)
    with pytest.raises(ValueError, match=r"^ignore_label: expected neither 0 nor 1"):
        score(bar(1), bar(1), ignore_label=1)


# ---------------------------------------------------------------------------- Otsu


def otsu_by_search(image):
    """The level that makes the weighted variance within the classes smallest, tried one by one."""
    levels = np.unique(image)[:-1]
    within = [
        (image <= t).sum() * image[image <= t].var() + (image > t).sum() * image[image > t].var()
        for t in levels
    ]
    return levels[int(np.argmin(within))]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_otsu_finds_the_best_of_all_levels(dtype):
    rng = np.random.default_rng(0)
    image = np.where(rng.random((6, 7, 8)) < 0.3, rng.normal(160, 20, (6, 7, 8)), 0)
    image = np.where(image == 0, rng.normal(60, 25, image.shape), image).clip(0, 255)
    image = image.astype(dtype) * (1 if dtype == np.uint8 else 100)
    assert otsu_threshold(image) == otsu_by_search(image)


def test_otsu_of_floats_lies_between_two_well_separated_values():
    image = np.float32([0.1, 0.12, 0.11, 0.9, 0.91, 0.1]).reshape(1, 2, 3)
    assert ((image > otsu_threshold(image)) == (image > 0.5)).all()


def test_otsu_of_negative_integers_keeps_their_offset():
    image = np.array([-1000, -990, 40, 50], np.int16)
    assert otsu_threshold(image) == -990.0


def test_otsu_of_a_constant_image_leaves_nothing_above():
    assert otsu_threshold(np.full((2, 2, 2), 7, np.uint8)) == 7.0


def test_otsu_refuses_voxels_that_are_no_numbers():
    with pytest.raises(ValueError, match="finite"):
        otsu_threshold(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="finite"):
        otsu_threshold(np.empty((0, 2, 2)))
