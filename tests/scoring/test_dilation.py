"""Dilation by packed words and by distances, against scipy's distances."""

import numpy as np
import pytest
from scipy import ndimage

from scoring import dilation


@pytest.mark.parametrize("most", [dilation.MOST_ROWS, 0], ids=["packed words", "distances"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.0, 0.4), (0.3, 0.7, 3.0)], ids=str)
def test_every_voxel_within_the_radius_is_reached(spacing, most, monkeypatch):
    monkeypatch.setattr(dilation, "MOST_ROWS", most)
    rng = np.random.default_rng(0)
    for radius in (0.55, 1.15, 3.35):
        mask = rng.random((7, 9, 140)) < 0.005
        expected = ndimage.distance_transform_edt(~mask, sampling=spacing) <= radius
        np.testing.assert_array_equal(dilation.dilate(mask, radius, spacing), expected)
    assert not dilation.dilate(np.zeros((3, 4, 5), bool), 2.0, spacing).any()


def test_a_radius_of_whole_steps_is_reached_whatever_rounding_says():
    assert 3 * 0.2 > 0.6
    mask = np.zeros((9, 3, 3), bool)
    mask[0] = True
    assert dilation.dilate(mask, 0.6, (0.2, 1.0, 1.0))[:, 1, 1].tolist() == [True] * 4 + [False] * 5
