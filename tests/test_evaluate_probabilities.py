"""evaluate.py on the probabilities that infer.py leaves beside its masks."""

import csv

import numpy as np
import pytest

from tests.test_evaluate import bar, read_csv, run, write

ECE = ("--scores", "dice", "ece")


@pytest.fixture
def folders(tmp_path):
    """A truth of 4 of 180 voxels and a prediction that is right, with 0.75 there and 0.25 else."""
    write(tmp_path / "truth" / "a.tif", bar(2))
    write(tmp_path / "pred" / "a.tif", bar(2))
    save(tmp_path / "pred" / "probabilities" / "a.tif", 0.25 + 0.5 * bar(2))
    return tmp_path


def save(path, probs):
    write(path, np.asarray(probs, np.float32))


def evaluate(folders, *options, pred="pred"):
    """(exit status, the row of case a)."""
    out = folders / "s.csv"
    status = run("--pred", folders / pred, "--truth", folders / "truth", "--out", out, *options)
    return status, next(iter(read_csv(out).values())) if out.exists() else None


def test_the_error_is_of_the_probabilities_beside_the_prediction(folders):
    status, found = evaluate(folders, *ECE)
    assert (status, found["dice"]) == (0, "1.0")
    assert float(found["ece"]) == pytest.approx(0.25)
    save(folders / "pred" / "probabilities" / "a.tif", bar(2))
    found = evaluate(folders, *ECE, "ece@3")[1]
    assert (found["ece"], found["ece@3"]) == ("0.0", "0.0")


def test_unlabeled_voxels_are_left_out_of_the_error(folders):
    truth = bar(2)
    truth[0] = 2
    write(folders / "truth" / "a.tif", truth)
    probs = bar(2).astype(float)
    probs[0] = 0.9
    save(folders / "pred" / "probabilities" / "a.tif", probs)
    assert evaluate(folders, *ECE, "--ignore-label", 2)[1]["ece"] == "0.0"


def test_each_class_has_probabilities_in_a_folder_of_its_name(folders):
    both = np.maximum(bar(2, value=3), bar(8, 2, value=7))
    for name in ("truth", "pred"):
        write(folders / name / "a.tif", both)
    save(folders / "pred" / "probabilities" / "artery" / "a.tif", 0.9 * bar(2))
    classes = ("--classes", "artery=3", "vein=7")
    status, found = evaluate(folders, *classes, "--scores", "ece/artery", "dice")
    assert (status, found["dice/mean"]) == (0, "1.0")
    assert float(found["ece/artery"]) == pytest.approx(4 * 0.1 / 180, abs=1e-6)
    save(folders / "pred" / "probabilities" / "vein" / "a.tif", bar(8, 2))
    found = evaluate(folders, *classes, "--scores", "ece")[1]
    assert found["ece/vein"] == "0.0"
    assert float(found["ece/mean"]) == pytest.approx(2 * 0.1 / 180, abs=1e-6)


def test_columns_are_as_before_unless_the_new_scores_are_asked_for(folders):
    evaluate(folders)
    with open(folders / "s.csv", newline="") as file:
        assert next(csv.reader(file)) == [
            "case", "summary", "method", "dice", "surface_dice", "precision", "recall",
            "voi_score", "components", "components_truth", "tolerance", "spacing", "unit",
        ]  # fmt: skip
    status, found = evaluate(folders, "--scores", "dice", "sheet_recall@0:3", "gap_filled", "ece")
    assert status == 0
    assert list(found)[3:8] == ["dice", "sheet_recall@0:3", "gap_filled", "ece", "tolerance"]
    assert "tolerance" not in evaluate(folders, "--scores", "dice", "gap_filled@0:3")[1]


def test_cases_without_a_sheet_or_gap_in_range_are_noted_once_for_each_score(folders, capsys):
    two = np.maximum(bar(2), bar(8, 2))  # 3 apart
    write(folders / "truth" / "b.tif", two)
    for name in ("pred", "other"):
        for case, mask in (("a", bar(2)), ("b", two)):
            write(folders / name / f"{case}.tif", mask)
    options = (
        "--pred",
        folders / "other",
        "--scores",
        "sheet_recall@0:3",
        "gap_filled@0:9",
        "dice",
    )
    assert evaluate(folders, *options)[0] == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "sheets" in line]
    none = "note: no sheets so far apart in the truth"
    assert notes == [f"{none}, sheet_recall@0:3 is 1: a", f"{none}, gap_filled@0:9 is 0: a"]


def test_missing_and_wrong_probabilities_are_named_at_once_and_nothing_is_written(folders, capsys):
    for case, probs in (("b", 1.5 * bar(2)), ("c", np.zeros((3, 5, 11))), ("d", None)):
        write(folders / "truth" / f"{case}.tif", bar(2))
        write(folders / "pred" / f"{case}.tif", bar(2))
        if probs is not None:
            save(folders / "pred" / "probabilities" / f"{case}.tif", probs)
    assert evaluate(folders, *ECE) == (2, None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "probabilities/b.tif: expected probabilities of one channel from 0 to 1, got" in said[0]
    assert "expected the shape of" in said[1] and "c.tif" in said[1]
    assert "probabilities/d.tif: expected the probabilities of this prediction" in said[2]
    assert "inference.save_probabilities=true" in said[2]


@pytest.mark.parametrize("asked", [ECE, ("--rank", "ece@20")])
def test_otsu_has_no_probabilities_and_that_is_said(folders, capsys, asked):
    with pytest.raises(SystemExit, match="2"):
        evaluate(folders, *asked, "--otsu", folders / "truth")
    assert "--otsu: expected scores of masks with it, got ece" in capsys.readouterr().err
