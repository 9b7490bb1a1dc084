"""The threshold of a volume by its own probabilities, and the masks that training and prediction
make with it."""

import json

import nibabel
import numpy as np
import pytest
import torch

import train
from monitoring import picture
from runtime import checkpoint, config, log, own_threshold
from runtime.members import read_members
from scoring import metrics
from tests.runtime.test_evaluator import result_of, sheet, spec_of
from tests.test_infer import expected_probs, faults_of, image_of, infer_ok, run, write_nifti
from tests.test_train import events, root, settings
from volumes import casefile, files

__all__ = ["root", "run"]  # fixtures

IMAGE = image_of((9, 20, 18))
LEVELS = own_threshold.LEVELS


def own_of(probs, foreground, levels=LEVELS):
    reached = own_threshold.count_reached(np.atleast_2d(probs), levels)
    return own_threshold.own_threshold(own_threshold.histogram(reached, levels), foreground, levels)


def probabilities(share, seen, rng, size=40_000):
    """Those of an ideal network on a volume of this share of foreground, if `seen` was trained."""
    truth = rng.random(size) < share
    feature = rng.normal(np.where(truth, 1.0, -1.0))
    odds = seen / (1 - seen) * np.exp(2 * feature)  # of two normal distributions, 2 apart
    return odds / (1 + odds), truth


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_the_threshold_is_that_of_a_network_that_was_trained_with_the_share_of_the_volume(share):
    probs, _ = probabilities(share, 0.3, np.random.default_rng(0))
    odds = 0.3 / 0.7 * (1 - share) / share  # where the ratio of shares makes a probability 0.5
    found = own_of(probs, 0.3)
    assert found in LEVELS and abs(found - odds / (1 + odds)) < 0.05


def test_a_volume_of_the_share_of_training_is_cut_at_a_half_and_errs_least_there():
    rng = np.random.default_rng(1)
    probs, _ = probabilities(0.3, 0.3, rng)
    assert own_of(probs, 0.3) == 0.5
    probs, truth = probabilities(0.05, 0.3, rng)
    own = own_of(probs, 0.3)
    assert ((probs >= own) != truth).mean() < 0.6 * ((probs >= 0.5) != truth).mean()


@pytest.mark.parametrize("value, expected", [(0.0, 0.99), (1.0, 0.5)])
def test_a_volume_of_one_probability_gets_a_threshold(value, expected):
    probs = np.full((2, 3, 4), value, np.float32)
    assert own_of(probs, 0.3) == expected
    for unknown in (None, 0.0, 1.0):
        assert own_of(probs, unknown) == 0.5


def test_a_threshold_is_raised_and_never_lowered():
    probs, _ = probabilities(0.6, 0.3, np.random.default_rng(3))
    assert own_of(probs, 0.3) == 0.5


def test_a_volume_without_voxels_is_cut_at_a_half():
    assert own_threshold.own_threshold(np.zeros(len(LEVELS) + 1, int), 0.3) == 0.5


def test_thresholds_between_the_levels_do_not_change_it():
    probs, _ = probabilities(0.1, 0.4, np.random.default_rng(2))
    assert own_of(probs, 0.4, tuple(sorted({*LEVELS, 0.33, 0.51}))) == own_of(probs, 0.4) != 0.5


def test_validation_scores_the_mask_of_each_case_at_its_own_threshold(tmp_path):
    label, probs = sheet()
    spec = spec_of(thresholds=("auto",), foreground=0.3)
    own = own_of(probs, 0.3)
    assert own != 0.5
    found = result_of(tmp_path, spec, (label, probs))
    fixed = result_of(tmp_path, spec_of(thresholds=(own,)), (label, probs))
    assert found["threshold"] == "auto" and found["scores"] == fixed["scores"]
    assert [row["value"] for row in found["steps"]][:2] == [0.5, "auto"]


@pytest.fixture
def trained(run):
    """A checkpoint that knows of a share of foreground: trained(0.2) -> path; None: it does not."""

    def make(foreground):
        path = run()
        state = checkpoint.load(path)
        state["loop"]["foreground"] = foreground
        checkpoint.save(state, path)
        return path

    return make


def test_a_mask_is_cut_at_the_threshold_of_its_own_volume_in_parts_too(trained, tmp_path, capsys):
    ckpt, scan = trained(0.2), tmp_path / "scan.nii.gz"
    write_nifti(scan, IMAGE)
    probs = expected_probs(IMAGE)
    own = own_of(probs, 0.2)
    about = "--ckpt", ckpt, "--input", scan, "inference.threshold=auto", "--output"
    infer_ok(*about, tmp_path / "whole")
    said = capsys.readouterr().out
    assert f"threshold {own}, " in said and "threshold auto" in said
    for part in ("1/2", "2/2", "1/2"):
        infer_ok(*about, tmp_path / "parts", "--part", part)
    for name in ("whole", "parts"):
        mask = np.asarray(nibabel.load(tmp_path / name / "scan.nii.gz").dataobj).T
        assert np.array_equal(mask, np.squeeze(probs) >= own)


def test_a_checkpoint_that_knows_no_share_and_one_number_for_another_are_refused(
    trained, tmp_path, capsys
):
    scan = tmp_path / "scan.nii.gz"
    write_nifti(scan, IMAGE)
    (fault,) = faults_of(
        capsys, "--ckpt", trained(None), "--input", scan, "inference.threshold=auto"
    )
    assert fault.startswith("inference.threshold: auto needs the share of foreground in training")
    assert "got none in" in fault and "last.pt" in fault
    with pytest.raises(config.ConfigError, match=r"^inference\.threshold: expected .*, or auto$"):
        config.build({"inference": {"threshold": "automatic"}})


def test_a_run_knows_its_share_of_foreground_and_goes_on_with_it(root, tmp_path):
    assert train.main(settings(root, tmp_path, "inference.threshold=auto")) == 0
    folder = tmp_path / "runs" / "r"
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    shares = [e["patches"]["foreground"] for e in events(folder, "epoch")]
    assert 0 < state["loop"]["foreground"] < 1
    assert state["loop"]["foreground"] == pytest.approx(np.mean(shares), rel=1e-5)
    (member,) = read_members([str(folder / "checkpoints" / "last.pt")])
    assert member.foreground == state["loop"]["foreground"]
    assert json.dumps(state["loop"]["foreground"])  # a plain number


HOW = ["inference.threshold=auto", "data.spacing=[0,1.2+,1.2+]"]


def test_validation_scores_and_draws_the_mask_that_is_predicted(
    root, tmp_path, monkeypatch, capsys
):
    drawn = []
    monkeypatch.setattr(log.Means, "foreground", property(lambda means: 0.2))  # more than there is
    monkeypatch.setattr(picture, "draw_progress", lambda *about: drawn.append(about[2:]))
    assert train.main(settings(root, tmp_path, *HOW, "monitor.picture=true")) == 0
    folder = tmp_path / "runs" / "r"
    ckpt = folder / "checkpoints" / "last.pt"
    name = checkpoint.load(ckpt)["data"]["validation"][0]
    case = casefile.read_dataset(root).cases[name]
    capsys.readouterr()
    infer_ok("--ckpt", ckpt, "--input", case.path, "--output", tmp_path / "out")
    (file,) = (tmp_path / "out").glob(f"{name}.*")
    with casefile.opened(case) as stored:
        truth = stored["label"][:]
    mask = files.read_label(str(file)).array
    expected = metrics.score(mask, truth, case.spacing, case.ignore_label, names=["dice"])
    evaluation = events(folder, "evaluation")[-1]
    assert evaluation["step"] == checkpoint.load(ckpt)["loop"]["step"]
    assert evaluation["cases"][name]["dice"] == expected["dice"] > 0
    slices, threshold = [one for one in drawn if one[0] is not None][-1]
    assert threshold > 0.5 and f"threshold {threshold}, " in capsys.readouterr().out
    (shown,) = slices["mask"].values()
    np.testing.assert_array_equal(shown, slices["probs"][0] >= threshold)


def test_a_stopped_run_goes_on_as_if_it_had_not(root, tmp_path):
    states = []
    for name, stops in (("whole", []), ("stopped", [5, 8])):
        for steps in (*stops, 12):
            given = settings(
                root, tmp_path, *HOW, f"run.name={name}", f"training.max_steps={steps}"
            )
            assert train.main(given, resume=steps != (*stops, 12)[0]) == 0
        folder = tmp_path / "runs" / name
        state = checkpoint.load(folder / "checkpoints" / "last.pt")
        scores = {e["step"]: e["scores"] for e in events(folder, "evaluation")}
        states.append((state["loop"]["foreground"], scores[12], state["ema"]))
    (share, scores, weights), (other_share, other_scores, other_weights) = states
    assert share == other_share and scores == other_scores
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
