"""Which slices are the worst, and the picture of them."""

import numpy as np
import pytest
from PIL import Image

from scoring import report

SPACING = (1.0, 1.0, 1.0)


def sheets(depth=20):
    """A sheet along y in every slice: (truth, prediction) that are the same."""
    truth = np.zeros((depth, 8, 12), np.uint8)
    truth[:, :, 5] = 1
    return truth, truth.copy()


def worst(prediction, truth, **changes):
    how = {"tolerance": 2.0, "ignore_label": 2} | changes
    spacing = how.pop("spacing", SPACING)
    return report.worst_slices(prediction, truth, None, spacing, **how)


def test_a_sheet_that_lies_aside_within_the_tolerance_is_not_far_wrong():
    truth, prediction = sheets()
    prediction[3] = np.roll(truth[3], 2, axis=1)  # 2 aside, which is tolerated
    prediction[9, :4, 9] = 1  # 4 false voxels that are 4 aside
    found = worst(prediction, truth)
    assert (found[0].z, found[0].missed, found[0].false) == (9, 0, 4)
    assert (found[1].z, found[1].missed, found[1].false) == (3, 0, 0)  # wrong, but near
    nearer = worst(prediction, truth, tolerance=1.0)
    assert {(s.z, s.missed, s.false) for s in nearer[:2]} == {(9, 0, 4), (3, 0, 8)}
    assert {(s.z, s.false) for s in worst(prediction, truth, tolerance=0)[:2]} == {(9, 4), (3, 8)}


def test_a_tolerance_is_in_the_unit_of_the_spacing():
    truth, prediction = sheets(5)
    prediction[1:4] = 0  # a gap of 3 slices: its middle is 2 slices from what is found
    assert worst(prediction, truth, tolerance=2.0)[0].missed == 0
    found = worst(prediction, truth, tolerance=2.0, spacing=(3.0, 1.0, 1.0))
    assert sorted((s.z, s.missed) for s in found if s.missed)[0][1] == 8


def test_unlabeled_voxels_are_never_wrong():
    truth, prediction = sheets()
    truth[9, :, 8:] = 2
    prediction[9, :, 11] = 1
    found = worst(prediction, truth)
    assert all(s.missed == s.false == 0 for s in found)
    assert not worst(prediction, truth)[0].labeled.all() or found[0].z != 9


def test_neighbours_of_a_chosen_slice_are_passed_over():
    truth, prediction = sheets(40)
    prediction[10:14, :, 11] = 1
    prediction[30, :2, 11] = 1
    zs = [s.z for s in worst(prediction, truth)]
    assert zs == [10, 13, 30]  # 11 and 12 are within two slices of 10


def test_an_empty_prediction_misses_everything():
    truth, prediction = sheets()
    assert worst(prediction * 0, truth)[0].missed == 8
    assert worst(prediction, truth * 0)[0].false == 8
    assert worst(prediction * 0, truth * 0)[0].missed == 0


def test_missed_false_and_found_have_their_colors(tmp_path):
    truth, prediction = sheets()
    truth[:, 0:3, 1] = 1
    prediction[:, 5:8, 9] = 1
    slices = worst(prediction, truth)
    figure = report.draw_slices([("a", "dice 0.5", slices)], title="m", tolerance="2 mm")
    figure.savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        pixels = np.asarray(opened.convert("RGB"), float)
    from matplotlib.colors import to_rgb

    for color in (report.FOUND, report.MISSED, report.FALSE):
        drawn = 255 * 0.65 * np.asarray(to_rgb(color))  # on black
        near = np.abs(pixels - drawn).max(axis=-1) < 3
        assert near.sum() > 50, color


def test_slices_lie_on_the_image():
    truth, prediction = sheets()
    image = np.arange(truth.size).reshape(truth.shape)
    found = report.worst_slices(prediction, truth, image, SPACING, tolerance=2.0, ignore_label=None)
    assert found[0].image == pytest.approx(image[found[0].z])
