"""Every score of degenerate masks, of shapes drawn by hand, and of awkward arrays."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import ndimage

from scoring import homology
from scoring.metrics import (
    SCORES,
    mean_scores,
    score,
    vesuvius_score,
)
from scoring.partitions import count_components
from tests.scoring.test_surface import surface_dice

SHAPE = (5, 5, 12)
TILED = {"toposcore", "vesuvius_score"} | {f"betti_matching_f1_{dim}" for dim in range(3)}


def bar(start, length=4, shape=SHAPE):
    """A bar of one voxel's width along x in the middle of an empty volume."""
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 2, shape[1] // 2, start : start + length] = 1
    return mask


def everything(prediction, truth, **options):
    return score(prediction, truth, names=SCORES, probs=np.asarray(prediction, float), **options)


# ---------------------------------------------------------------------------- degenerate

EMPTY, FULL = np.zeros(SHAPE, np.uint8), np.ones(SHAPE, np.uint8)
TWO = bar(0, 2) | bar(3, 2)  # two pieces in one tile
CASES = {
    "both empty": (EMPTY, EMPTY),
    "all ignored": (TWO, np.full_like(TWO, 2)),
    "prediction empty": (EMPTY, TWO),
    "truth empty": (TWO, EMPTY),
    "one voxel": (bar(1, 1), bar(1, 1)),
    "one voxel, elsewhere": (bar(1, 1), bar(5, 1)),  # its corners are 3 and 4 steps away
    "all foreground": (FULL, FULL),
}
DIAGONAL = math.sqrt(5**2 + 5**2 + 12**2)
OVERLAP, DISTANCE = (1, 1, 0, 0, 1, 0, 1), (0, 0, DIAGONAL, DIAGONAL, 0, 4, 0)
NONE, ALWAYS = (0,) * 7, (1,) * 7
EXPECTED = {
    "dice": OVERLAP, "iou": OVERLAP, "precision": OVERLAP, "recall": OVERLAP,
    "surface_dice": OVERLAP, "cldice": OVERLAP,
    "topology_precision": OVERLAP, "topology_sensitivity": OVERLAP,
    "hd95": DISTANCE, "hausdorff": DISTANCE, "assd": (*DISTANCE[:5], 3.5, 0),
    "voi_split": (0, 0, 0, 1, 0, 0, 0), "voi_merge": (0, 0, 1, 0, 0, 0, 0),
    "voi_score": (1, 1, 1 / 1.3, 1 / 1.3, 1, 1, 1),
    "components": (0, 0, 0, 2, 1, 1, 1), "components_truth": (0, 0, 2, 0, 1, 1, 1),
    "betti_error_0": (0, 0, 2, 2, 0, 0, 0),
    "handles": NONE, "handles_truth": NONE, "betti_error_1": NONE,
    "cavities": NONE, "cavities_truth": NONE, "betti_error_2": NONE,
    "betti_matching_f1_0": (1, 1, 0, 1 / 3, 1, 1, 1),
    "betti_matching_f1_1": ALWAYS, "betti_matching_f1_2": ALWAYS,
    "toposcore": (1, 1, 0, 1 / 3, 1, 1, 1),
    "sheet_recall": (1, 1, 0, 1, 1, 1, 1), "gap_filled": NONE,
    "ece": (0, 0, 4 / 300, 4 / 300, 0, 2 / 300, 0),
    "vesuvius_score": (1, 1, 0.35 / 1.3, 0.1 + 0.35 / 1.3, 1, 0.65, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_score_of_degenerate_masks(case):
    place = list(CASES).index(case)
    found = everything(*CASES[case], ignore_label=2)
    assert found == pytest.approx({name: EXPECTED[name][place] for name in SCORES})


def test_one_voxel_in_a_volume_of_one_voxel():
    one = np.ones((1, 1, 1), np.uint8)
    place = list(CASES).index("one voxel")
    assert everything(one, one) == {name: EXPECTED[name][place] for name in SCORES}
    assert count_components(one) == 1


@pytest.mark.parametrize("shape", [(0, 0, 0), (0, 3, 3), (3, 0, 3), (3, 3, 0)], ids=str)
def test_a_volume_without_voxels_scores_as_nothing_of_nothing(shape):
    nothing = np.zeros(shape, bool)
    assert everything(nothing, nothing) == {name: EXPECTED[name][0] for name in SCORES}


def test_all_foreground_has_the_border_of_the_volume_as_surface():
    full = np.ones((4, 5, 6), np.uint8)
    assert surface_dice(full, bar(2, 1, full.shape), tolerance=1.0) < 0.2


def test_no_score_of_degenerate_masks_is_missing_from_a_mean():
    empty, full = np.zeros((3, 4, 5), int), np.ones((3, 4, 5), int)
    rows = [everything(*masks) for masks in ((empty, full), (full, empty), (full, full))]
    assert all(np.isfinite(value) for value in mean_scores(rows).values())


# ---------------------------------------------------------------------------- drawn by hand


def placed(*rows):
    """Planes of rows of text, # is foreground, in the first of the 2 x 2 x 2 tiles of a volume."""
    mask = np.zeros((10, 14, 22), np.uint8)
    for z, text in enumerate(rows):
        for y, line in enumerate(text.split()):
            mask[1 + z, 1 + y, 1 : 1 + len(line)] = [c == "#" for c in line]
    return mask


def entropy(*counts):
    return sum(n / sum(counts) * math.log2(sum(counts) / n) for n in counts)


BALL, HOLLOW = ["### ### ###"] * 3, ["### ### ###", "### #.# ###", "### ### ###"]
# Prediction and truth; dice; pieces, handles, cavities of each; split and merge; TopoScore, which
# is the F1 of the one dimension that has a class; Hausdorff distance.
DRAWN = {
    "bar": (["########"], ["########"], 1, (1, 0, 0), (1, 0, 0), (0, 0), 1, 0),
    "broken bar": (
        ["###.####"], ["########"], 14 / 15, (2, 0, 0), (1, 0, 0), (entropy(3, 4, 1), 0), 1 / 3, 0,
    ),
    "two bars that touch": (
        ["########"], ["###.####"], 14 / 15, (1, 0, 0), (2, 0, 0), (0, entropy(3, 4, 1)), 0, 0,
    ),
    "broken ring": (
        ["### #.. ###"], ["### #.# ###"], 14 / 15, (1, 0, 0), (1, 1, 0), (entropy(7, 1), 0), 0, 0,
    ),
    "filled ball": (BALL, HOLLOW, 52 / 53, (1, 0, 0), (1, 0, 1), (0, entropy(26, 1)), 0, 1),
    "hollow ball": (HOLLOW, BALL, 52 / 53, (1, 0, 1), (1, 0, 0), (entropy(26, 1), 0), 1 / 3, 1),
    "sheet with a pinhole": (
        ["##### ##### ##.## ##### #####"], ["##### ##### ##### ##### #####"], 48 / 49,
        (1, 1, 0), (1, 0, 0), (entropy(24, 1), 0), 1 / 3, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_known_scores_of_shapes_drawn_by_hand(name):
    prediction, truth, dice, ours, theirs, information, topology, hausdorff = DRAWN[name]
    found = everything(placed(*prediction), placed(*truth))
    assert found["dice"] == pytest.approx(dice)
    assert found["iou"] == pytest.approx(dice / (2 - dice))
    for dim, kind in enumerate(("components", "handles", "cavities")):
        assert (found[kind], found[f"{kind}_truth"]) == (ours[dim], theirs[dim])
        assert found[f"betti_error_{dim}"] == abs(ours[dim] - theirs[dim])
        expected = 1 if ours[dim] == theirs[dim] else topology
        assert found[f"betti_matching_f1_{dim}"] == pytest.approx(expected)
    assert (found["voi_split"], found["voi_merge"]) == pytest.approx(information)
    assert found["toposcore"] == pytest.approx(topology)
    assert (found["hausdorff"], found["surface_dice"]) == (hausdorff, 1.0)
    expected = 0.3 * topology + 0.35 + 0.35 / (1 + 0.3 * sum(information))
    assert found["vesuvius_score"] == pytest.approx(expected)


# ---------------------------------------------------------------------------- awkward arrays


def noise(shape, share=0.4, seed=0):
    return (np.random.default_rng(seed).random((2, *shape)) < share).astype(np.uint8)


@pytest.mark.parametrize("shape", [*itertools.product((1, 2, 7), repeat=3)], ids=str)
def test_thin_volumes_whose_masks_touch_all_borders_score_as_in_a_wider_one(shape):
    masks = noise(shape, 0.5, seed=sum(shape))
    masks[:, [0, -1], [0, -1], [0, -1]] = 1
    spacing = (2.0, 1.0, 0.7)
    thin, wide = everything(*masks, spacing=spacing), [np.pad(mask, 2) for mask in masks]
    names = [name for name in SCORES if name not in TILED | {"ece"}]
    assert {name: thin[name] for name in names} == score(*wide, spacing, names=names)
    # Tiles are of the volume as it is: an axis of 1 is one tile.
    assert vesuvius_score(*masks)["counts"] == homology.betti_matching(*masks, tiles=(2, 2, 2))


def views(mask):
    """The same values in other layouts, dtypes and byte orders."""
    apart = np.zeros([2 * n for n in mask.shape], mask.dtype)
    apart[::2, ::2, ::2] = mask
    locked = mask.copy()
    locked.setflags(write=False)
    return {
        "Fortran": np.asfortranarray(mask),
        "every second voxel": apart[::2, ::2, ::2],
        "back to front": mask[::-1, :, ::-1].copy()[::-1, :, ::-1],
        "read only": locked,
        "bool in Fortran order": np.asfortranarray(mask, bool),
        "int64": mask.astype(np.int64),
        "uint64": mask.astype(np.uint64),
        "int8": mask.astype(np.int8),
        "other byte order": mask.astype(">i4"),
        "list": mask.tolist(),
    }


@pytest.mark.parametrize("kind", views(np.zeros((1, 1, 1), np.uint8)))
def test_layout_and_dtype_change_no_score(kind):
    masks = noise((7, 8, 9))
    expected = everything(*masks)
    assert everything(*(views(mask)[kind] for mask in masks)) == expected
    assert everything(views(masks[0])[kind], masks[1]) == expected


@pytest.mark.parametrize("label", [2, -1, 255, 300, np.uint8(7), 3.0, None])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16])
def test_an_ignore_label_that_a_truth_cannot_hold_or_does_not_have_ignores_nothing(label, dtype):
    masks = noise((5, 6, 7))
    names = ["dice", "surface_dice", "voi_score"]
    found = score(masks[0], masks[1].astype(dtype), ignore_label=label, names=names)
    assert found == score(*masks, names=names)


def test_a_negative_ignore_label_ignores_as_another():
    prediction, truth = noise((6, 7, 8))
    ignored = np.random.default_rng(1).random(truth.shape) < 0.3
    names = [name for name in SCORES if name not in ("ece", "sheet_recall", "gap_filled")]
    expected, alike = score(prediction * ~ignored, truth * ~ignored, names=names), []
    for label, dtype in ((-1, np.int8), (-100, np.int64), (2, np.uint8), (255, np.uint8)):
        labeled = np.where(ignored, label, truth.astype(np.int64)).astype(dtype)
        found = everything(prediction, labeled, ignore_label=label)
        assert {name: found[name] for name in names} == expected
        alike.append(found)
    assert alike == alike[:1] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads: expected an integer of 1 or more, got 0"),
        ({"threads": None}, "threads: expected an integer of 1 or more, got None"),
        ({"names": "dice"}, "names: expected a list of names of scores, got the text 'dice'"),
        ({"names": [3]}, "expected the name of a score, got 3; the nearest is"),
        ({"ignore_label": "2"}, "ignore_label: expected neither 0 nor 1 but another integer or"),
        ({"ignore_label": 2.5}, "ignore_label: expected neither 0 nor 1 but another integer or"),
        ({"ignore_label": 1}, "ignore_label: expected neither 0 nor 1 but another integer or"),
        ({"tolerance": -1}, "tolerance: expected a number of 0 or more, got -1"),
        ({"spacing": (1, 0, 1)}, "spacing: expected three positive numbers z, y, x,"),
        ({"tolerance": None, "names": ["dice"]}, "tolerance: expected a number of 0 or more, got"),
        ({"spacing": 2.0, "names": ["dice"]}, "spacing: expected three positive numbers z, y, x,"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_before_any_work(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        score(bar(1), bar(2), **options)


# ---------------------------------------------------------------------------- threads


def test_pairs_scored_at_one_time_score_as_one_after_the_other():
    fields = [ndimage.gaussian_filter(noise((14, 15, 16), 0.5, n)[0] * 1.0, 1) for n in range(7)]
    masks = [(field > np.median(field)).astype(np.uint8) for field in fields]
    pairs = list(itertools.pairwise(masks))
    expected = [everything(*pair, spacing=(2.0, 1.0, 0.7)) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(everything, *p, spacing=(2.0, 1.0, 0.7), threads=3) for p in pairs]
        assert [found.result() for found in together] == expected
