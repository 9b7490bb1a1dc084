"""The data sheet: what a page says and shows of each case, and how many pages there are."""

import re

import h5py
import numpy as np
import pytest
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import prepare
from volumes import data_sheet
from volumes.casefile import read_dataset
from volumes.colors import LABEL, class_color
from volumes.files import write_volume

SHAPE = (4, 12, 16)  # z, y, x


def dataset(folder, count=1, classes=("artery=1", "vein=5"), *, unlabeled=False, sheet=False):
    """A prepared folder: class 1 is x 4 to 7 of all slices, class 5 x 8 to 9 (16 of 16 are x)."""
    for index in range(count):
        label = np.zeros(SHAPE, np.uint8)
        label[:, 2:10, 4:8], label[:, 2:10, 8:10], label[2:, :, 14:] = 1, 5, 9
        if len(classes) == 1:
            label[label == 5] = 0
        image = (np.random.default_rng(index).normal(100, 10, SHAPE) + 50 * (label == 1)).round()
        write_volume(folder / "i" / f"case{index}$.nii", image.astype(np.int16), unit="mm",
                     spacing=(3.0, 1.0, 0.5))  # fmt: skip
        write_volume(folder / "l" / f"case{index}$.nii", label, unit="mm", spacing=(3.0, 1.0, 0.5))
    labels = [] if unlabeled else ["--labels", folder / "l", "--ignore-label", 9]
    arguments = ["--images", folder / "i", *labels, "--out", folder / "out", "--workers", 1]
    arguments += ["--classes", *classes, "--no-skeletons", *(["--sheet"] if sheet else [])]
    assert prepare.main([str(word) for word in arguments]) == 0
    return read_dataset(folder / "out")


def drawn(made):
    """(the panel of the first case, its three axes)."""
    names, cases = {i: name for name, i in made.classes.items() if i}, [*made.cases.values()]
    figure = data_sheet._draw(cases, names, "", data_sheet._gray_levels(cases[0]))
    panel = figure.subfigs[1].subfigs[0]
    return panel, panel.axes


def test_prepare_draws_the_sheet_and_says_where(tmp_path, capsys):
    dataset(tmp_path, sheet=True)
    path = tmp_path / "out" / "sheet-1.png"
    assert f"drawn: {path}" in capsys.readouterr().out
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_prepare_draws_the_sheet_of_a_dataset_that_is_there(tmp_path, capsys):
    made = dataset(tmp_path)
    alone = ["--out", made.root, "--sheet"]
    assert prepare.main(alone) == 0
    assert capsys.readouterr().out.endswith(f"drawn: {made.root}/sheet-1.png\n")
    with h5py.File(made.cases["case0$"].path, "a") as file:
        del file["image"]
    assert prepare.main(alone) == 2 and "1 fault" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["--out", str(tmp_path), "--sheet"])
    assert f"expected a dataset made by prepare.py in {tmp_path}" in capsys.readouterr().err


def test_a_case_is_told_by_its_shape_spacing_and_shares(tmp_path):
    panel, _ = drawn(dataset(tmp_path))
    text = "\n".join(t.get_text() for t in panel.texts)
    assert "case0\\$" in text and "4x12x16 voxels of 3 1 0.5 mm" in text
    # 4 x 8 x 4, 4 x 8 x 2 and 2 x 12 x 2 of 768 voxels
    assert "16.7 % artery, 8.33 % vein, 6.25 % unlabeled" in text


def test_slices_show_most_of_the_classes_and_the_middle_without_any(tmp_path):
    made = dataset(tmp_path)
    (case,) = made.cases.values()
    label = np.zeros(SHAPE, np.uint8)
    label[1, 3], label[2, 3:9, 0], label[3, 11, :2] = 1, 1, 5  # 16, 6 of class 1, 2 of class 5
    with h5py.File(case.path, "a") as file:
        for classes, planes in (((1, 5), [3, 11]), ((1,), [1, 3]), ((), [2, 6])):
            file["label"][:] = np.where(np.isin(label, classes), label, 0)
            file.flush()
            assert data_sheet._survey(case, {1: "artery", 5: "vein"})[1] == planes


def test_slices_have_their_true_aspect_and_each_class_is_outlined(tmp_path):
    made = dataset(tmp_path)
    (case,) = made.cases.values()
    _, (z_slice, y_slice, _) = drawn(made)
    image = np.asarray(data_sheet.read_array(case, "image", 0))
    for ax, wanted, aspect in ((z_slice, image[0], 2), (y_slice, image[:, 2], 6)):
        np.testing.assert_array_equal(ax.images[0].get_array(), wanted)
        assert ax.get_aspect() == aspect
        colors = [tuple(c.get_edgecolor()[0][:3]) for c in ax.collections]
        assert colors == [pytest.approx(to_rgb(class_color(i))) for i in range(2)]
    border = z_slice.collections[0].get_paths()[0].vertices  # x, y
    np.testing.assert_allclose([border.min(axis=0), border.max(axis=0)], [[3.5, 1.5], [7.5, 9.5]])
    tint = y_slice.images[1].get_array()[..., 3] > 0
    assert tint[2:, 14:].all() and tint.sum() == 4


def test_the_histogram_of_one_class_has_all_voxels_and_those_of_the_class(tmp_path):
    _, (*_, histogram) = drawn(dataset(tmp_path, classes=("vessel=1",)))
    *bars, line = histogram.patches
    assert {bar.get_width() for bar in bars} == {2.0}  # of whole numbers, all alike
    assert sum(bar.get_height() for bar in bars) == 4 * 12 * 16
    x, height = line.get_xy().T
    assert 110 < x[height >= 1].min() < 150  # the class is brighter by 50
    assert line.get_edgecolor() == to_rgba(LABEL)


def test_a_case_without_a_label_is_drawn_and_says_so(tmp_path):
    panel, axes = drawn(dataset(tmp_path, unlabeled=True))
    assert "no label" in panel.texts[1].get_text()
    assert len(axes[0].collections) == 0 and {*map(type, axes[2].patches)} == {Rectangle}


def test_many_cases_are_on_several_pages(tmp_path, monkeypatch):
    made = dataset(tmp_path, count=3)
    monkeypatch.setattr(data_sheet, "COLUMNS", 1)
    monkeypatch.setattr(data_sheet, "ROWS", 2)
    headings, levels = [], [data_sheet._gray_levels(case) for case in made.cases.values()]
    span = min(low for low, _ in levels), max(high for _, high in levels)  # of all pages

    def note(cases, names, heading, limits):
        headings.append((len(cases), re.search(r"cases .*", heading)[0]))
        assert limits == span
        return Figure()

    monkeypatch.setattr(data_sheet, "_draw", note)
    paths = data_sheet.write_sheet(made, tmp_path)
    assert [path.name for path in paths] == ["sheet-1.png", "sheet-2.png"]
    assert headings == [(2, "cases 1 to 2 of 3"), (1, "cases 3 to 3 of 3")]
