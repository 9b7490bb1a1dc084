"""What the evaluator chooses and reports of several classes: masks drawn by hand, and runs."""

import json

import h5py
import numpy as np
import pytest
import torch

import infer
import train
from runtime import composite_loss, evaluator, splits
from runtime.outputs import Outputs
from scoring import metrics, postprocess
from tests.runtime.test_evaluator import make_case, result_of, spec_of
from tests.test_survival import kills, run_folder
from tests.test_train import SHAPE, events, settings, weights_of
from volumes import casefile, files

CLASSES = Outputs({"artery": (3,), "vein": (7,)}, exclusive=True)
REGIONS = Outputs({"vessel": (3, 7), "artery": (3,)})
NAMES = ("dice", "surface_dice", "components")


def several(outputs, metric="dice", **changes):
    metric, names = evaluator.full_names(metric, NAMES, outputs)
    changes = {"thresholds": {}} | changes if outputs.exclusive else changes
    return spec_of(outputs=outputs, metric=metric, names=names, **changes)


def slabs():
    """(label, probabilities of background, artery and vein): two slabs, each with a false speck,
    a part of the vein that is taken for artery, and a class 9 that is in no region."""
    label = np.zeros((9, 12, 12), np.uint8)
    label[2:4], label[6:8, :, :8], label[6:8, :, 10:] = 3, 7, 9
    label[:, 0] = 255
    channel = np.zeros(label.shape, np.uint8)
    channel[2:4], channel[6:8, :, :8], channel[6:8, :4, :8] = 1, 2, 1
    channel[0, 5, 0:4], channel[0, 9, 0:2] = 1, 2
    probs = np.where(np.arange(3).reshape(3, 1, 1, 1) == channel, 0.4, 0.3).astype(np.float32)
    return label, probs


def by_hand(painted, label, outputs):
    """Scores by `metrics.score` of ids, to which a class that is in no region is background."""
    truth = np.where(label == 9, 0, label)
    how = {"names": NAMES, "classes": outputs.regions}
    return metrics.score(painted, truth, (1, 1, 1), 255, **how)


# ---------------------------------------------------------------------------- scores


def test_classes_are_scored_as_the_written_ids_would_be(tmp_path):
    label, probs = slabs()
    found = result_of(tmp_path, several(CLASSES), (label, probs), ignore_label=255)
    painted = np.array([0, 3, 7], np.uint8)[probs.argmax(axis=0)]
    assert found["scores"] == pytest.approx(by_hand(painted, label, CLASSES))
    assert list(found["scores"])[:4] == [
        "dice/artery", "dice/vein", "dice/mean", "surface_dice/artery",
    ]  # fmt: skip
    assert "threshold" not in found and found["min_component_voxels"] == {"artery": 0, "vein": 0}
    assert [(step["step"], step["value"]) for step in found["steps"]] == [("threshold", None)]


def test_each_region_is_scored_by_its_own_mask_though_another_is_painted_over_it(tmp_path):
    label, _ = slabs()
    probs = np.stack([np.isin(label, (3, 7)), label == 3]).astype(np.float32)
    probs[1, 6:8] = 1.0  # what is painted as artery, and is none, stays vessel
    found = result_of(tmp_path, several(REGIONS), (label, probs), ignore_label=255)["scores"]
    assert found["dice/vessel"] == 1.0
    artery, false = 2 * 11 * 12, 2 * 11 * 12
    assert found["dice/artery"] == pytest.approx(2 * artery / (2 * artery + false))
    assert found["dice/mean"] == pytest.approx((1 + found["dice/artery"]) / 2)


@pytest.mark.parametrize("ignore_label", [255, 1, 2])
def test_unlabeled_voxels_of_any_value_count_in_no_class(tmp_path, ignore_label):
    label, probs = slabs()
    label[label == 255] = ignore_label
    expected = result_of(tmp_path, several(CLASSES), (label, probs), ignore_label=ignore_label)
    probs[:, :, 0] = 1 - probs[:, :, 0]
    assert result_of(tmp_path, several(CLASSES), (label, probs), ignore_label=ignore_label) == (
        expected
    )


def test_a_class_that_a_case_lacks_scores_1_where_none_is_found_and_else_0(tmp_path):
    label, probs = slabs()
    without = np.where(label == 7, 0, label)
    clean = probs.copy()
    clean[2] = 0
    found = result_of(
        tmp_path, several(CLASSES), (without, clean), (without, probs), ignore_label=255
    )
    assert [found["cases"][case]["dice/vein"] for case in ("c0", "c1")] == [1.0, 0.0]
    assert found["scores"]["dice/vein"] == 0.5


# ---------------------------------------------------------------------------- choices


def test_each_region_has_the_threshold_that_is_best_for_it(tmp_path):
    label = np.zeros((9, 12, 12), np.uint8)
    label[2:4], label[6:8] = 3, 7
    vessel = np.where(label > 0, 0.45, 0.1)
    artery = np.where(label == 3, 0.65, 0.55)
    probs = np.stack([vessel, artery]).astype(np.float32)
    for metric in ("dice", "dice/vessel"):  # whichever chooses the state
        spec = several(REGIONS, metric, sizes=(0, 10**6))
        found = result_of(tmp_path, spec, (label, probs))
        assert found["threshold"] == {"vessel": 0.4, "artery": 0.6}
        assert found["min_component_voxels"] == {"vessel": 0, "artery": 0}
        assert found["scores"]["dice/mean" if metric == "dice" else metric] == 1.0
        steps = [(step["step"], step["value"]) for step in found["steps"]]
        assert steps == [("threshold", 0.5), ("threshold", {"vessel": 0.4, "artery": 0.6})]
        assert found["steps"][0]["dice/artery"] == pytest.approx(2 * 288 / (288 + 9 * 144))
    spec = several(REGIONS, thresholds={"vessel": (0.3,), "artery": (0.5, 0.6)})
    assert result_of(tmp_path, spec, (label, probs))["threshold"] == {"vessel": 0.3, "artery": 0.6}


def test_each_class_has_the_size_that_is_best_for_it(tmp_path):
    label, probs = slabs()
    spec = several(CLASSES, sizes=(0, 3, 5, 10**6))
    found = result_of(tmp_path, spec, (label, probs), ignore_label=255)
    assert found["min_component_voxels"] == {"artery": 5, "vein": 3}
    channel = probs.argmax(axis=0)
    channel[0] = 0  # the specks
    painted = np.array([0, 3, 7], np.uint8)[channel]
    assert found["scores"] == pytest.approx(by_hand(painted, label, CLASSES))
    assert found["steps"][-1]["value"] == {"artery": 5, "vein": 3}


def test_scores_are_those_of_the_masks_after_every_step(tmp_path):
    rng = np.random.default_rng(0)
    label, _ = slabs()
    truth = np.stack([label == i for i in (0, 3, 7)])
    probs = (rng.random(truth.shape) + 0.4 * truth).astype(np.float32)  # holes of other classes
    steps = {"max_hole_voxels": 4, "closing_radius": 1.0}
    spec = several(CLASSES, sizes={"artery": (2,), "vein": (9,)}, postprocess=steps)
    found = result_of(tmp_path, spec, (label, probs), ignore_label=255)
    channel = probs.argmax(axis=0)
    masks = postprocess.apply_to_regions(
        {"artery": channel == 1, "vein": channel == 2},
        exclusive=True,
        spacing=(1, 1, 1),
        min_component_voxels={"artery": 2, "vein": 9},
        **steps,
    )
    assert found["scores"] == pytest.approx(by_hand(CLASSES.paint(masks), label, CLASSES))
    assert [step["step"] for step in found["steps"]] == [
        "threshold", "min_component_voxels", "max_hole_voxels", "closing_radius",
    ]  # fmt: skip


def test_a_step_that_helps_one_class_and_harms_another_is_not_taken(tmp_path):
    label = np.zeros((9, 12, 12), np.uint8)
    label[2], label[6] = 3, 7
    probs = np.stack([label == 0, label == 3, label == 7]).astype(np.float32)
    probs[:2, 2, 4:8, 4:8] = [[[1.0]], [[0.0]]]  # a hole that the artery has not
    holes = {"candidates": {"max_hole_voxels": (16,)}, "postprocess": {"max_hole_voxels": 0}}
    for metric in ("dice", "dice/artery"):
        found = result_of(tmp_path, several(CLASSES, metric, **holes), (label, probs))
        assert found["max_hole_voxels"] == 16 and found["scores"][found_name(metric)] == 1.0
    label[6, 5, 5:7], probs[0, 6, 5, 5:7], probs[2, 6, 5, 5:7] = 0, 1.0, 0.0  # one that is there
    for metric in ("dice", "dice/artery"):
        found = result_of(tmp_path, several(CLASSES, metric, **holes), (label, probs))
        assert "max_hole_voxels" not in found
        assert [row["taken"] for row in found["tried"]] == [False]


def found_name(metric):
    return metric if "/" in metric else f"{metric}/mean"


@pytest.mark.parametrize(
    ("score", "said"),
    [
        ("dice/artry", "validation.score: .* the nearest is dice/artery"),
        ("components/artery", "validation.score: .* describes a mask"),
    ],
)
def test_a_score_of_no_class_and_one_that_describes_a_class_are_refused(score, said):
    with pytest.raises(ValueError, match=said):
        evaluator.full_names(score, (), CLASSES)
    with pytest.raises(
        ValueError, match=r"validation\.scores: expected a class among artery, vein"
    ):
        evaluator.full_names("dice", ("recall/nerve",), CLASSES)
    found = evaluator.full_names("dice/vein", ("recall/artery",), CLASSES)
    assert found == ("dice/vein", ("dice/vein", "recall/artery"))
    with pytest.raises(ValueError, match="names other than 'mean'"):
        evaluator.full_names("dice", (), Outputs({"mean": (1,), "vein": (2,)}))


@pytest.mark.parametrize("outputs", [CLASSES, REGIONS])
def test_validation_losses_see_probabilities_and_truth_of_all_regions(
    tmp_path, outputs, monkeypatch
):
    label, probs = slabs()
    probs = probs[: outputs.channels]
    seen, terms = [], {"soft_dice": {"weight": 1.0, "validation_only": True}}
    real = composite_loss.validation_losses

    def watched(*tensors, **options):
        seen.append((tensors, options))
        return real(*tensors, **options)

    monkeypatch.setattr(composite_loss, "validation_losses", watched)
    spec = several(outputs, terms=terms, class_weights=[1.0, 3.0])
    case = make_case(tmp_path, label, 255)
    prediction = evaluator.Prediction(case, evaluator.encode(spec, probs), probs)
    found = evaluator.evaluate(spec, [prediction])
    (((given, target, valid, _), options),) = seen
    assert torch.equal(given, torch.from_numpy(probs)) and 0 < found["scores"]["soft_dice_loss"] < 1
    expected = (label == 3) + 2 * (label == 7) if outputs.exclusive else None
    expected = expected[None] if outputs.exclusive else [np.isin(label, (3, 7)), label == 3]
    assert np.array_equal(target, expected) and np.array_equal(valid, label != 255)
    assert options["overlapping"] == outputs.overlapping and options["class_weights"] == [1.0, 3.0]


# ---------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four cases of two classes in three groups, some of it unlabeled; class 9 is in none."""
    folder = tmp_path_factory.mktemp("classes")
    for i in range(4):
        rng, label = np.random.default_rng(i), np.zeros(SHAPE, np.uint8)
        label[3:9, 4 + i : 8 + i, 2:22], label[3:9, 14:18, 2:22] = 3, 7
        image = (rng.normal(60, 10, SHAPE) + 80 * (label == 3) + 40 * (label == 7)).astype(np.uint8)
        label[:, :2] = 255
        about = {"spacing": (2, 1, 1), "unit": "", "affine": None, "group": "aabc"[i]}
        casefile.write_case(folder / f"x{i}.h5", image[None], label, ignore_label=255, **about)
    classes = {"background": 0, "artery": 3, "vein": 7, "nerve": 9}
    ids = [f"x{i}" for i in range(4)]
    casefile.write_dataset(folder, classes=classes, ignore_label=255, unit="", case_ids=ids)
    return folder


OVERLAPPING = "data.regions={vessel: [artery, vein], artery: [artery]}"


@pytest.mark.parametrize("regions", ["data.regions=null", OVERLAPPING], ids=["softmax", "regions"])
def test_a_run_of_several_classes_resumes_bit_for_bit(root, tmp_path, regions):
    changes = [regions, "validation.scores=[dice]", "training.max_epochs=2"]
    assert train.main(settings(root, tmp_path / "straight", *changes)) == 0
    assert train.main(settings(root, tmp_path / "cut", *changes, "training.max_steps=4")) == 0
    assert train.main(settings(root, tmp_path / "cut", *changes), resume=True) == 0
    first, second = (weights_of(tmp_path / n / "runs" / "r") for n in ("straight", "cut"))
    for key in ("model", "ema", "optimizer", "rng"):
        assert kills.same(first[key], second[key]), key
    scores, others = (
        {e["step"]: e["scores"] for e in events(run_folder(tmp_path / n), "evaluation")}
        for n in ("straight", "cut")
    )
    assert scores == {step: others[step] for step in (0, 3, 6)}
    standing = first["loop"]["evaluations"]
    assert standing["best_score"] == max(one["surface_dice/mean"] for one in scores.values())
    assert ("threshold" in standing["chosen"]) == (regions == OVERLAPPING)


def test_scores_are_those_of_the_masks_that_infer_writes(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ["training.max_epochs=1", "validation.untrained=false", "optim.lr=0.1"]
    changes += ["validation.min_component_voxels=[20]", "postprocess.max_hole_voxels=9"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    (told,) = events(run_folder(tmp_path), "evaluation")
    best = str(run_folder(tmp_path) / "checkpoints" / "best.pt")
    assert infer.main(["--ckpt", best, "--input", str(root / "x2.h5"), "--output", "out"]) == 0
    mask = files.read_image(tmp_path / "out" / "x2.nii.gz").array[0].astype(np.uint8)
    with h5py.File(root / "x2.h5") as file:
        label = file["label"][:]
    regions = {"artery": (3,), "vein": (7,), "nerve": (9,)}
    names = ("surface_dice", "dice", "precision", "recall", "components", "components_truth")
    expected = metrics.score(mask, label, (2, 1, 1), 255, names=names, classes=regions)
    assert mask.any() and told["scores"] == pytest.approx(expected)


def test_regions_that_cases_lack_are_listed_with_these(tmp_path):
    label, _ = slabs()
    labels = [label, np.where(label == 7, 0, label), np.zeros_like(label)]
    cases = [make_case(tmp_path, one, 255, f"c{i}") for i, one in enumerate(labels)]
    outputs = Outputs({"artery": (3,), "both": (7, 3), "gone": (8,)}, exclusive=True)
    (note,) = splits.absent_regions(outputs, cases)
    assert note.startswith(
        "validation: no voxel of artery in c2, of both in c2, of gone in any case;"
    )
    assert [*splits.absent_regions(CLASSES, cases[:1])] == []
    assert [*splits.absent_regions(Outputs({"gone": (8,)}), cases)] == []
    assert [*splits.absent_regions(outputs, [])] == []


def test_a_class_that_no_validation_case_holds_is_said_by_name(root, tmp_path, capsys):
    changes = ["training.max_steps=0", "monitor.picture=true"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    text = capsys.readouterr().out
    assert text.count("validation: no voxel of nerve in any case; each ratio is 1 there") == 1
    (line,) = [line for line in text.splitlines() if line.startswith("evaluation of step 0")]
    names = ["surface_dice/artery", "surface_dice/vein", "surface_dice/nerve", "surface_dice/mean"]
    others = ("dice", "precision", "recall", "components", "components_truth")
    assert line.split()[4::2] == names + [f"{name}/mean" for name in others]
    (start,) = events(run_folder(tmp_path), "start")
    assert start["score"] == "surface_dice/mean" and start["better"]["dice/nerve"] == "higher"
    assert json.dumps(start["measured"]["sizes"]["vein"]) == "[0, 20, 100]"
    assert "foreground" not in start["measured"]
    assert (run_folder(tmp_path) / "progress.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("validation.score=dice/arteries", "validation.score: expected a class among artery, vein"),
        ("postprocess.hysteresis=0.3", "postprocess.hysteresis: "),
        ("inference.threshold=0.3", "inference.threshold: "),
        ("postprocess.min_component_voxels={aorta: 3}", "postprocess.min_component_voxels: "),
    ],
)
def test_what_classes_cannot_have_is_refused_before_anything_is_written(
    root, tmp_path, capsys, change, said
):
    assert train.main(settings(root, tmp_path, change)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_numbers_that_are_given_for_a_region_are_not_chosen_whichever_process_evaluates(
    root, tmp_path
):
    changes = [OVERLAPPING, "training.max_steps=0", "inference.threshold={vessel: 0.01}"]
    changes += ["validation.thresholds=[0.4]", "postprocess.min_component_voxels=7"]
    told = []
    for background in ("true", "false"):
        place, process = tmp_path / background, f"validation.background={background}"
        assert train.main(settings(root, place, *changes, process)) == 0
        told += events(run_folder(place), "evaluation")
        assert weights_of(run_folder(place))["loop"]["evaluations"]["chosen"] == {
            "threshold": {"vessel": 0.01, "artery": 0.4},
            "min_component_voxels": {"vessel": 7, "artery": 7},
        }
    assert told[0]["scores"] == told[1]["scores"] and told[0]["steps"] == told[1]["steps"]
