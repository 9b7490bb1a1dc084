"""Scores of several classes: each that of its mask, and the mean; names, ids and faults."""

import numpy as np
import pytest

from scoring import classes as names_of
from scoring import metrics
from scoring.metrics import DEFAULT, SCORES, entry, score

SIZES = {"artery": 3, "vein": 7}
REGIONS = {"vessel": (3, 7), "artery": 3, "organ": (9,)}


def volumes(seed, values, shape=(6, 9, 14), ignore=None):
    """Random blocks of these values and 0, the truth with ignore too: (prediction, truth)."""
    rng = np.random.default_rng(seed)
    pair = []
    for choices in ((0, *values), (0, *values) if ignore is None else (0, *values, ignore)):
        coarse = rng.choice(choices, [-(-n // 2) for n in shape]).astype(np.uint8)
        fine = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)
        pair.append(fine[: shape[0], : shape[1], : shape[2]])
    return pair


@pytest.mark.parametrize("ignore", [None, 255, 1])
@pytest.mark.parametrize("classes", [SIZES, REGIONS], ids=["classes", "regions"])
def test_each_class_has_the_scores_of_its_mask_and_the_mean_is_theirs(classes, ignore):
    how = {"spacing": (2.0, 1.0, 1.0), "tolerance": 1.0}
    names = [*DEFAULT, "assd", "voi_score", "handles", "surface_dice@2", "betti_matching_f1_1"]
    prediction, truth = volumes(0, names_of.ids_of(names_of.checked(classes)), ignore=ignore)
    found = score(prediction, truth, ignore_label=ignore, names=names, classes=classes, **how)
    alone = {}
    for name, ids in classes.items():
        masks = [np.isin(volume, ids).astype(np.uint8) for volume in (prediction, truth)]
        if ignore is not None:
            masks[1][truth == ignore] = 2
        alone[name] = score(*masks, ignore_label=None if ignore is None else 2, names=names, **how)
    expected = {f"{n}/{c}": alone[c][n] for n in names for c in classes}
    assert {n: s for n, s in found.items() if not n.endswith("/mean")} == expected
    for name in names:
        mean = np.mean([alone[c][name] for c in classes])
        assert found[f"{name}/mean"] == pytest.approx(mean, abs=1e-12)
        assert type(found[f"{name}/mean"]) is float
    assert list(found)[: len(classes) + 1] == [f"dice/{c}" for c in (*classes, "mean")]


def two(classes=(3, 7)):
    """Bars of two classes, of 4 and 2 voxels; predicted 1 aside, and the other's end as vein."""
    truth, prediction = np.zeros((2, 3, 5, 12), np.uint8)
    truth[1, 2, 2:6], truth[1, 2, 8:10] = classes
    prediction[1, 2, 3:7], prediction[1, 2, 8:9] = classes
    return prediction, truth


def test_scores_of_two_bars_by_hand():
    found = score(*two(), names=["dice", "recall", "components"], classes=SIZES)
    assert found == {
        **{"dice/artery": 0.75, "dice/vein": 2 / 3, "dice/mean": (0.75 + 2 / 3) / 2},
        **{"recall/artery": 0.75, "recall/vein": 0.5, "recall/mean": 0.625},
        **{"components/artery": 1, "components/vein": 1, "components/mean": 1.0},
    }


def test_one_class_or_the_mean_alone_is_scored_by_name():
    names = ["dice/vein", "surface_dice@4/mean", "recall/artery"]
    found = score(*two(), names=names, classes=SIZES)
    assert list(found) == names
    assert (found["dice/vein"], found["recall/artery"]) == (2 / 3, 0.75)
    twice = score(*two(), names=["dice/mean", "dice"], classes=SIZES)
    assert list(twice) == ["dice/mean", "dice/artery", "dice/vein"]


def test_a_class_that_no_name_asks_for_is_not_compared(monkeypatch):
    compared = []

    class Counting(metrics.Comparison):
        def __init__(self, prediction, truth, *how):
            compared.append(int(truth.sum()))
            super().__init__(prediction, truth, *how)

    monkeypatch.setattr(metrics, "Comparison", Counting)
    score(*two(), names=["dice/vein"], classes=SIZES)
    assert compared == [2]


def test_a_class_absent_from_both_scores_1_from_one_0_and_counts_in_the_mean():
    prediction, truth = two()
    found = score(prediction, truth, names=["dice"], classes=SIZES | {"organ": 9})
    assert found["dice/organ"] == 1.0
    assert found["dice/mean"] == pytest.approx((0.75 + 2 / 3 + 1) / 3)
    found = score(np.where(prediction == 7, 0, prediction), truth, names=["dice"], classes=SIZES)
    assert (found["dice/vein"], found["dice/mean"]) == (0.0, 0.375)


def test_the_challenges_score_is_given_of_each_class():
    found = score(*two(), names=["vesuvius_score"], classes=SIZES)
    masks = [(volume == 7).astype(np.uint8) for volume in two()]
    assert found["vesuvius_score/vein"] == score(*masks, names=["vesuvius_score"])["vesuvius_score"]


def test_class_names_may_hold_any_character():
    odd = {"a/b": 3, "Grey matter, left. @2": 7}
    found = score(*two(), names=["dice/a/b", "dice"], classes=odd)
    assert list(found) == ["dice/a/b", "dice/Grey matter, left. @2", "dice/mean"]
    assert names_of.split_name("surface_dice@4/a/b") == ("surface_dice@4", "a/b")
    assert names_of.split_name("dice") == ("dice", None)


@pytest.mark.parametrize("name", ["dice/artery", "dice/mean", "dice/a/b"])
def test_a_name_with_a_class_has_the_entry_of_its_score(name):
    assert entry(name) == (SCORES["dice"], ())
    assert entry("surface_dice@4/mean") == (SCORES["surface_dice"], (4.0,))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"names": ["dice/vien"]}, "artery, vein, mean, got dice/vien; the nearest is dice/vein"),
        ({"names": ["dise/vein"]}, "the name of a score, got dise/vein; the nearest is dice"),
        ({"names": ["dice/"]}, "expected a class among artery, vein, mean, got dice/"),
        ({"names": ["dice/vein"], "classes": None}, "dice without a class, as no classes are gi"),
        ({"classes": {}}, "classes: expected {name: id or ids}, got {}"),
        ({"classes": ["artery"]}, "classes: expected {name: id or ids}, got"),
        ({"classes": {"mean": 3}}, "classes: expected names other than 'mean'"),
        ({"classes": {"artery": 0}}, "classes: expected ids of artery that are integers but 0"),
        ({"classes": {"artery": ()}}, "classes: expected ids of artery that are integers but 0"),
        ({"classes": {"artery": "3"}}, "classes: expected ids of artery that are integers but 0"),
        ({"ignore_label": 7}, "classes: expected ids that are not 7, of unlabeled voxels, got it"),
        ({"ignore_label": 0}, "ignore_label: expected neither 0 nor 3 nor 7"),
        ({"classes": {"artery": 3}}, "prediction: expected 0, the ids of artery 3, got 7"),
        ({"truth": 5}, "truth: expected 0, the ids of artery 3, vein 7, got 5"),
        ({"truth": 5, "ignore_label": 255}, "artery 3, vein 7 and 255 (ignored), got 5"),
        ({"prediction": 255, "ignore_label": 255}, "prediction: expected 0, the ids of artery 3"),
        ({"prediction": 0.5}, "prediction: expected a volume of integer ids, got float"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_must_be_is_named(change, message):
    change = dict(change)
    volumes = dict(zip(("prediction", "truth"), two(), strict=True))
    for role in set(change) & set(volumes):
        value = change.pop(role)
        volumes[role] = volumes[role].astype(np.result_type(np.uint8, type(value)))
        volumes[role][0, 0, 0] = value
    with pytest.raises(ValueError) as fault:
        score(**volumes, **{"classes": SIZES} | change)
    assert message in str(fault.value)
