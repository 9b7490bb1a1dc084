"""The script end to end: values of its CSV and table, matching of cases, and every fault."""

import csv
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

import evaluate
from volumes import casefile, files, origins

SHARED = Path(os.environ.get("LAMINA_SHARED", Path(__file__).parents[2] / "shared"))


def bar(start, length=4, shape=(3, 5, 12), value=1):
    """A bar of one voxel's width along x in the middle of an empty volume."""
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 2, shape[1] // 2, start : start + length] = value
    return mask


def write(path, mask, spacing=(1.0, 1.0, 1.0), unit="micron"):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_volume(path, mask, spacing=spacing, unit=unit)
    return str(path)


def write_dataset(root, labels, ignore_label=None):
    """A prepared dataset: labels maps id to a label, the image is 100 where the label is 1."""
    root.mkdir()
    for case, label in labels.items():
        image = np.where(label == 1, 100, 20).astype(np.uint8)[None]
        about = {"spacing": (5.0, 1.0, 1.0), "unit": "micron", "affine": None, "group": case}
        casefile.write_case(root / f"{case}.h5", image, label, ignore_label=ignore_label, **about)
    classes = {"background": 0, "foreground": 1}
    casefile.write_dataset(
        root, classes=classes, ignore_label=ignore_label, unit="micron", case_ids=list(labels)
    )
    return str(root)


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def read_csv(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["summary"] or row["case"], row["method"]): row for row in rows}


# ---------------------------------------------------------------------------- what it writes


def test_folders_are_matched_by_id_and_scored(tmp_path, capsys):
    write(tmp_path / "pred" / "a.nii.gz", bar(3, 4), (5.0, 1.0, 1.0))
    write(tmp_path / "pred" / "b.nii.gz", bar(2), (5.0, 1.0, 1.0))
    write(tmp_path / "truth" / "a_lbl.nii.gz", bar(1, 5), (5.0, 1.0, 1.0))
    write(tmp_path / "truth" / "b_lbl.nii.gz", bar(2), (5.0, 1.0, 1.0))
    out = tmp_path / "new" / "scores.csv"
    assert run("--pred", tmp_path / "pred", "--truth", tmp_path / "truth", "--out", out) == 0
    rows = read_csv(out)
    assert list(rows) == [(case, "prediction") for case in ("a", "b", "mean", "median", "worst")]
    a, mean = rows["a", "prediction"], rows["mean", "prediction"]
    assert float(a["dice"]) == pytest.approx(2 * 3 / 9, abs=1e-6)
    assert float(a["precision"]) == pytest.approx(3 / 4)
    assert float(a["recall"]) == pytest.approx(3 / 5)
    assert float(a["surface_dice"]) == 1.0
    assert (a["components"], a["components_truth"]) == ("1", "1")
    assert (a["tolerance"], a["spacing"], a["unit"]) == ("2.0", "5 1 1", "micron")
    assert float(mean["dice"]) == pytest.approx((2 * 3 / 9 + 1) / 2, abs=1e-6)
    assert os.listdir(out.parent) == ["scores.csv"]
    printed = capsys.readouterr().out
    assert "surface dice @ 2 micron" in printed
    assert "0.667" in printed


def test_a_method_of_a_folder_that_is_no_utf8_has_escapes_in_the_table(tmp_path):
    truth = write(tmp_path / "truth" / "ö.tif", bar(2))
    write(tmp_path / "a" / "ö.tif", bar(2))
    try:
        os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/m\xf6")
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    write(tmp_path / "b" / "ö.tif", bar(3))
    both, out = (tmp_path / "m\udcf6", tmp_path / "b"), tmp_path / "s.csv"
    assert run("--pred", *both, "--truth", truth, "--scores", "dice", "--out", out) == 0
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    scores = {(row["case"], row["method"]): row["dice"] for row in rows}
    assert scores["ö", "m\\udcf6"] == "1.0" and scores["ö", "b"] == "0.75"


def test_a_case_called_mean_is_not_taken_for_the_mean(tmp_path):
    for name, prediction in (("mean", bar(1)), ("b", bar(2))):
        write(tmp_path / "pred" / f"{name}.tif", prediction)
        write(tmp_path / "truth" / f"{name}.tif", bar(2))
    out = tmp_path / "s.csv"
    command = ("--pred", tmp_path / "pred", "--truth", tmp_path / "truth")
    assert run(*command, "--scores", "dice", "--out", out) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["case"], row["summary"], row["dice"]) for row in rows] == [
        *[("b", "", "1.0"), ("mean", "", "0.75")],
        *[("", "mean", "0.875"), ("", "median", "0.875"), ("", "worst", "0.75")],
    ]


def test_one_file_each_is_a_pair_whatever_the_names(tmp_path):
    prediction = write(tmp_path / "result.tif", bar(2))
    truth = write(tmp_path / "expert.nii.gz", bar(2))
    out = tmp_path / "scores.csv"
    assert run("--pred", prediction, "--truth", truth, "--out", out) == 0
    assert read_csv(out)["result", "prediction"]["dice"] == "1.0"


def test_dataset_gives_truth_spacing_ignore_label_and_images(tmp_path, capsys):
    label = bar(2)
    label[0] = 2
    root = write_dataset(tmp_path / "set", {"a": label, "b": bar(1)}, ignore_label=2)
    prediction = bar(2)
    prediction[0] = 1
    write(tmp_path / "pred" / "a.nii.gz", prediction, (5.0, 1.0, 1.0))
    out = tmp_path / "scores.csv"
    assert run("--pred", tmp_path / "pred", "--truth", root, "--otsu", root, "--out", out) == 0
    rows = read_csv(out)
    assert rows["a", "prediction"]["dice"] == rows["a", "otsu"]["dice"] == "1.0"
    assert rows["a", "prediction"]["spacing"] == "5 1 1"
    assert ("mean", "otsu") in rows
    assert "truth without a prediction, not scored: b" in capsys.readouterr().out


def test_otsu_of_dark_things_needs_invert_which_is_said(tmp_path, capsys):
    def said():
        return capsys.readouterr().out

    dark = np.where(bar(2) == 1, 20, 100).astype(np.uint8)
    image = write(tmp_path / "a_img.tif", dark)
    mask = write(tmp_path / "a.tif", bar(2))
    command = ("--pred", mask, "--truth", mask, "--otsu", image, "--out", tmp_path / "s.csv")
    assert run(*command) == 0
    assert read_csv(tmp_path / "s.csv")["a", "otsu"]["dice"] == "0.0"
    assert "otsu: the truth is on the other side of the threshold; give --invert" in said()
    assert run(*command, "--invert") == 0
    assert read_csv(tmp_path / "s.csv")["a", "otsu"]["dice"] == "1.0"
    assert "otsu: the truth" not in said()


def test_spacing_given_by_hand_wins_over_the_header_and_that_is_said(tmp_path, capsys):
    lower, upper = np.zeros((2, 6, 8, 8), np.uint8)
    lower[2], upper[3] = 1, 1
    command = (
        *("--pred", write(tmp_path / "a.nii.gz", lower)),
        *("--truth", write(tmp_path / "b.nii.gz", upper)),
        *("--out", tmp_path / "s.csv"),
    )
    assert run(*command) == 0
    assert read_csv(tmp_path / "s.csv")["a", "prediction"]["surface_dice"] == "1.0"
    assert "--spacing is used" not in capsys.readouterr().out
    assert run(*command, "--spacing", 5, 1, 1) == 0
    assert "b.nii.gz states 1 1 1 micron, --spacing is used" in capsys.readouterr().out
    row = read_csv(tmp_path / "s.csv")["a", "prediction"]
    assert (row["surface_dice"], row["spacing"], row["unit"]) == ("0.5", "5 1 1", "")
    assert run(*command, "--spacing", 5, 1, 1, "--tolerance", 5) == 0
    assert read_csv(tmp_path / "s.csv")["a", "prediction"]["surface_dice"] == "1.0"


@pytest.mark.parametrize("white", [254, 255])
def test_white_masks_are_read_as_ones_and_it_is_said(tmp_path, capsys, white):
    prediction = write(tmp_path / "a.tif", bar(2, value=white), None)
    truth = write(tmp_path / "b.tif", bar(2, value=white), None)
    assert run("--pred", prediction, "--truth", truth, "--out", tmp_path / "s.csv") == 0
    assert read_csv(tmp_path / "s.csv")["a", "prediction"]["dice"] == "1.0"
    printed = capsys.readouterr().out
    assert f"predictions of 0 and {white} read as 0 and 1: a" in printed
    assert f"truths of 0 and {white} read as 0 and 1: a" in printed


def test_white_of_two_values_in_two_predictions_is_said_of_both(tmp_path, capsys):
    for name, white in (("m", 254), ("n", 255)):
        write(tmp_path / name / "a.tif", bar(2, value=white))
    write(tmp_path / "t" / "a.tif", bar(2))
    assert run("--pred", tmp_path / "m", tmp_path / "n", "--truth", tmp_path / "t") == 0
    printed = capsys.readouterr().out
    assert all(
        f"predictions of 0 and {white} read as 0 and 1: a" in printed for white in (254, 255)
    )


def test_no_spacing_anywhere_is_said(tmp_path, capsys):
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", bar(2), photometric="minisblack")
    assert run("--pred", tmp_path / "a.tif", "--truth", tmp_path / "a.tif") == 0
    said = capsys.readouterr().out
    assert "no file has a spacing: tolerance and distances are in voxels" in said
    assert "@ 2 voxels" in said
    command = ("--pred", tmp_path / "a.tif", "--truth", tmp_path / "a.tif", "--spacing", 5, 1, 1)
    assert run(*command) == 0
    assert "1 1 1" not in capsys.readouterr().out
    write(tmp_path / "b.nii.gz", bar(2), (5.0, 1.0, 1.0))
    assert run("--pred", tmp_path / "b.nii.gz", "--truth", tmp_path / "a.tif") == 0
    said = capsys.readouterr().out
    assert "the truth has no spacing, that of the prediction is used (--spacing): b" in said


def test_an_ignore_label_of_255_is_not_taken_for_white(tmp_path):
    prediction = write(tmp_path / "a.tif", bar(2))
    truth = write(tmp_path / "b.tif", bar(2) + bar(6, 4, value=255))
    command = ("--pred", prediction, "--truth", truth, "--out", tmp_path / "s.csv")
    assert run(*command, "--ignore-label", 255) == 0
    assert read_csv(tmp_path / "s.csv")["a", "prediction"]["dice"] == "1.0"


def test_labels_and_images_in_one_folder_are_told_apart(tmp_path):
    write(tmp_path / "both" / "a_img.tif", bar(2, value=90))
    write(tmp_path / "both" / "a_lbl.tif", bar(2))
    write(tmp_path / "both" / "b_img.tif", bar(2, value=90))
    write(tmp_path / "both" / "b_lbl.tif", bar(2))
    write(tmp_path / "pred" / "a.tif", bar(2))
    write(tmp_path / "pred" / "a_probs.tif", bar(2).astype(np.float32) / 2)
    both, out = tmp_path / "both", tmp_path / "s.csv"
    command = ("--pred", tmp_path / "pred", "--truth", both, "--otsu", both, "--out", out)
    assert run(*command, "--cases", "a") == 0
    assert read_csv(out)["a", "prediction"]["dice"] == read_csv(out)["a", "otsu"]["dice"] == "1.0"


def test_spacing_in_another_unit_is_the_same_spacing(tmp_path):
    prediction = write(tmp_path / "a.nii.gz", bar(2), (0.01, 0.01, 0.01), "micron")
    truth = write(tmp_path / "b.h5", bar(2), (10.0, 10.0, 10.0), "nm")
    assert run("--pred", prediction, "--truth", truth) == 0


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (bar(0, 0), bar(2), "0.0"),
        (bar(2), bar(0, 0), "0.0"),
        (bar(0, 0), bar(0, 0), "1.0"),
        (bar(2, 1), bar(2, 1), "1.0"),
        (np.ones((3, 5, 12), np.uint8), np.ones((3, 5, 12), np.uint8), "1.0"),
    ],
    ids=["empty_prediction", "empty_truth", "both_empty", "one_voxel", "all_foreground"],
)
def test_degenerate_masks_have_scores(tmp_path, prediction, truth, expected):
    paths = write(tmp_path / "a.tif", prediction), write(tmp_path / "b.tif", truth)
    assert run("--pred", paths[0], "--truth", paths[1], "--out", tmp_path / "s.csv") == 0
    row = read_csv(tmp_path / "s.csv")["a", "prediction"]
    assert row["dice"] == row["surface_dice"] == expected


# ---------------------------------------------------------------------------- faults


def test_all_faults_of_a_folder_are_named_at_once_and_nothing_is_written(tmp_path, capsys):
    pred, truth, out = tmp_path / "pred", tmp_path / "truth", tmp_path / "scores.csv"
    for case in ("classes", "float", "fine", "shape", "spacing", "unlabeled"):
        write(truth / f"{case}.nii.gz", bar(2) if case != "unlabeled" else bar(2) * 0 + 2)
        write(pred / f"{case}.nii.gz", bar(2))
    write(pred / "classes.nii.gz", bar(2, value=3))
    write(pred / "float.nii.gz", bar(2).astype(np.float32) / 2)
    write(pred / "shape.nii.gz", bar(2, shape=(3, 5, 13)))
    write(pred / "spacing.nii.gz", bar(2), (1.0, 1.0, 1.02))
    write(truth / "truncated.nii.gz", np.random.default_rng(0).integers(0, 2, (9, 9, 9)))
    write(pred / "truncated.nii.gz", np.zeros((9, 9, 9), np.uint8))
    whole = (truth / "truncated.nii.gz").read_bytes()
    (truth / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert run("--pred", pred, "--truth", truth, "--ignore-label", 2, "--out", out) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [Path(line.split(":")[0]).name.split(".")[0] for line in errors[:-1]] == [
        *("classes", "float", "shape", "spacing", "truncated", "unlabeled")
    ]
    assert errors[-1] == "6 errors; nothing was written"
    assert "expected the values 0, 1, got 0, 3" in errors[0]
    assert "(3, 5, 12), got (3, 5, 13)" in errors[2]
    assert "1 1 1 micron, got 1 1 1.02 micron" in errors[3]
    assert "expected labeled voxels, got 2 (ignored) in all of them" in errors[5]
    assert not out.exists()


def test_predictions_without_truth_are_all_named_beside_other_faults(tmp_path, capsys):
    for case in ("a", "b", "c"):
        write(tmp_path / "pred" / f"{case}.tif", bar(2, value=3 if case == "c" else 1))
    write(tmp_path / "truth" / "c.tif", bar(2))
    assert run("--pred", tmp_path / "pred", "--truth", tmp_path / "truth") == 2
    errors = capsys.readouterr().err
    assert "expected truth a with it, got c" in errors
    assert "expected truth b with it, got c" in errors
    assert "c.tif: expected the values 0, 1, got 0, 3" in errors
    assert "3 errors" in errors


def test_two_predictions_of_one_case_are_a_fault(tmp_path, capsys):
    first = write(tmp_path / "pred" / "a.nii.gz", bar(2))
    second = write(tmp_path / "pred" / "a.tif", bar(2))
    assert run("--pred", tmp_path / "pred", "--truth", first) == 2
    errors = capsys.readouterr().err
    assert f"{second}: expected one prediction of case a, got {first} too" in errors


def test_unlabeled_value_that_was_not_declared_points_to_the_option(tmp_path, capsys):
    truth = write(tmp_path / "a.tif", bar(2) + bar(8, 2, value=2))
    assert run("--pred", write(tmp_path / "b.tif", bar(2)), "--truth", truth) == 2
    errors = capsys.readouterr().err
    assert f"{truth}: expected the values 0, 1, got 0, 1, 2" in errors
    assert "--ignore-label" in errors


@pytest.mark.parametrize("role", ["--pred", "--truth", "--otsu"])
def test_a_path_that_does_not_exist_is_one_sentence(tmp_path, capsys, role):
    mask = write(tmp_path / "a.tif", bar(2))
    paths = {"--pred": mask, "--truth": mask, "--otsu": mask, role: tmp_path / "gone"}
    assert run(*(word for pair in paths.items() for word in pair)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"{tmp_path / 'gone'}: expected")


def test_otsu_faults_name_the_image(tmp_path, capsys):
    mask = write(tmp_path / "a.tif", bar(2))
    image = write(tmp_path / "nan.nii.gz", np.full((3, 5, 12), np.nan, np.float32))
    assert run("--pred", mask, "--truth", mask, "--otsu", image) == 2
    assert capsys.readouterr().err.startswith(f"{image}: ")
    image = write(tmp_path / "rgb.nii.gz", np.zeros((2, 3, 5, 12), np.uint8))
    assert run("--pred", mask, "--truth", mask, "--otsu", image) == 2
    assert f"{image}: expected one channel for --otsu, got 2" in capsys.readouterr().err


def test_a_folder_that_is_no_dataset_of_ours_is_named(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text('{"format": "x"}')
    mask = write(tmp_path / "a.tif", bar(2))
    assert run("--pred", mask, "--truth", tmp_path / "set") == 2
    assert "dataset.json: expected what prepare.py writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--spacing", "1", "0", "1"),
        ("--spacing", "1", "nan", "1"),
        ("--tolerance", "-1"),
        ("--ignore-label", "1"),
        ("--invert",),
        ("--out", "."),
    ],
)
def test_impossible_options_exit_with_2(tmp_path, options):
    mask = write(tmp_path / "a.tif", bar(2))
    with pytest.raises(SystemExit) as stop:
        run("--pred", mask, "--truth", mask, *options)
    assert stop.value.code == 2


def test_a_csv_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    mask = write(tmp_path / "a.tif", bar(2))
    assert run("--pred", mask, "--truth", mask, "--out", f"{mask}/scores.csv") == 2
    assert f"{mask}/scores.csv: expected a file to write" in capsys.readouterr().err
    assert run("--pred", mask, "--truth", mask, "--out", "/dev/full/x") == 2


# ---------------------------------------------------------------------------- real vessels


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs real volumes in {SHARED}")
def test_otsu_on_real_vessels_has_the_known_dice(tmp_path):
    folder, case = SHARED / "data" / "vesselNN_tiff", "poon2015_plaqueVessels"
    truth = folder / f"{case}_label_underSegmented.tif"
    image, out = folder / f"{case}_BM4D_denoised.tif", tmp_path / "s.csv"
    command = ("--pred", truth, "--truth", truth, "--otsu", image, "--spacing", 5, 1, 1)
    assert run(*command, "--out", out) == 0
    assert float(read_csv(out)[case, "otsu"]["dice"]) == pytest.approx(0.510, abs=5e-4)
    assert read_csv(out)[case, "prediction"]["surface_dice"] == "1.0"


# ---------------------------------------------------------------------------- several methods


def test_further_predictions_are_scored_as_methods_of_their_own(tmp_path):
    write(tmp_path / "new" / "a.nii.gz", bar(2))
    write(tmp_path / "old" / "a.nii.gz", bar(4))
    truth = write(tmp_path / "truth" / "a_lbl.nii.gz", bar(2))
    out = tmp_path / "scores.csv"
    both = tmp_path / "new", f"old={tmp_path / 'old'}"
    assert run("--pred", *both, "--truth", truth, "--out", out) == 0
    rows = read_csv(out)
    assert float(rows["a", "new"]["dice"]) == 1.0
    assert float(rows["a", "old"]["dice"]) == 0.5  # bars of 4 that share 2
    assert float(rows["mean", "old"]["dice"]) == 0.5


def test_a_case_that_is_missing_beside_is_a_fault(tmp_path, capsys):
    for case in "ab":
        write(tmp_path / "new" / f"{case}.nii.gz", bar(2))
        write(tmp_path / "truth" / f"{case}_lbl.nii.gz", bar(2))
    write(tmp_path / "old" / "a.nii.gz", bar(4))
    new, old = tmp_path / "new", tmp_path / "old"
    assert run("--pred", new, old, "--truth", tmp_path / "truth") == 2
    assert "expected prediction of old b with it, got a" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("--pred", new, new, "--truth", tmp_path / "truth")
    assert "of different names" in capsys.readouterr().err


def test_predictions_are_named_after_their_run(tmp_path):
    paths = [tmp_path / run / "predictions" for run in ("x.1", "b")] + ["c=somewhere", "d.nii.gz"]
    names = [name for name, _ in evaluate.named(list(map(str, paths)))]
    assert names == ["x.1", "b", "c", "d"]
    assert evaluate.named(["runs/b/predictions"]) == [("prediction", "runs/b/predictions")]


def run_with_predictions(folder):
    """A run folder whose last.pt was used to predict a case."""
    last = folder / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    last.write_text("weights")
    path = write(folder / "predictions" / "a.tif", bar(2))
    origins.write(path, [origins.origin(last) | {"step": 8}])
    return last


def test_a_run_stands_for_its_predictions_by_folder_link_or_checkpoint(tmp_path, capsys):
    last = run_with_predictions(tmp_path / "runs" / "r")
    (tmp_path / "runs" / "last.pt").symlink_to("r/checkpoints/last.pt")
    truth = write(tmp_path / "truth" / "a.tif", bar(2))
    for source in (tmp_path / "runs" / "r", tmp_path / "runs" / "last.pt", last, f"x={last}"):
        assert run("--pred", source, "--truth", truth, "--scores", "dice") == 0
        out, err = capsys.readouterr()
        assert "1.000" in out and "note" not in out and err == ""


def predicted(folder, tolerance, unit, spacing=(10.0, 10.0, 10.0)):
    """A folder with the prediction of a case by a run with this tolerance."""
    path = write(folder / "a.tif", bar(2), spacing, "nm" if spacing else "")
    about = {"step": 8, "tolerance": tolerance, "unit": unit}
    origins.write(path, [origins.origin(folder / "last.pt") | about])
    return folder


def test_the_tolerance_is_that_of_the_run_in_the_unit_of_the_cases_and_is_said(tmp_path, capsys):
    pred = predicted(tmp_path / "pred", 0.02, "micron")
    command = ("--pred", pred, "--truth", write(tmp_path / "t.tif", bar(4), (10, 10, 10), "nm"))
    assert run(*command, "--out", tmp_path / "s.csv") == 0
    row = read_csv(tmp_path / "s.csv")["a", "prediction"]
    assert (row["tolerance"], row["unit"], row["surface_dice"]) == ("20.0", "nm", "1.0")
    said = capsys.readouterr().out
    assert "note: the tolerance is that of the run, 20 nm (--tolerance)" in said
    assert "surface dice @ 20 nm" in " ".join(said.split()) and "one voxel" not in said
    assert run(*command, "--tolerance", 2) == 0
    assert "that of the run" not in capsys.readouterr().out


def test_the_tolerance_of_a_run_does_not_count_in_voxels_nor_among_runs_of_several(
    tmp_path, capsys
):
    pred, truth = predicted(tmp_path / "p", 20.0, "nm", None), tmp_path / "t.tif"
    write(truth, bar(2), None, "")
    assert run("--pred", pred, "--truth", truth, "--out", tmp_path / "s.csv") == 0
    assert read_csv(tmp_path / "s.csv")["a", "prediction"]["tolerance"] == "2.0"
    assert "that of the run" not in capsys.readouterr().out
    both = predicted(tmp_path / "q", 20.0, "nm"), predicted(tmp_path / "r", 30.0, "nm")
    write(truth, bar(2), (10, 10, 10), "nm")
    assert run("--pred", *both, "--truth", truth) == 0
    assert "the tolerances of the runs differ, 2 is used" in capsys.readouterr().out


def test_cases_of_two_units_need_a_tolerance_by_hand(tmp_path, capsys):
    pred = predicted(tmp_path / "pred", 20.0, "nm")
    write(pred / "b.tif", bar(2), None, "")
    write(tmp_path / "t" / "a.tif", bar(2), (10, 10, 10), "nm")
    write(tmp_path / "t" / "b.tif", bar(2), None, "")
    assert run("--pred", pred, "--truth", tmp_path / "t") == 2
    assert "--tolerance: expected cases of one unit" in capsys.readouterr().err
    assert run("--pred", pred, "--truth", tmp_path / "t", "--tolerance", 2) == 0


def test_a_crop_beside_the_whole_file_is_answered_by_how_the_crop_is_scored(tmp_path, capsys):
    crop, whole = write(tmp_path / "a.tif", bar(2)), bar(2, shape=(9, 5, 12))
    assert run("--pred", crop, "--truth", write(tmp_path / "b.tif", whole)) == 2
    assert "(of some slices: a folder that prepare.py --crop wrote)" in capsys.readouterr().err


def test_a_checkpoint_that_predicted_nothing_is_one_sentence_with_the_command(tmp_path, capsys):
    best = run_with_predictions(tmp_path / "r").with_name("best.pt")
    best.write_text("other weights")
    truth = write(tmp_path / "truth" / "a.tif", bar(2))
    with pytest.raises(SystemExit) as caught:
        run("--pred", best, "--truth", truth)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"expected predictions, got {best}, of which there are none in {tmp_path}/r/" in error
    assert error.endswith(f"predict first with python infer.py --ckpt {best}\n")


def test_the_folder_of_a_sweep_has_no_predictions_of_its_own(tmp_path, capsys):
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(SystemExit):
        run("--pred", tmp_path, "--truth", write(tmp_path / "t" / "a.tif", bar(2)))
    assert "a sweep; give one of its runs" in capsys.readouterr().err


def test_stale_predictions_are_a_note(tmp_path, capsys):
    last = run_with_predictions(tmp_path / "r")
    last.write_text("weights of later")
    truth = write(tmp_path / "truth" / "a.tif", bar(2))
    assert run("--pred", tmp_path / "r", "--truth", truth, "--scores", "dice") == 0
    note = f"note: a: predicted with {last} of step 8, which was saved anew since; predict again"
    assert note in capsys.readouterr().out


def test_a_truth_without_prediction_is_a_fault_unless_cases_are_named(tmp_path, capsys):
    for case in ("a1", "a2", "b"):
        write(tmp_path / "truth" / f"{case}.tif", bar(2))
    write(tmp_path / "pred" / "a1.tif", bar(2))
    command = ("--pred", tmp_path / "pred", "--truth", tmp_path / "truth")
    assert run(*command) == 2
    errors = capsys.readouterr().err
    assert "expected prediction a2 with it, got a1; say --cases" in errors
    assert "expected prediction b with it, got a1" in errors
    assert "2 errors; nothing was written" in errors
    assert run(*command, "--cases", "a1") == 0
    assert run(*command, "--cases", "a*") == 2
    assert "prediction b" not in capsys.readouterr().err
    assert run(*command, "--cases", "a1", "c*") == 2
    assert "--cases c*: expected a case of it, got a1, a2, b" in capsys.readouterr().err


def test_json_holds_summaries_and_leaderboards(tmp_path, capsys):
    for case, starts in {"a": (2, 3), "b": (2, 4), "c": (2, 2)}.items():
        write(tmp_path / "truth" / f"{case}.tif", bar(2))
        for method, start in zip(("same", "aside"), starts, strict=True):
            write(tmp_path / method / f"{case}.tif", bar(start))
    out = tmp_path / "s.json"
    both = tmp_path / "aside", tmp_path / "same"
    command = ("--truth", tmp_path / "truth", "--scores", "dice", "components", "--out", out)
    assert run("--pred", *both, *command) == 0
    found = json.loads(out.read_text())
    # bars of 4 voxels that lie 1, 2 and 0 aside
    assert found["summary"]["aside"]["dice"] == {
        **{"mean": 0.75, "median": 0.75, "worst": 0.5},
        "worst_case": "b",
    }
    assert found["summary"]["aside"]["components"]["worst"] is None
    best, other = found["leaderboard"]["dice"]
    assert (best["method"], best["mean"], best["difference"]) == ("same", 1.0, None)
    assert (other["method"], other["difference"]) == ("aside", -0.25)
    assert (other["ahead"], other["behind"]) == (0, 2)
    assert other["difference_interval"] == [-0.5, 0.0]
    assert len(found["cases"]) == 6
    printed = capsys.readouterr().out
    assert "leaderboard by dice" in printed
    assert "are too narrow" in printed


def test_scores_are_chosen_by_name(tmp_path, capsys):
    mask = write(tmp_path / "a.tif", bar(2))
    command = ("--pred", mask, "--truth", mask, "--out", tmp_path / "s.csv", "--tolerance", "0.5")
    assert run(*command) == 0 and "0.5 is less than one voxel" in capsys.readouterr().out
    assert run(*command, "--scores", "hd95", "vesuvius_score", "surface_dice@0.5") == 0
    row = read_csv(tmp_path / "s.csv")["a", "prediction"]
    # None of these takes that tolerance.
    assert "less than one voxel" not in capsys.readouterr().out and "tolerance" not in row
    assert (row["hd95"], row["vesuvius_score"], row["surface_dice@0.5"]) == ("0.0", "1.0", "1.0")
    assert "dice" not in row
    with pytest.raises(SystemExit, match="2"):
        run(*command, "--scores", "dise")
    assert "got dise; the nearest is dice" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(*command, "--rank", "components")
    with pytest.raises(SystemExit, match="0"):
        run("--pred", mask, "--truth", mask, "--list-scores")
    assert "betti_matching_f1_2" in capsys.readouterr().out


def test_overlays_are_written_for_each_prediction(tmp_path):
    from PIL import Image

    root = write_dataset(tmp_path / "set", {"a": bar(2), "b": bar(1)})
    for method in ("new", "old"):
        write(tmp_path / method / "a.nii.gz", bar(3), (5.0, 1.0, 1.0))
    both = tmp_path / "new", tmp_path / "old"
    assert run("--pred", *both, "--truth", root, "--overlays", tmp_path / "pictures") == 0
    assert sorted(os.listdir(tmp_path / "pictures")) == ["new.png", "old.png"]  # no partial file
    with Image.open(tmp_path / "pictures" / "new.png") as picture:
        assert min(picture.size) > 100


def test_the_spacing_of_a_prepared_dataset_wins_over_the_predictions_header(tmp_path):
    root = write_dataset(tmp_path / "d", {"a": bar(2)})  # 5 1 1
    write(tmp_path / "pred" / "a.nii.gz", bar(2), (1.0, 1.0, 1.0))
    out = tmp_path / "s.csv"
    assert run("--pred", tmp_path / "pred", "--truth", root, "--out", out) == 0
    assert read_csv(out)["a", "prediction"]["spacing"] == "5 1 1"


def test_classes_of_the_truth_can_be_named(tmp_path, capsys):
    truth = np.maximum(bar(2), bar(7, value=2))
    truth[2] = 9
    write(tmp_path / "truth" / "a.nii.gz", truth)
    pred = write(tmp_path / "pred" / "a.nii.gz", bar(7))
    out = tmp_path / "s.csv"
    arguments = ("--pred", pred, "--truth", tmp_path / "truth", "--ignore-label", 9, "--out", out)
    assert run(*arguments) == 2
    assert run(*arguments, "--foreground", 2) == 0
    assert float(read_csv(out)["a", "prediction"]["dice"]) == 1.0
    assert run(*arguments, "--foreground", 2, "--ignore-label", -1) == 0  # no voxel can have it
    assert "no voxel of class" not in capsys.readouterr().out
    assert run(*arguments, "--foreground", 2, 4) == 0
    assert "truth: no voxel of class 4: a" in capsys.readouterr().out


def test_ids_that_end_in_a_role_word_or_begin_the_file_name_are_found(tmp_path):
    root = write_dataset(tmp_path / "d", {"dog_gt": bar(2), "cat": bar(3)})
    write(tmp_path / "pred" / "dog_gt.nii.gz", bar(2), (5.0, 1.0, 1.0))
    write(tmp_path / "pred" / "cat_denoised.nii.gz", bar(3), (5.0, 1.0, 1.0))
    out = tmp_path / "s.csv"
    assert run("--pred", tmp_path / "pred", "--truth", root, "--out", out) == 0
    rows = read_csv(out)
    assert all(float(rows[i, "prediction"]["dice"]) == 1 for i in ("dog_gt", "cat"))


def test_a_truth_without_usable_spacing_is_a_fault(tmp_path, capsys):
    write(tmp_path / "pred" / "a.tif", bar(2))
    truth = tmp_path / "t" / "a.h5"
    truth.parent.mkdir()
    with h5py.File(truth, "w") as file:
        file["label"] = bar(2)
        file.attrs["spacing"] = (0.0, 1.0, 1.0)
    files.write_volume(tmp_path / "pred" / "a.tif", bar(2))
    assert run("--pred", tmp_path / "pred" / "a.tif", "--truth", truth) == 2
    assert "expected a spacing above 0" in capsys.readouterr().err


def test_a_mirrored_prediction_is_a_fault(tmp_path, capsys):
    about = {"spacing": (1.0, 1.0, 1.0), "unit": "mm"}
    for name, sign in (("pred", 1.0), ("truth", -1.0)):
        affine = np.diag([sign, 1.0, 1.0, 1.0])
        files.write_volume(tmp_path / f"{name}.nii.gz", bar(2), affine=affine, **about)
    assert run("--pred", tmp_path / "pred.nii.gz", "--truth", tmp_path / "truth.nii.gz") == 2
    assert "expected the axes of" in capsys.readouterr().err
    assert run("--pred", tmp_path / "pred.nii.gz", "--truth", tmp_path / "truth.nii.gz",
               "--spacing", 1, 1, 1) == 0  # fmt: skip
    assert "note: prediction and truth: the headers differ (axes)" in capsys.readouterr().out


def test_a_prediction_of_another_origin_is_noted_with_its_cases(tmp_path, capsys):
    about, moved = {"spacing": (1.0, 1.0, 1.0), "unit": "mm"}, np.eye(4)
    moved[1, 3] = 6
    for case, affine in (("a", moved), ("b", moved), ("c", np.eye(4))):
        files.write_volume(tmp_path / "t" / f"{case}.nii.gz", bar(2), affine=np.eye(4), **about)
        files.write_volume(tmp_path / "p" / f"{case}.nii.gz", bar(2), affine=affine, **about)
    assert run("--pred", tmp_path / "p", "--truth", tmp_path / "t", "--scores", "dice") == 0
    note = "the headers differ (origin); they are matched voxel by voxel: a, b\n"
    assert f"note: prediction and truth: {note}" in capsys.readouterr().out


def test_sizes_in_other_units_are_compared_as_lengths(tmp_path, capsys):
    truth = write(tmp_path / "t.nii.gz", bar(2), (1.0, 1.0, 1.0), "mm")
    same = write(tmp_path / "p.nii.gz", bar(2), (1e3, 1e3, 1e3), "micron")
    assert run("--pred", same, "--truth", truth, "--scores", "dice") == 0
    assert "headers" not in capsys.readouterr().out
    other = write(tmp_path / "q.nii.gz", bar(2), (1.0, 1.0, 1.0), "micron")
    assert run("--pred", other, "--truth", truth, "--scores", "dice") == 2
    assert f"expected the spacing of {truth}, 1 1 1 mm, got 1 1 1 mi" in capsys.readouterr().err


def test_a_prepared_case_without_label_is_left_out_and_said(tmp_path, capsys):
    root = tmp_path / "d"
    write_dataset(root, {"a": bar(2)})
    about = {"spacing": (5.0, 1.0, 1.0), "unit": "micron", "affine": None, "group": "b"}
    casefile.write_case(root / "b.h5", bar(2)[None], **about)
    classes = {"background": 0, "foreground": 1}
    casefile.write_dataset(root, classes=classes, ignore_label=None, unit="micron", case_ids="ab")
    for case in "ab":
        write(tmp_path / "pred" / f"{case}.nii.gz", bar(2), (5.0, 1.0, 1.0))
    assert run("--pred", tmp_path / "pred", "--truth", root) == 0
    assert "no label, not scored: b" in capsys.readouterr().out
    (tmp_path / "pred" / "a.nii.gz").unlink()
    assert run("--pred", tmp_path / "pred", "--truth", root) == 2
    assert "expected a label of a predicted case" in capsys.readouterr().err


def test_a_case_that_cannot_be_scored_does_not_cost_the_others(tmp_path, capsys, monkeypatch):
    for case in "abc":
        write(tmp_path / "pred" / f"{case}.nii.gz", bar(2))
        write(tmp_path / "truth" / f"{case}.nii.gz", bar(2))
    score, calls = evaluate.metrics.score, []

    def second_fails(*arguments, **how):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return score(*arguments, **how)

    monkeypatch.setattr(evaluate.metrics, "score", second_fails)
    where = ("--pred", tmp_path / "pred", "--truth", tmp_path / "truth", "--scores", "dice")
    assert run(*where, "--out", tmp_path / "s.csv") == 1
    out, err = capsys.readouterr()
    assert err.startswith("b: the process that scored it") and len(err.splitlines()) == 1
    assert "note: 1 of 3 cases are not scored, and count in no mean" in out
    rows = read_csv(tmp_path / "s.csv")
    assert [case for case, _ in rows][:2] == ["a", "c"] and len(rows) == 5


def test_where_no_case_can_be_scored_nothing_is_written(tmp_path, capsys, monkeypatch):
    def fails(*arguments, **how):
        raise MemoryError

    monkeypatch.setattr(evaluate.metrics, "score", fails)
    where = (
        "--pred",
        write(tmp_path / "a.tif", bar(2)),
        "--truth",
        write(tmp_path / "b.tif", bar(2)),
    )
    assert run(*where, "--spacing", 1, 1, 1, "--out", tmp_path / "s.csv") == 1
    assert "the process that scored it" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()


def test_a_fill_value_does_not_move_the_threshold_of_otsu(tmp_path):
    truth = np.zeros((6, 20, 20), np.uint8)
    truth[:, 5:15, 5:15] = 1
    y, x = np.indices((20, 20))
    image = (100 + 80.0 * truth + 10 * np.sin(2.3 * y + 1.7 * x)).astype(np.float32)
    image[:, :3] = -1e4
    for scale, name in ((1, "a"), (2.0**-60, "b")):
        write(tmp_path / "truth" / f"{name}.nii.gz", truth)
        write(tmp_path / "pred" / f"{name}.nii.gz", truth)
        write(tmp_path / "image" / f"{name}.nii.gz", image * np.float32(scale))
    where = ("--pred", tmp_path / "pred", "--truth", tmp_path / "truth")
    assert run(*where, "--otsu", tmp_path / "image", "--out", tmp_path / "s.csv") == 0
    rows = read_csv(tmp_path / "s.csv")
    assert [rows[name, "otsu"]["dice"] for name in "ab"] == ["1.0", "1.0"]
