"""Corners of masks drawn by hand: their codes, areas and boxes."""

import math

import numpy as np
import pytest

from scoring import surface


def voxel(*place, shape=(5, 5, 9)):
    mask = np.zeros(shape, bool)
    mask[place] = True
    return mask


def test_codes_hold_the_lowest_indices_in_the_highest_bit():
    codes = surface.extract(voxel(2, 2, 2)).codes  # of corners 2 and 3 along each axis
    assert codes[2:4, 2:4, 2:4].reshape(-1).tolist() == [1, 2, 4, 8, 16, 32, 64, 128]


def test_area_of_one_voxel():
    # One corner of a cube cut off at its edges' middles: a triangle, sqrt(3) / 8, on each corner.
    counts = surface.extract(voxel(2, 2, 2)).histogram
    assert counts.sum() == 8
    assert counts @ surface.surfel_areas((1.0, 1.0, 1.0)) == pytest.approx(math.sqrt(3))


def test_area_of_a_plate_grows_with_its_sides():
    plate = np.zeros((3, 40, 50), bool)
    plate[1] = True
    counts = surface.extract(plate).histogram
    areas = surface.surfel_areas((1.0, 2.0, 3.0))
    # The inner corners carry a whole voxel's face each, on both sides.
    assert counts @ areas == pytest.approx(2 * 39 * 49 * 2 * 3, rel=0.1)
    assert counts[0b00001111] == counts[0b11110000] == 39 * 49


def test_bits_are_1_where_codes_are_mixed_the_lowest_x_first():
    found = surface.extract(np.random.default_rng(0).random((3, 4, 130)) < 0.1)
    bits = np.unpackbits(found.bits.view(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(bits[..., :131], surface.is_mixed(found.codes))
    assert not bits[..., 131:].any()
    assert surface.is_mixed(np.arange(256, dtype=np.uint8)).tolist() == [0] + [1] * 254 + [0]


def test_all_foreground_has_the_border_of_the_volume_as_surface():
    found = surface.extract(np.ones((9, 8, 8), bool))
    inner = found.codes[1:-1, 1:-1, 1:-1]
    assert (inner == 255).all()
    assert found.histogram.sum() == found.codes.size - inner.size


def test_a_surface_in_slabs_is_that_of_the_whole(monkeypatch):
    mask = np.random.default_rng(5).random((9, 7, 8)) < 0.5
    whole = surface.extract(mask)
    monkeypatch.setattr(surface, "_SLAB", 150)  # two planes of corners at a time
    for slabs, one in zip(surface.extract(mask), whole, strict=True):
        np.testing.assert_array_equal(slabs, one)


@pytest.mark.parametrize("shape", [(0, 0, 0), (0, 3, 3), (3, 3, 3)])
def test_an_empty_mask_has_no_surface(shape):
    found = surface.extract(np.zeros(shape, bool))
    assert found.codes.shape == tuple(n + 1 for n in shape)
    assert not found.histogram.any() and not found.bits.any()


def test_the_box_holds_every_voxel_and_no_empty_slice():
    mask = voxel(1, 2, 3) | voxel(3, 2, 7)
    assert surface.bounding_box(mask) == (slice(1, 4), slice(2, 3), slice(3, 8))
    assert mask[surface.bounding_box(np.zeros_like(mask))].size == 0
