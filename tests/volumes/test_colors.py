"""Masks over a slice: each in its color, errors solid, unlabeled voxels darker."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from volumes import colors

FLAT = np.zeros((4, 6))  # drawn as black
ALL = np.ones((4, 6), bool)


def columns(*chosen):
    """(4, 6) bool: True in these columns."""
    mask = np.zeros((4, 6), bool)
    mask[:, list(chosen)] = True
    return mask


def test_found_missed_and_false_voxels_have_their_colors_and_unlabeled_ones_none():
    labeled = ALL.copy()
    labeled[0] = False
    shown = colors.overlay(FLAT, columns(0, 1), columns(1, 2), labeled)
    for x, color in ((0, colors.MISSED), (1, colors.FOUND), (2, colors.FALSE)):
        assert shown[2, x] == pytest.approx(0.65 * np.array(to_rgb(color)))
        assert tuple(shown[0, x]) == (0, 0, 0)
    assert tuple(shown[2, 3]) == (0, 0, 0)


@pytest.mark.parametrize("several", [False, True])
def test_unlabeled_voxels_are_half_as_bright(several):
    image, nothing = np.arange(24.0).reshape(4, 6), np.zeros((4, 6), bool)
    draw = colors.overlay_classes if several else colors.overlay
    masks = np.stack([nothing] * 2) if several else nothing
    shown = draw(image, masks, masks, columns(3, 4, 5))
    bright = draw(image, masks, masks, ALL)
    assert shown[:, :3] == pytest.approx(bright[:, :3] / 2)
    assert shown[:, 3:] == pytest.approx(bright[:, 3:])


def test_a_class_is_pale_where_it_is_right_and_solid_where_it_is_not():
    truth = np.stack([columns(0, 1), columns(3)])
    prediction = np.stack([columns(1, 2), columns(3)])
    first, second = (np.array(colors.class_color(number)) for number in (0, 1))
    shown = colors.overlay_classes(FLAT, truth, prediction, ALL)[0]
    assert shown[0] == pytest.approx(colors.WRONG * first)
    assert shown[1] == pytest.approx(colors.RIGHT * first)
    assert tuple(shown[2]) == (0, 0, 0)
    assert shown[3] == pytest.approx(colors.RIGHT * second)
    shown = colors.overlay_classes(FLAT, prediction, truth, ALL)[0]
    assert tuple(shown[0]) == (0, 0, 0)
    assert shown[2] == pytest.approx(colors.WRONG * first)


def test_of_overlapping_regions_the_later_is_seen_and_an_error_in_either_is_solid():
    truth = np.stack([columns(0, 1, 2), columns(1, 2)])  # vessel, and the artery in it
    prediction = np.stack([columns(0, 1, 2), columns(2)])
    vessel, artery = (np.array(colors.class_color(number)) for number in (0, 1))
    shown = colors.overlay_classes(FLAT, truth, prediction, ALL)[0]
    assert shown[0] == pytest.approx(colors.RIGHT * vessel)
    assert shown[1] == pytest.approx(colors.WRONG * artery)
    assert shown[2] == pytest.approx(colors.RIGHT * artery)
    assert colors.overlay_classes(FLAT, prediction, truth, ALL)[0, 1] == pytest.approx(
        colors.WRONG * vessel
    )


def test_24_classes_have_colors_that_differ_and_the_first_8_for_color_blind_eyes_too():
    every = np.array([colors.class_color(number) for number in range(24)])
    assert every.min() >= 0 and every.max() <= 1
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(every, 2)) > 0.1
    assert colors.class_color(24) == colors.class_color(0)
    # Machado 2009: what eyes without red or green cones see, in linear light.
    sights = {
        "protanopia": [(0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)],
        "deuteranopia": [(0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)],
    }
    for matrix in sights.values():
        seen = np.clip(every[:8] ** 2.2 @ np.transpose(matrix), 0, 1) ** (1 / 2.2)
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.1
