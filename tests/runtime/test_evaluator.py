"""What the evaluator chooses and reports: masks drawn by hand, and runs that choose."""

import json
import os
import signal

import h5py
import nibabel
import numpy as np
import pytest

import infer
import train
from runtime import checkpoint, evaluator, validation
from runtime.outputs import Outputs
from scoring import metrics
from tests.test_survival import after_step, kills, run_folder
from tests.test_train import SHAPE, events, root, settings, weights_of
from volumes import casefile

__all__ = ["root"]  # a fixture


def make_case(tmp_path, label, ignore_label=2, case_id="x"):
    about = {"spacing": (1, 1, 1), "unit": "", "affine": None, "group": case_id}
    path = tmp_path / f"{case_id}.h5"
    casefile.write_case(path, label[None], label, ignore_label=ignore_label, **about)
    return casefile.read_case(path)


def sheet():
    """A label of one sheet, and probabilities: sure in it, doubtful beside it, a sure speck."""
    label = np.zeros((9, 12, 12), np.uint8)
    label[4] = 1
    probs = np.full(label.shape, 0.05, np.float32)
    probs[4], probs[5], probs[0, 0, 0:2] = 0.65, 0.45, 0.9
    return label, probs


ONE = Outputs({"sheet": (1,)})


def spec_of(*, outputs=ONE, thresholds=(0.5, 0.4, 0.6), sizes=(0,), **changes):
    """The same choices for all regions, unless they are {region: choices}."""
    base = {"metric": "dice", "names": ("dice", "precision"), "outputs": outputs}
    choices = {
        key: some if isinstance(some, dict) else dict.fromkeys(outputs.regions, some)
        for key, some in (("thresholds", thresholds), ("sizes", sizes))
    }
    return evaluator.EvaluationSpec(**(base | choices | changes))


def result_of(tmp_path, spec, *pairs, ignore_label=2):
    """The result for [(label, probs), ...]; probs (D, H, W), or (K, D, H, W)."""
    predictions = []
    for number, (label, probs) in enumerate(pairs):
        case = make_case(tmp_path, label, ignore_label, case_id=f"c{number}")
        encoded = evaluator.encode(spec, probs if probs.ndim == 4 else probs[None])
        predictions.append(evaluator.Prediction(case, encoded))
    return evaluator.evaluate(spec, predictions)


# ---------------------------------------------------------------------------- thresholds


def test_a_count_says_of_every_threshold_whether_it_is_reached():
    thresholds = (0.25, 0.5, 0.75)
    probs = np.array([0.0, 0.25, 0.3, 0.5, 0.74, 0.75, 1.0], np.float32)
    found = evaluator.encode(spec_of(thresholds=thresholds), probs[None])
    assert found.tolist() == [0, 1, 1, 2, 2, 3, 3]
    for index, threshold in enumerate(thresholds):
        assert np.array_equal(found > index, probs >= threshold)


def test_the_default_threshold_and_that_of_hysteresis_are_among_all_thresholds():
    assert spec_of(thresholds=(0.7, 0.3), postprocess={"hysteresis": 0.2}).all_thresholds == (
        0.2,
        0.3,
        0.5,
        0.7,
    )


# ---------------------------------------------------------------------------- choices


def test_the_threshold_with_the_best_mean_score_is_chosen(tmp_path):
    label, probs = sheet()
    probs[4, :6] = 0.45  # half of the sheet is doubtful, and so is what lies beside it
    probs[5] = 0.35
    found = result_of(tmp_path, spec_of(), (label, probs))
    assert found["threshold"] == 0.4
    assert found["scores"]["dice"] == pytest.approx(2 * 144 / (146 + 144))
    steps = [(step["step"], step["value"]) for step in found["steps"]]
    assert steps == [("threshold", 0.5), ("threshold", 0.4)]
    assert found["steps"][0]["dice"] == pytest.approx(2 * 72 / (74 + 144))


def test_of_equal_choices_the_first_is_used(tmp_path):
    found = result_of(tmp_path, spec_of(), sheet())
    assert found["threshold"] == 0.5 and found["steps"][0]["step"] == "threshold"
    assert len(found["steps"]) == 1


def test_a_score_of_which_less_is_better_chooses_the_least(tmp_path):
    label, probs = sheet()
    probs[8] = 0.55  # far away
    spec = spec_of(metric="hd95", thresholds=(0.5, 0.6))
    assert result_of(tmp_path, spec, (label, probs))["threshold"] == 0.6
    assert evaluator.is_better(1.0, 2.0, "hd95") and not evaluator.is_better(2.0, 1.0, "hd95")
    assert evaluator.is_better(2.0, 1.0, "dice") and not evaluator.is_better(1.0, 1.0, "dice")
    assert evaluator.is_better(None, 1.0, "dice") and evaluator.is_better(0.0, None, "dice")


def test_the_size_of_components_is_chosen_at_the_chosen_threshold(tmp_path):
    found = result_of(tmp_path, spec_of(sizes=(0, 3, 10**6)), sheet())
    assert found["min_component_voxels"] == 3
    assert found["scores"] == {"dice": 1.0, "precision": 1.0}
    assert [step["step"] for step in found["steps"]] == ["threshold", "min_component_voxels"]
    assert found["steps"][0]["precision"] == pytest.approx(144 / 146)


def test_every_step_that_is_on_is_reported_with_its_scores(tmp_path):
    label, probs = sheet()
    probs[4, :, 0:3] = 0.35  # weak, but it touches what is sure
    probs[4, 6, 6] = 0.1
    steps = {"hysteresis": 0.3, "max_hole_voxels": 1, "closing_radius": 1.5}
    spec = spec_of(postprocess=steps, thresholds=(0.6,))
    found = result_of(tmp_path, spec, (label, probs))
    steps = [(step["step"], step["value"]) for step in found["steps"]]
    assert steps == [
        ("threshold", 0.5),
        ("threshold", 0.6),
        ("hysteresis", 0.3),
        ("max_hole_voxels", 1),
        ("closing_radius", 1.5),
    ]
    # Weak are 35 % of the sheet and all of the slice beside it, at 0.45.
    voxels = [144 - 36 - 1 + 2] * 2 + [144 - 1 + 144 + 2] + [288 + 2] * 2
    right = [107, 107, 143, 144, 144]
    for step, size, hits in zip(found["steps"], voxels, right, strict=True):
        assert step["precision"] == pytest.approx(hits / size), step["step"]


# ---------------------------------------------------------------------------- proof of steps

OFF = {"hysteresis": None, "max_hole_voxels": 0, "closing_radius": 0.0}


def plane(*, predicted=(), true=(), planes=1):
    """A label of so many full planes, and the probabilities of a network that is sure of it.

    predicted, true: index of a hole in the first plane that only the network sees, or that is there
    and that the network knows of.
    """
    label = np.zeros((9, 12, 12), np.uint8)
    label[4 : 4 + planes] = 1
    probs = np.where(label, 0.65, 0.05).astype(np.float32)
    for index in (predicted, true):
        if index:
            probs[4][index] = 0.1
    if true:
        label[4][true] = 0
    return label, probs


SQUARE = np.s_[4:8, 4:8]  # 16 of the 144 voxels of a plane


def tried_on(tmp_path, candidates, *pairs, thresholds=(0.5,), **changes):
    """(the steps that were taken, the rows on what was tried, the whole result)."""
    spec = spec_of(thresholds=thresholds, candidates=candidates, postprocess=OFF, **changes)
    found = result_of(tmp_path, spec, *pairs)
    return {step: found[step] for step in OFF if step in found}, found["tried"], found


def dice_without(voxels):
    """Of a plane of 144 voxels of which so many are missing."""
    return 2 * (144 - voxels) / (288 - voxels)


def test_a_step_that_raises_the_score_is_taken_and_scored(tmp_path):
    holes = {"max_hole_voxels": (16,)}
    taken, tried, found = tried_on(tmp_path, holes, plane(predicted=SQUARE), plane())
    assert taken == {"max_hole_voxels": 16} and found["scores"]["dice"] == 1.0
    (row,) = tried
    assert row["before"] == pytest.approx((dice_without(16) + 1) / 2) and row["after"] == 1.0
    assert (row["step"], row["value"], row["cases"], row["taken"]) == (
        "max_hole_voxels",
        16,
        2,
        True,
    )
    assert [step["step"] for step in found["steps"]] == ["threshold", "max_hole_voxels"]


def test_a_step_that_lowers_the_score_of_one_case_is_not_taken_though_the_mean_rises(tmp_path):
    holes, better = {"max_hole_voxels": (20, 100)}, plane(predicted=SQUARE)
    worse = plane(true=np.s_[5, 5:7])
    taken, (row,), found = tried_on(tmp_path, holes, better, worse)
    assert taken == {} and not row["taken"] and row["after"] > row["before"] + 0.02
    assert found["scores"]["dice"] == pytest.approx((dice_without(16) + 1) / 2)
    # The first case that gets worse ends it.
    _, (row,), _ = tried_on(tmp_path, holes, worse, better)
    assert row["cases"] == 1 and row["before"] == 1.0
    assert row["after"] == pytest.approx(2 * 142 / (142 + 144))


def test_a_step_that_changes_the_score_by_less_than_a_thousandth_is_not_taken(tmp_path):
    holes = {"max_hole_voxels": (1, 20)}
    for planes, expected in ((5, {}), (1, {"max_hole_voxels": 1})):
        taken, rows, _ = tried_on(tmp_path, holes, plane(predicted=np.s_[5, 5], planes=planes))
        n = 144 * planes
        assert rows[0]["before"] == pytest.approx(2 * (n - 1) / (2 * n - 1)) and taken == expected


def test_a_larger_value_is_tried_only_after_a_smaller_one_was_taken(tmp_path):
    both = plane(predicted=SQUARE)
    both[1][4, 1, 1] = 0.1
    holes = {"max_hole_voxels": (1, 20)}
    taken, rows, _ = tried_on(tmp_path, holes, both)
    assert taken == {"max_hole_voxels": 20} and [row["taken"] for row in rows] == [True, True]
    assert rows[1]["before"] == rows[0]["after"] == pytest.approx(dice_without(16))
    taken, rows, _ = tried_on(tmp_path, holes, plane(predicted=SQUARE))
    assert taken == {} and [row["value"] for row in rows] == [1]


def test_steps_are_tried_in_their_order_each_upon_those_that_were_taken(tmp_path):
    label, probs = plane(predicted=SQUARE)
    probs[4, :, 9:] = 0.35  # 36 voxels
    some = {"hysteresis": (0.7, 0.6, 0.3), "max_hole_voxels": (16,), "closing_radius": (1.5,)}
    taken, rows, found = tried_on(tmp_path, some, (label, probs), thresholds=(0.6,))
    assert [(row["step"], row["value"]) for row in rows] == [
        ("hysteresis", 0.3),  # no other is below the threshold
        ("max_hole_voxels", 16),
        ("closing_radius", 1.5),
    ]
    before, after = ([row[key] for row in rows] for key in ("before", "after"))
    assert before == pytest.approx([dice_without(52), dice_without(16), 1])
    assert after == pytest.approx([dice_without(16), 1, 1])
    assert taken == {"hysteresis": 0.3, "max_hole_voxels": 16}
    assert found["scores"]["dice"] == 1.0


def test_a_step_is_taken_where_less_of_a_score_is_better(tmp_path):
    about = {"metric": "betti_error_1", "names": ("betti_error_1",)}
    holes = {"max_hole_voxels": (16,)}
    taken, (row,), _ = tried_on(tmp_path, holes, plane(predicted=SQUARE), **about)
    assert taken and (row["before"], row["after"]) == (1, 0)
    taken, (row,), _ = tried_on(tmp_path, holes, plane(true=SQUARE), **about)
    assert not taken and (row["before"], row["after"]) == (0, 1)


def test_nothing_is_tried_without_a_case():
    spec = spec_of(candidates={"max_hole_voxels": (1,)}, postprocess=OFF)
    assert evaluator.evaluate(spec, [])["tried"] == []


# ---------------------------------------------------------------------------- means


def test_the_mean_is_over_cases_and_each_is_reported(tmp_path):
    empty = np.zeros((9, 12, 12), np.uint8)
    found = result_of(tmp_path, spec_of(thresholds=(0.5,)), sheet(), (empty, 0.1 * sheet()[1]))
    assert found["cases"]["c1"]["dice"] == 1.0  # nothing there, nothing found
    assert found["scores"]["dice"] == pytest.approx((found["cases"]["c0"]["dice"] + 1) / 2)


def test_unlabeled_voxels_do_not_count(tmp_path):
    label, probs = sheet()
    label[0] = 2  # where the speck is
    assert result_of(tmp_path, spec_of(), (label, probs))["scores"]["precision"] == 1.0


def test_of_no_case_there_are_no_scores_and_the_first_choices():
    found = evaluator.evaluate(spec_of(sizes=(7, 3)), [])
    assert (found["threshold"], found["min_component_voxels"]) == (0.5, 7)
    assert found["scores"] == {} and found["steps"] == [] and found["cases"] == {}


def test_a_label_that_cannot_be_read_is_named_and_counts_nowhere(tmp_path):
    spec = spec_of(thresholds=(0.5,))
    label, probs = sheet()
    found = evaluator.encode(spec, probs[None])
    there, gone = (make_case(tmp_path, label, case_id=name) for name in ("there", "gone"))
    os.unlink(gone.path)
    told = evaluator.evaluate(spec, [evaluator.Prediction(c, found) for c in (there, gone)])
    assert told["unread"] == ["gone"] and list(told["cases"]) == ["there"]


@pytest.mark.parametrize(
    ("metric", "names", "said"),
    [
        ("surface_dise", (), "validation.score: .*surface_dice"),
        ("components", (), "describes a mask"),
        ("gap_filled@0:3", (), "validation.score: expected one that an empty mask loses"),
        ("ece", (), "validation.score: expected a score of masks, got ece, of probabilities"),
        ("dice", ("ece@20",), "validation.scores: expected a score of masks, got ece@20"),
        ("dice", ("dize",), "validation.scores: .*dice"),
        ("dice@3", (), "dice without a number"),
    ],
)
def test_names_of_no_score_are_refused(metric, names, said):
    with pytest.raises(ValueError, match=said):
        evaluator.full_names(metric, names, ONE)
    found = evaluator.full_names("vesuvius_score", ("surface_dice@4", "assd", "components"), ONE)
    assert found == ("vesuvius_score", ("vesuvius_score", "surface_dice@4", "assd", "components"))


# ---------------------------------------------------------------------------- runs


def test_a_wrong_name_of_a_score_is_refused_before_anything_is_written(root, tmp_path, capsys):
    assert train.main(settings(root, tmp_path, "validation.score=dicee")) == 2
    assert "validation.score" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_what_validation_chose_is_what_infer_uses(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = ["validation.thresholds=[0.2]", "validation.min_component_voxels=[30]"]
    assert train.main(settings(root, tmp_path, *changes, "training.max_epochs=1")) == 0
    chosen = weights_of(run_folder(tmp_path))["loop"]["evaluations"]["chosen"]
    assert chosen == {"threshold": 0.2, "min_component_voxels": 30}
    best = run_folder(tmp_path) / "checkpoints" / "best.pt"
    assert checkpoint.load(best)["loop"]["evaluations"]["chosen"] == chosen
    about = ["--ckpt", str(best), "inference.save_probabilities=true", "--output", "out"]
    assert infer.main(about) == 0
    assert "threshold 0.2, min_component_voxels 30" in capsys.readouterr().out
    mask, probs = (
        np.asarray(nibabel.load(tmp_path / "out" / folder / "bar3.nii.gz").dataobj)
        for folder in ("", "probabilities")
    )
    assert np.array_equal(mask > 0, cc_kept(probs >= 0.2, 30))
    assert infer.main([*about, "inference.threshold=0.9"]) == 0
    assert "threshold 0.9" in capsys.readouterr().out


def cc_kept(mask, size):
    """Its 26-connected components of at least this size, by another package."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return (np.bincount(labels.ravel()) >= size)[labels] & mask


def test_steps_that_are_given_are_not_tried_and_others_are(root, tmp_path):
    changes = ["training.max_steps=0", "postprocess.max_hole_voxels=0", "postprocess.hysteresis=1"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    (start,) = events(run_folder(tmp_path), "start")
    told = [start["measured"][step] for step in OFF]
    assert told == [None, 0, [1.5, 2.5]]  # the spacing is 2, 1, 1
    last = events(run_folder(tmp_path), "evaluation")[-1]
    assert {row["step"] for row in last["tried"]} == {"closing_radius"}
    taken = {row["step"]: row["value"] for row in last["tried"] if row["taken"]}
    assert taken == {key: last["chosen"][key] for key in OFF if key in last["chosen"]}


def test_choices_see_validation_cases_alone(root, tmp_path, monkeypatch):
    seen, evaluate = [], evaluator.evaluate

    def watched(spec, predictions):
        seen.extend(one.case.id for one in predictions)
        return evaluate(spec, predictions)

    monkeypatch.setattr(evaluator, "evaluate", watched)
    assert train.main(settings(root, tmp_path, "training.max_epochs=2")) == 0
    assert set(seen) == {"bar2"} and len(seen) == 3


def test_an_evaluator_in_the_background_gives_the_same_run_as_one_within(root, tmp_path):
    for name in ("within", "beside"):
        background = f"validation.background={str(name == 'beside').lower()}"
        assert train.main(settings(root, tmp_path / name, background)) == 0
    within, beside = (run_folder(tmp_path / name) for name in ("within", "beside"))
    assert kills.lines(within) == kills.lines(beside)
    first, second = (checkpoint.load(f / "checkpoints" / "best.pt") for f in (within, beside))
    for key in ("best_score", "best_step", "chosen"):
        assert first["loop"]["evaluations"][key] == second["loop"]["evaluations"][key]
    assert kills.same(first["ema"], second["ema"])


def test_a_run_that_is_stopped_during_an_evaluation_starts_it_again(root, tmp_path, monkeypatch):
    background = "validation.background=true"
    assert train.main(settings(root, tmp_path / "straight", background)) == 0
    changes = [background, "validation.untrained=false"]
    after_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    # Nothing arrives before the run is stopped, in mid-epoch.
    monkeypatch.setattr(validation.Validator, "result", lambda self, *, wait=False: None)
    assert train.main(settings(root, tmp_path, *changes)) == 75
    assert weights_of(run_folder(tmp_path))["loop"]["evaluations"]["pending"] == 3
    assert events(run_folder(tmp_path), "evaluation") == []
    monkeypatch.undo()
    assert train.main(settings(root, tmp_path, *changes), resume=True) == 0
    told = events(run_folder(tmp_path), "evaluation")
    expected = events(run_folder(tmp_path / "straight"), "evaluation")[1:]
    assert [(e["step"], e["scores"]) for e in told] == [(e["step"], e["scores"]) for e in expected]


def test_an_evaluator_that_dies_costs_an_evaluation_and_no_more(root, tmp_path, monkeypatch):
    start, killed = validation.Validator.start, []

    def start_and_kill(self, *about):
        start(self, *about)
        if not killed:
            killed.append(self.process.pid)
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(validation.Validator, "start", start_and_kill)
    changes = ["validation.background=true", "training.max_epochs=1"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    (trouble,) = events(run_folder(tmp_path), "trouble")
    assert trouble["kind"] == "evaluator died" and trouble["pid"] == killed[0]
    assert trouble["exitcode"] == -signal.SIGKILL and "killed by SIGKILL" in trouble["text"]
    first, last = events(run_folder(tmp_path), "evaluation")
    assert first["scores"] == {} and last["scores"]["surface_dice"] >= 0
    best = checkpoint.load(run_folder(tmp_path) / "checkpoints" / "best.pt")
    assert best["loop"]["evaluations"]["best_step"] == 3


def test_every_named_score_can_pick_the_best(root, tmp_path):
    changes = ["validation.score=assd", "validation.scores=[dice,vesuvius_score]"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    told = events(run_folder(tmp_path), "evaluation")
    assert set(told[0]["scores"]) == {"assd", "dice", "vesuvius_score"}
    best = weights_of(run_folder(tmp_path))["loop"]["evaluations"]
    assert best["best_score"] == min(e["scores"]["assd"] for e in told)


def test_the_scores_of_the_log_are_those_of_scoring(root, tmp_path):
    changes = ["training.max_steps=0", "validation.thresholds=[0.01]"]
    changes += ["validation.min_component_voxels=[0]", "validation.scores=[dice,assd]"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    (told,) = events(run_folder(tmp_path), "evaluation")
    with h5py.File(root / "bar2.h5") as file:
        truth = file["label"][:]
    everything = np.ones(SHAPE, bool)  # 0.01: an untrained network says so everywhere
    expected = metrics.score(
        everything, truth, (2, 1, 1), 2, names=("surface_dice", "dice", "assd")
    )
    assert told["scores"] == pytest.approx(expected)
    assert json.dumps(told["chosen"]) == '{"threshold": 0.01, "min_component_voxels": 0}'
