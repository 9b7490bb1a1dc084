"""The expected calibration error: of a few voxels by hand, at the borders of bins, as published."""

import numpy as np
import pytest
import torch

from scoring.calibration import expected_calibration_error
from scoring.metrics import score


def row(*values, dtype=np.float32):
    return np.array(values, dtype).reshape(1, 1, -1)


def ece(probs, truth, **options):
    probs, truth = row(*probs), row(*truth, dtype=bool)
    return expected_calibration_error(probs, truth, **options)


def test_four_voxels_by_hand():
    # Bin of 0.2: mean 0.2, half are foreground. Bins of 0.6 and 0.9: 0.6 and 0.1 off.
    found = ece([0.2, 0.2, 0.6, 0.9], [0, 1, 0, 1], bins=10)
    assert found == pytest.approx(2 / 4 * 0.3 + 1 / 4 * 0.6 + 1 / 4 * 0.1)


def test_probabilities_that_come_true_have_no_error_and_a_sure_error_has_all():
    assert ece([0.25] * 4 + [0.75] * 4, [1, 0, 0, 0, 1, 1, 1, 0]) == pytest.approx(0, abs=1e-7)
    assert ece([0, 1], [0, 1]) == 0.0
    assert ece([1, 0], [0, 1]) == 1.0


def test_a_border_of_two_bins_belongs_to_the_upper_one_and_1_to_the_last():
    # 0.5 and 0.75 share a bin of 2, in which they are off by 0.5 and -0.25.
    assert ece([0.5, 0.75], [1, 0.0], bins=2) == pytest.approx(0.25 / 2)
    assert ece([0.49, 0.75], [1, 0.0], bins=2) == pytest.approx((0.51 + 0.75) / 2)
    assert ece([1.0, 0.75], [0, 1.0], bins=2) == pytest.approx(0.75 / 2)


def test_too_much_in_one_bin_and_too_little_in_its_mirror_image_do_not_cancel():
    # None of those of 0.1 and 8 of 10 of those of 0.9: the likelier class is right in 9 of 10.
    assert ece([0.1] * 10 + [0.9] * 10, [0] * 10 + [1] * 8 + [0] * 2) == pytest.approx(0.1)


@pytest.mark.parametrize("bins", [1, 7, 15, 40])
def test_it_equals_the_published_definition_on_tensors(bins):
    rng = np.random.default_rng(bins)
    probs = rng.beta(0.4, 0.6, (6, 7, 8)).astype(np.float32)
    truth, labeled = rng.random(probs.shape) < probs**2, rng.random(probs.shape) < 0.7
    values, on = (
        torch.from_numpy(probs[labeled]).double(),
        torch.from_numpy(truth[labeled]).double(),
    )
    borders = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    which = torch.bucketize(values, borders[1:-1], right=True)
    counts = torch.zeros(bins, dtype=torch.float64).index_add(0, which, torch.ones_like(values))
    confidence, accuracy = (
        torch.zeros(bins, dtype=torch.float64).index_add(0, which, v) / counts.clamp(min=1)
        for v in (values, on)
    )
    expected = ((accuracy - confidence).abs() * counts / counts.sum()).sum().item()
    found = expected_calibration_error(probs, truth, labeled, bins=bins)
    assert found == pytest.approx(expected, rel=1e-12)
    name = f"ece@{bins}"
    label = np.where(labeled, truth, 2).astype(np.uint8)
    scores = score(truth, label, ignore_label=2, names=[name], probs=probs)
    assert scores == {name: found}


def test_what_is_unlabeled_changes_nothing():
    probs, label = row(0.2, 0.7, 0.4, 1.0), row(0, 1, 2, 2, dtype=np.uint8)
    how = {"ignore_label": 2, "names": ["ece"]}
    found = score(label == 1, label, probs=probs, **how)
    assert found["ece"] == pytest.approx((0.2 + 0.3) / 2)
    probs[..., 2:] = 0.9
    assert score(label > 0, label, probs=probs, **how) == found


def test_each_class_has_the_error_of_its_probabilities():
    truth = row(0, 3, 7, 7, dtype=np.uint8)
    probs = {"artery": row(0.1, 0.9, 0, 0), "vein": row(0, 0, 0.5, 0.5)}
    how = {"classes": {"artery": 3, "vein": 7}, "probs": probs}
    found = score(truth, truth, names=["ece", "dice/vein"], **how)
    assert found == {
        "ece/artery": pytest.approx(0.05), "ece/vein": pytest.approx(0.25),
        "ece/mean": pytest.approx(0.15), "dice/vein": 1.0,
    }  # fmt: skip
    del probs["artery"]
    assert score(truth, truth, names=["ece/vein"], **how) == {"ece/vein": found["ece/vein"]}
    with pytest.raises(ValueError, match=r"^probs of artery: expected probabilities .* got None"):
        score(truth, truth, names=["ece"], **how)


@pytest.mark.parametrize(
    "probs, message",
    [
        (None, r"^probs: expected probabilities \(1, 1, 2\) for the ece, got None"),
        (row(0.5), r"^probs: expected probabilities \(1, 1, 2\) for the ece, got \(1, 1, 1\)"),
        (row(0.5, 1.5), "^probs: expected values from 0 to 1, got 0.5 to 1.5"),
        (row(-0.5, 1.0), "^probs: expected values from 0 to 1, got -0.5 to 1.0"),
        (row(0.5, np.nan), "^probs: expected values from 0 to 1, got nan to nan"),
    ],
)
def test_what_is_no_probability_is_refused(probs, message):
    truth = row(0, 1, dtype=np.uint8)
    with pytest.raises(ValueError, match=message):
        score(truth, truth, names=["ece"], probs=probs)


@pytest.mark.parametrize("name", ["ece@0", "ece@1.5", "ece@inf", "ece@nan", "ece@x", "ece@1:2"])
def test_a_number_of_bins_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=r"bins: expected a whole number|expected ece@BINS"):
        score(row(0), row(0), names=[name], probs=row(0))
