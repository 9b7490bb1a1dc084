"""Scores of bars drawn by hand, of degenerate masks, and as the challenge published them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import skimage.morphology
from scipy import ndimage

from scoring import gaps, homology, partitions, surface
from scoring.metrics import (
    DEFAULT,
    SCORES,
    mean_scores,
    otsu_threshold,
    score,
    vesuvius_score,
)
from tests.scoring.test_surface import surface_dice

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("LAMINA_SHARED", ROOT.parent / "shared"))
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
    prediction[0] = 1  # a false plate, all of it where nobody labeled
    truth[0] = 2
    scores = score(prediction, truth, ignore_label=2)
    assert [scores[name] for name in RATIOS] == [1.0, 1.0, 1.0, 1.0]
    assert (scores["components"], scores["components_truth"]) == (1, 1)
    assert score(prediction, np.where(truth == 2, 0, truth))["dice"] < 0.2


def test_a_class_two_is_refused_unless_it_is_the_ignore_label():
    truth = bar(2) + 2 * bar(8)
    for names in (None, ["vesuvius_score"]):
        with pytest.raises(ValueError, match="0 and 1, as no ignore_label is given, got 0, 1, 2"):
            score(bar(2), truth, names=names)
        assert set(score(bar(2), truth, ignore_label=2, names=names).values()) == {1.0}
    assert vesuvius_score(bar(2), truth)["score"] == 1.0  # the rule of the challenge


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


# ---------------------------------------------------------------------------- every score


def everything(prediction, truth, **options):
    return score(prediction, truth, names=SCORES, probs=np.asarray(prediction, float), **options)


RING = np.array([[[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0] * 5]])
BALL = np.pad(np.ones((3, 3, 3), int), 1)


def test_known_scores_of_a_broken_bar():
    truth, prediction = bar(2, 8), bar(2, 8)
    prediction[2, 2, 5] = 0  # pieces of 3 and 4 voxels, 1 missed
    found = everything(prediction, truth)
    assert (found["dice"], found["iou"]) == (pytest.approx(14 / 15), pytest.approx(7 / 8))
    assert (found["components"], found["components_truth"]) == (2, 1)
    assert [found[f"betti_error_{dim}"] for dim in range(3)] == [1, 0, 0]
    assert (found["topology_precision"], found["topology_sensitivity"]) == (1.0, 7 / 8)
    assert found["cldice"] == pytest.approx(2 * 7 / 8 / (1 + 7 / 8))
    split = 3 / 8 * np.log2(8 / 3) + 4 / 8 + 1 / 8 * 3
    assert (found["voi_split"], found["voi_merge"]) == (pytest.approx(split), 0.0)
    assert found["voi_score"] == pytest.approx(1 / (1 + 0.3 * split))
    # The gap is one voxel wide: its corners are corners of the pieces, too.
    assert (found["surface_dice"], found["hausdorff"]) == (1.0, 0.0)


def test_known_scores_of_a_filled_ring_and_a_hollow_ball():
    filled = RING.copy()
    filled[0, 2, 2] = 1
    found = everything(filled, RING)
    assert (found["handles"], found["handles_truth"], found["betti_error_1"]) == (0, 1, 1)
    hollow = BALL.copy()
    hollow[2, 2, 2] = 0
    found = everything(BALL, hollow)
    assert (found["cavities"], found["cavities_truth"], found["betti_error_2"]) == (0, 1, 1)
    assert (found["handles"], found["handles_truth"]) == (0, 0)


def test_distances_are_in_the_unit_of_the_spacing():
    near, far = bar(1, 1), bar(5, 1)  # corners 3 and 4 steps away along x
    found = everything(near, far, spacing=(5, 5, 2))
    assert (found["hd95"], found["hausdorff"], found["assd"]) == (8.0, 8.0, pytest.approx(7.0))
    found = score(near, far, (5, 5, 2), names=["hausdorff@50", "surface_dice@6", "surface_dice@5"])
    assert found == pytest.approx(
        {"hausdorff@50": 6.0, "surface_dice@6": 0.5, "surface_dice@5": 0.0}
    )


def test_the_tolerance_of_a_call_is_that_of_a_surface_dice_without_a_number():
    near, far = bar(1, 1), bar(5, 1)
    found = score(near, far, tolerance=3.0, names=["surface_dice@4", "surface_dice"])
    assert found == pytest.approx({"surface_dice@4": 1.0, "surface_dice": 0.5})
    assert list(found) == ["surface_dice@4", "surface_dice"]


def test_hd95_is_the_95th_percentile():
    # 101 planes of corners, of which the two ends weigh 0.61: 93.61 of 100.22 lie on the other row,
    # and 1, 2, ... 7 off it each one more. 95 % are 95.21.
    long, short = bar(0, 100, (1, 1, 100)), bar(0, 93, (1, 1, 100))
    found = score(long, short, names=["hausdorff@93", "hd95", "hausdorff@95", "hausdorff"])
    assert found == {"hausdorff@93": 0.0, "hd95": 2.0, "hausdorff@95": 2.0, "hausdorff": 7.0}


def test_the_challenge_knows_no_spacing():
    scores = [score(bar(2, 6), bar(5, 6), (1, 1, x), names=["vesuvius_score"]) for x in (1, 3)]
    assert scores[0] == scores[1]
    assert scores[0]["vesuvius_score"] < 1.0


def test_a_skeleton_that_thinning_loses_is_the_mask_itself():
    even = np.zeros((6, 6, 14), int)
    even[2:4, 2:4, 2:12] = 1
    assert everything(even, even)["cldice"] == 1.0
    assert everything(even, np.where(even == 1, even, 0) * (np.arange(14) < 7))[
        "topology_precision"
    ] == pytest.approx(0.5)


def test_scores_of_a_box_are_those_of_a_volume_around_it():
    rng = np.random.default_rng(0)
    fields = [ndimage.gaussian_filter(rng.normal(size=(14, 15, 16)), 1.2) for _ in range(2)]
    small = [(field > 0.05).astype(np.uint8) for field in fields]
    large = [np.pad(mask, ((3, 0), (2, 9), (0, 5))) for mask in small]
    tiled = {"toposcore", "vesuvius_score"} | {f"betti_matching_f1_{dim}" for dim in range(3)}
    names = [name for name in SCORES if name not in tiled | {"ece"}]
    assert score(*small, names=names) == score(*large, names=names)


def test_one_thread_scores_as_two():
    rng = np.random.default_rng(1)
    masks = (rng.random((2, 9, 10, 11)) > 0.7).astype(np.uint8)
    assert everything(*masks, threads=1) == everything(*masks, threads=2)


# ---------------------------------------------------------------------------- shared work


def counted(monkeypatch, module, name):
    """A list that gets an element for every call of module.name."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(1) or function(*a, **k))
    return calls


def test_what_scores_share_is_made_once_for_each_mask(monkeypatch):
    widths = counted(monkeypatch, gaps, "gap_widths")
    calls = [
        counted(monkeypatch, surface, "extract"),
        counted(monkeypatch, surface, "nearest_distances"),
        counted(monkeypatch, partitions, "label"),
        counted(monkeypatch, skimage.morphology, "skeletonize"),
    ]
    tiles = counted(monkeypatch, homology, "_deaths")
    # Components of the background, for cavities, are labeled apart.
    names = [
        name
        for name in SCORES
        if not name.startswith(("cav", "hand", "betti", "topos", "ves", "ece"))
    ]
    score(bar(2, 8), bar(3, 8), names=[*names, "surface_dice@1", "hausdorff@50", "gap_filled@2:4"])
    assert [len(made) for made in calls] == [2, 2, 2, 2]
    assert len(widths) == 1
    assert not tiles
    everything(bar(2, 8), bar(3, 8))
    assert len(calls[0]) == 4
    assert len(tiles) == 2 * 8


def test_what_is_not_asked_for_is_not_made(monkeypatch):
    for module, name in ((surface, "extract"), (partitions, "label"), (homology, "_deaths")):
        monkeypatch.setattr(module, name, None)
    assert score(bar(3, 4), bar(1, 5), names=["dice", "recall"]) == {
        "dice": pytest.approx(6 / 9), "recall": pytest.approx(3 / 5),
    }  # fmt: skip


# ---------------------------------------------------------------------------- the table


def test_the_table_says_of_every_score_what_is_better_and_what_it_costs():
    assert {kind.better for kind in SCORES.values()} == {"higher", "lower", None}
    assert {kind.cost for kind in SCORES.values()} == {"cheap", "moderate", "slow"}
    assert all(SCORES[name].cost == "cheap" for name in DEFAULT)
    better, worse = everything(bar(2, 8), bar(2, 8)), everything(bar(6, 4), bar(2, 8))
    for name, kind in SCORES.items():
        gain = better[name] - worse[name]
        assert gain >= 0 if kind.better == "higher" else gain <= 0 or kind.better is None


def test_the_default_scores_are_the_cheap_ones_by_their_old_names():
    found = score(bar(3), bar(2))
    assert tuple(found) == DEFAULT
    assert {"dice", "precision", "recall", "surface_dice", "components", "components_truth"} <= set(
        found
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "surfacedice",
            "expected the name of a score, got surfacedice; the nearest is surface_dice",
        ),
        ("nsd@2", "expected the name of a score, got nsd@2; the nearest is surface_dice"),
        ("", "expected the name of a score, got ; the nearest is"),
        ("hd95@3", "expected hd95 without a number, got hd95@3"),
        ("surface_dice@near", "expected surface_dice@TOLERANCE, got surface_dice@near"),
        ("hausdorff@", "expected hausdorff@PERCENTILE, got hausdorff@"),
        ("hausdorff@101", "percentile: expected a number from 0 to 100, got 101"),
        ("surface_dice@-1", "tolerance: expected a number of 0 or more, got -1"),
    ],
)
def test_a_name_of_no_score_is_refused(name, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        score(bar(1), bar(2), names=["dice", name])


# ---------------------------------------------------------------------------- the challenge


def challenge_cases():
    """(name, prediction, truth, published scores) of the reference masks, if they are there."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        return []
    published = json.loads((folder / "vesuvius_scores.json").read_text())
    masks = np.load(folder / "vesuvius_masks.npz")
    return [
        pytest.param(masks[f"{name}/prediction"], masks[f"{name}/truth"], scores, id=name)
        for name, scores in published.items()
    ]


CHALLENGE = challenge_cases()


@pytest.mark.skipif(not CHALLENGE, reason=f"no masks of the challenge in {SHARED}/reference")
@pytest.mark.parametrize(("prediction", "truth", "published"), CHALLENGE)
def test_the_challenge_is_scored_as_published(prediction, truth, published):
    found = vesuvius_score(prediction, truth)
    assert found.pop("counts") == {int(k): tuple(v) for k, v in published["counts"].items()}
    assert found == {name: pytest.approx(published[name], abs=1e-9) for name in found}
    assert score(prediction, truth, (3, 1, 1), 2, names=["vesuvius_score"]) == {
        "vesuvius_score": pytest.approx(published["score"], abs=1e-9)
    }


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (bar(2) * 0, bar(2) * 0, 1.0),
        (bar(2) * 0, bar(2), 0.65),
        (bar(2), bar(2) * 0, 0.65),
        (bar(2), bar(2), 1.0),
        (bar(2), np.full_like(bar(2), 2), 1.0),
        (bar(2) * 0 + 1, bar(2) * 0 + 1, 1.0),
    ],
    ids=["both empty", "prediction empty", "truth empty", "equal", "all ignored", "all foreground"],
)
def test_the_challenge_scores_degenerate_masks_as_documented(prediction, truth, expected):
    found = vesuvius_score(prediction, truth)
    assert found["score"] == pytest.approx(expected, abs=1e-12)
    assert found["counts"] == dict.fromkeys(range(3), (0, 0, 0))


def test_the_challenge_ignores_what_nobody_labeled():
    truth, prediction = bar(2, 6), bar(2, 6)
    prediction[0], truth[0] = 1, 2
    assert vesuvius_score(prediction, truth)["score"] == 1.0
    assert vesuvius_score(prediction, np.where(truth == 2, 0, truth))["score"] < 0.8


# ---------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 3), int), r"of one shape .*got \(2, 2, 2\)"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), r"of one shape \(D, H, W\)"),
        (np.zeros((2, 2, 2)), np.zeros((2, 2, 2), int), "prediction: .* got float64"),
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 2)), "truth: .* got float64"),
        (np.full((2, 2, 2), 2), np.zeros((2, 2, 2), int), "prediction: .* 0 and 1, got 2"),
        (np.zeros((2, 2, 2), int), np.full((2, 2, 2), 3), "truth: .* 0 and 1, .* got 3"),
    ],
)
def test_what_is_no_pair_of_masks_is_refused_by_name(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        score(prediction, truth)


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
