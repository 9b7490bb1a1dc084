"""evaluate.py on several classes: rows, tables and files per class, notes, and every fault."""

import json
import warnings

import numpy as np
import pytest

from scoring import report
from tests.test_evaluate import bar, read_csv, run, write
from volumes import casefile

CLASSES = ("--classes", "artery=3", "vein=7")


def two(start, artery=3, vein=7):
    """An artery of 4 voxels at start, and a vein of 2 at the end."""
    return np.maximum(bar(start, value=artery), bar(9, 2, value=vein))


@pytest.fixture
def folders(tmp_path):
    """Truths a and b, and predictions: new is right, old is 1 aside in a, without vein in b."""
    for case in "ab":
        write(tmp_path / "truth" / f"{case}.tif", two(2))
        write(tmp_path / "new" / f"{case}.tif", two(2))
    write(tmp_path / "old" / "a.tif", two(3))
    write(tmp_path / "old" / "b.tif", bar(2, value=3))
    return tmp_path


def dataset(root, labels, classes, ignore_label=None, regions=None):
    """A prepared dataset of labels {id: label}."""
    root.mkdir()
    for case, label in labels.items():
        about = {"spacing": (1.0, 1.0, 1.0), "unit": "micron", "affine": None, "group": case}
        image = label[None] + np.arange(label.shape[2], dtype=np.uint8)
        casefile.write_case(root / f"{case}.h5", image, label, ignore_label=ignore_label, **about)
    about = {"classes": {"background": 0} | classes, "unit": "micron", "ignore_label": ignore_label}
    casefile.write_dataset(root, **about, regions=regions, case_ids=list(labels))
    return root


def evaluate(folders, *options, pred=("new",), truth="truth"):
    """(exit status, rows of the CSV by case and method, or None if there is none)."""
    out = folders / "s.csv"
    paths = [folders / name for name in pred]
    status = run("--pred", *paths, "--truth", folders / truth, "--out", out, *options)
    return status, read_csv(out) if out.exists() else None


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, once they are."""
    figures, draw = [], report.draw_slices

    def draw_and_keep(*arguments, **how):
        figures.append(draw(*arguments, **how))
        return figures[-1]

    monkeypatch.setattr(report, "draw_slices", draw_and_keep)
    return figures


# ---------------------------------------------------------------------------- what it writes


def test_each_class_and_the_mean_have_columns_of_the_csv(folders):
    status, rows = evaluate(folders, *CLASSES, "--scores", "dice", "components", pred=("old",))
    assert status == 0
    row, mean = rows["a", "prediction"], rows["mean", "prediction"]
    columns = [f"{n}/{c}" for n in ("dice", "components") for c in ("artery", "vein", "mean")]
    assert list(row)[3:9] == columns
    assert (row["dice/artery"], row["dice/vein"], row["dice/mean"]) == ("0.75", "1.0", "0.875")
    # b: the artery is right, the vein is missed.
    assert (mean["dice/artery"], mean["dice/vein"]) == ("0.875", "0.5")
    assert mean["dice/mean"] == "0.6875"
    assert (rows["worst", "prediction"]["dice/vein"], row["components/mean"]) == ("0.0", "1.0")


def test_the_table_has_a_row_per_case_class_and_method(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert evaluate(folders, *CLASSES, "--scores", "dice", pred=("new", "old"))[0] == 0
    printed = capsys.readouterr().out
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in printed.splitlines()]
    cells = [line for line in cells if line]
    assert cells[:6] == [
        ["a", "artery", "new", "1.000"],
        ["a", "artery", "old", "0.750"],
        ["a", "vein", "new", "1.000"],
        ["a", "vein", "old", "1.000"],
        ["a", "mean", "new", "1.000"],
        ["a", "mean", "old", "0.875"],
    ]
    assert ["worst", "vein", "old", "0.000"] in cells
    assert "leaderboard by dice/mean" in printed
    default = evaluate(folders, *CLASSES, pred=("new", "old"))
    assert default[0] == 0
    printed = capsys.readouterr().out
    assert "leaderboard by surface_dice/mean" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_methods_are_ranked_by_a_class_or_the_mean(folders, capsys):
    out = folders / "s.json"
    command = (*CLASSES, "--scores", "dice", "hd95/vein", "--rank", "dice/vein", "--out", out)
    assert (
        run("--pred", folders / "old", folders / "new", "--truth", folders / "truth", *command) == 0
    )
    printed = capsys.readouterr().out
    assert "leaderboard by dice/vein" in printed
    content = json.loads(out.read_text())
    assert list(content["leaderboard"]) == ["dice/artery", "dice/vein", "dice/mean", "hd95/vein"]
    best, other = content["leaderboard"]["dice/vein"]
    assert (best["method"], other["method"], other["difference"]) == ("new", "old", -0.5)
    assert content["summary"]["old"]["dice/vein"]["worst_case"] == "b"
    assert content["cases"][0]["dice/mean"] == 0.875
    # hd95 is better where it is lower, whatever the class.
    assert content["summary"]["old"]["hd95/vein"]["worst_case"] == "b"


def test_regions_may_overlap(folders):
    options = ("--classes", "vessel=3+7", "artery=3", "--scores", "dice")
    status, rows = evaluate(folders, *options, pred=("old",))
    row = rows["a", "prediction"]
    assert status == 0 and (float(row["dice/vessel"]), float(row["dice/artery"])) == (
        pytest.approx(2 * 5 / 12, abs=1e-6),
        0.75,
    )


@pytest.mark.parametrize("unlabeled", [255, 1])
def test_a_prepared_dataset_of_several_classes_gives_them_and_its_ignore_label(folders, unlabeled):
    label = two(2)
    label[0] = unlabeled
    dataset(folders / "set", {"a": label, "b": label}, {"artery": 3, "vein": 7}, unlabeled)
    prediction = two(2)
    prediction[0] = 7
    for case in "ab":
        write(folders / "new" / f"{case}.tif", prediction)
    status, rows = evaluate(folders, truth="set")
    row = rows["a", "prediction"]
    assert status == 0 and row["dice/artery"] == row["dice/vein"] == row["dice/mean"] == "1.0"
    status, rows = evaluate(folders, "--classes", "x=artery+vein", "y=3", truth="set")
    assert status == 0 and rows["a", "prediction"]["dice/x"] == "1.0"


def test_the_regions_of_a_prepared_dataset_are_scored_if_it_has_some(folders):
    regions = {"vessel": (7, 3), "artery": (3,)}
    classes = {"artery": 3, "vein": 7}
    dataset(folders / "set", {"a": two(2), "b": two(2)}, classes, regions=regions)
    _, rows = evaluate(folders, "--scores", "dice", pred=("old",), truth="set")
    row = rows["a", "prediction"]
    assert list(row)[3:6] == ["dice/vessel", "dice/artery", "dice/mean"]
    assert float(row["dice/vessel"]) == pytest.approx(2 * 5 / 12, abs=1e-6)


def test_a_class_of_a_prepared_truth_that_no_region_has_counts_as_background(folders, capsys):
    label = np.maximum(two(2), bar(7, 1, value=9))
    dataset(folders / "set", dict.fromkeys("ab", label), {"artery": 3, "vein": 7, "nerve": 9})
    named = ("--classes", "v=vein", "a=artery", "--scores", "precision", "recall")
    status, rows = evaluate(folders, *named, pred=("old",), truth="set")
    row = rows["a", "prediction"]
    assert status == 0 and (row["precision/a"], row["recall/a"]) == ("0.75", "0.75")
    assert (row["precision/v"], row["recall/v"]) == ("1.0", "1.0")
    noted = capsys.readouterr().out
    assert "note: truth: 9 is of no class that is scored and counts as background: a, b" in noted
    write(folders / "old" / "a.tif", np.maximum(label, bar(4, 2, value=5)))
    assert evaluate(folders, *named, pred=("old",), truth="set")[0] == 2  # 5 is no class at all
    assert "old/a.tif: expected 0 and the classes v 7, a 3, got 5; " in capsys.readouterr().err
    write(folders / "old" / "a.tif", label)
    assert evaluate(folders, *named, pred=("old",), truth="set")[0] == 0
    noted = capsys.readouterr().out
    assert "note: predictions: 9 is of no class that is scored and counts as background: a" in noted
    assert evaluate(folders, "--classes", "artery=3", "vein=8", truth="set")[0] == 2  # a slip
    assert "--classes vein=8: expected a class by its name or number" in capsys.readouterr().err


def test_the_one_class_of_a_prepared_truth_is_the_foreground_whatever_its_id(folders):
    dataset(folders / "set", {"a": bar(2, value=3), "b": bar(2, value=3)}, {"artery": 3})
    for case in "ab":
        write(folders / "mask" / f"{case}.tif", bar(3))
    status, rows = evaluate(folders, "--scores", "dice", pred=("mask",), truth="set")
    assert status == 0 and rows["a", "prediction"]["dice"] == "0.75"


def test_foreground_merges_classes_by_name_or_number(folders):
    dataset(folders / "set", {"a": two(2), "b": two(2)}, {"artery": 3, "vein": 7})
    for case in "ab":
        write(folders / "merged" / f"{case}.tif", np.minimum(two(2), 1))
    for chosen in (("artery", "vein"), (3, "vein"), (3, 7)):
        options = ("--foreground", *chosen, "--scores", "dice")
        status, rows = evaluate(folders, *options, pred=("merged",), truth="set")
        assert status == 0 and rows["a", "prediction"]["dice"] == "1.0"
    _, rows = evaluate(folders, "--foreground", "artery", pred=("merged",), truth="set")
    assert float(rows["a", "prediction"]["dice"]) == pytest.approx(0.8)  # 4 of 6 are arteries


def test_a_class_of_20_voxels_beside_a_large_one_counts_as_much_in_the_mean(tmp_path):
    truth = np.zeros((8, 20, 30), np.uint8)
    truth[:, :, 10:] = 3
    truth[2, 3:7, 1:6] = 7  # 20 voxels
    prediction = truth.copy()
    prediction[2, 3:7, 1:4] = 0  # of which 8 are found
    for name, volume in (("truth", truth), ("new", prediction)):
        write(tmp_path / name / "a.tif", volume)
    _, rows = evaluate(tmp_path, *CLASSES)
    row = rows["a", "prediction"]
    assert float(row["dice/vein"]) == pytest.approx(16 / 28, abs=1e-6)
    assert float(row["dice/mean"]) == pytest.approx((1 + 16 / 28) / 2, abs=1e-6)


def test_overlays_of_classes_have_a_legend_and_truth_beside_prediction(folders, drawn):
    pictures = folders / "pictures"
    assert (
        evaluate(folders, *CLASSES, "--tolerance", 0, "--overlays", pictures, pred=("old",))[0] == 0
    )
    assert [path.name for path in pictures.iterdir()] == ["prediction.png"]
    (figure,) = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["artery", "vein"]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    # The worst case first: in b the vein of 2 voxels is missed, in a both ends of the artery.
    assert titles[:2] == ["z 1, truth\nmissed: 2 vein", "z 1, prediction\nfalse: nothing"]
    assert "z 1, truth\nmissed: 1 artery" in titles and "z 1, prediction\nfalse: 1 artery" in titles
    (label,) = {axis.get_ylabel() for axis in figure.axes if axis.get_ylabel().startswith("b\n")}
    assert label == "b\nsurface dice/mean 0.500\nvein 0.000\nartery 1.000"


def test_class_names_of_odd_characters_are_drawn_and_printed(folders, capsys, drawn):
    options = ("--classes", "a$x^$ /b=3", "_[red]=7", "--overlays", folders / "pictures")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, rows = evaluate(folders, *options, "--scores", "dice")
    assert status == 0 and rows["a", "prediction"]["dice/a$x^$ /b"] == "1.0"
    printed = capsys.readouterr().out
    assert "a$x^$ /b" in printed and "_[red]" in printed
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["a$x^$ /b", "_[red]"]


# ---------------------------------------------------------------------------- notes and faults


def test_classes_that_are_absent_are_noted_with_their_cases(folders, capsys):
    write(folders / "truth" / "b.tif", two(2, vein=0))
    assert evaluate(folders, *CLASSES, "organ=9", "vessel=3+7", pred=("old",))[0] == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: no")]
    counted = "ratios are 1 there if the prediction has none either, else 0"
    assert notes == [
        f"note: no vein in the truth of b: {counted}",
        f"note: no organ in the truth of all cases: {counted}",
    ]
    assert evaluate(folders, "--classes", "artery=3", "vein=7", pred=("new",))[0] == 0
    assert "in any prediction" not in capsys.readouterr().out


def test_predictions_of_merged_classes_are_noted(folders, capsys):
    dataset(folders / "set", {"a": two(2, 1, 2), "b": two(2, 1, 2)}, {"artery": 1, "vein": 2})
    for case in "ab":
        write(folders / "merged" / f"{case}.tif", np.minimum(two(2), 1))
    assert evaluate(folders, pred=("merged",), truth="set")[0] == 0
    said = "note: no vein in any prediction{}; if one value stands for several classes, name them"
    assert said.format("") in capsys.readouterr().out
    assert evaluate(folders, *CLASSES, "organ=1", pred=("merged", "new"))[0] == 0
    noted = capsys.readouterr().out
    assert "note: no artery and no vein in any prediction of merged; if one" in noted
    assert "prediction of new" not in noted


@pytest.mark.parametrize("role, name", [("new", "prediction"), ("truth", "truth")])
def test_a_value_that_is_no_class_is_a_fault_that_names_file_and_classes(
    folders, capsys, role, name
):
    write(folders / role / "b.tif", two(2, vein=5))
    status, rows = evaluate(folders, *CLASSES)
    errors = capsys.readouterr().err
    assert (status, rows) == (2, None)
    assert (
        f"{folders / role / 'b.tif'}: expected 0 and the classes artery 3, vein 7, got 5; "
        in errors
    )
    assert ("--ignore-label" in errors) == (role == "truth")
    assert "--classes" in errors and errors.count("\n") == 2


def test_masks_of_0_and_255_are_not_scored_as_classes(folders, capsys):
    write(folders / "white" / "a.tif", bar(2, value=255))
    assert evaluate(folders, *CLASSES, "--cases", "a", pred=("white",)) == (2, None)
    errors = capsys.readouterr().err
    assert "expected 0 and the classes artery 3, vein 7, got 255; " in errors
    assert "--foreground" in errors


def test_a_truth_of_several_classes_without_options_points_to_classes(folders, capsys):
    assert evaluate(folders) == (2, None)
    errors = capsys.readouterr().err
    assert (
        "truth/a.tif: expected the values 0, 1, got 0, 3, 7; give a mask of one class, or" in errors
    )
    assert "--classes NAME=ID" in errors


@pytest.mark.parametrize(
    "options, message",
    [
        (("--classes", "artery=x"), "--classes artery=x: expected the number of a class, got 'x'"),
        (("--classes", "artery"), "--classes: expected NAME=ID, or NAME=ID+ID of a region"),
        (("--classes", "mean=3"), "classes: expected names other than 'mean'"),
        (("--foreground", "vein"), "--foreground: expected the number of a class, got 'vein'"),
        ((*CLASSES, "--ignore-label", 7), "expected ids that are not 7, of unlabeled voxels"),
        ((*CLASSES, "--scores", "dice/vien"), "got dice/vien; the nearest is dice/vein"),
        ((*CLASSES, "--rank", "dice/vien"), "got dice/vien; the nearest is dice/vein"),
        (("--scores", "dice/vein"), "expected dice without a class, as no classes are given"),
    ],
)
def test_options_on_classes_that_cannot_be_are_one_sentence(folders, capsys, options, message):
    assert evaluate(folders, *options) == (2, None)
    errors = capsys.readouterr().err.splitlines()
    assert message in errors[0] and errors[1:] == ["1 error; nothing was written"]


def test_otsu_of_several_classes_is_refused(folders, capsys):
    assert evaluate(folders, *CLASSES, "--otsu", folders / "truth") == (2, None)
    refused = "--otsu: expected one foreground, got the classes artery, vein; name those that count"
    assert capsys.readouterr().err.startswith(refused)
    write(folders / "image" / "a.tif", two(2))
    write(folders / "image" / "b.tif", two(2))
    options = ("--foreground", 3, 7, "--otsu", folders / "image", "--scores", "dice")
    for case in "ab":
        write(folders / "new" / f"{case}.tif", np.minimum(two(2), 1))
    status, rows = evaluate(folders, *options)
    assert status == 0 and rows["a", "prediction"]["dice"] == "1.0"


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_a_value_is_background_where_it_is_declared_and_a_fault_where_it_is_not(
    folders, capsys, kind
):
    """One rule: --classes declares for a folder what a dataset declares itself."""
    for case in "ab":
        write(folders / "merged" / f"{case}.tif", np.minimum(two(2), 1))
    declared, truth = CLASSES, "truth"
    if kind == "dataset":
        dataset(folders / "set", {"a": two(2), "b": two(2)}, {"artery": 3, "vein": 7})
        declared, truth = (), "set"
    for chosen in (("artery",), (3,)):
        options = (*declared, "--foreground", *chosen, "--scores", "dice")
        status, rows = evaluate(folders, *options, pred=("merged",), truth=truth)
        assert status == 0
        assert float(rows["a", "prediction"]["dice"]) == pytest.approx(0.8)  # 4 of 6 are arteries
        noted = capsys.readouterr().out
        assert "note: truth: 7 is of no class that is scored and counts as background: a" in noted
    if kind == "folder":
        for value in (1, 255):  # which would pass for a mask
            write(folders / "truth" / "a.tif", two(2, vein=value))
            assert evaluate(folders, *options, pred=("merged",))[0] == 2
            expected = f"truth/a.tif: expected the values 0, 3, 7, got {value}; name every class"
            assert expected in capsys.readouterr().err
    options = (*declared, "--foreground", 5)
    assert evaluate(folders, *options, pred=("merged",), truth=truth)[0] == 2
    assert "--foreground: expected a class by its name or number, artery 3, vein 7, got '5'" in (
        capsys.readouterr().err
    )


def test_a_value_beside_an_undeclared_foreground_is_background_and_noted(folders, capsys):
    for case in "ab":
        write(folders / "merged" / f"{case}.tif", np.minimum(two(2), 1))
    options = ("--foreground", 3, "--scores", "dice")
    status, rows = evaluate(folders, *options, pred=("merged",))
    assert status == 0 and float(rows["a", "prediction"]["dice"]) == pytest.approx(0.8)
    assert "truth: 7 is of no class that is scored" in capsys.readouterr().out
    assert evaluate(folders, *options, "--ignore-label", 3, pred=("merged",))[0] == 2
    assert "--foreground: expected classes, got 3 (ignored)" in capsys.readouterr().err


def test_unlabeled_voxels_of_value_1_are_a_fault_where_1_is_foreground(folders, capsys):
    label = two(2)
    label[0] = 1
    dataset(folders / "set", {"a": label, "b": label}, {"vein": 7, "artery": 3}, 1)
    assert evaluate(folders, "--foreground", "vein", truth="set") == (2, None)
    assert "expected another value than 1 of unlabeled voxels" in capsys.readouterr().err


def test_a_list_of_scores_says_that_a_class_may_follow(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--pred", "x", "--truth", "x", "--list-scores")
    assert "dice/artery" in capsys.readouterr().out
