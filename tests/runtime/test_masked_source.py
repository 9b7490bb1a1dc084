import numpy as np
import pytest
from scipy import ndimage

from runtime.masked_source import MARGIN, MaskedSource, in_cubes


def test_cubes_of_zeros_are_an_opening():
    zero = np.random.default_rng(0).random((20, 22, 24)) < 0.97
    zero[5:12, 3:9, 4:20] = True
    wide = np.pad(zero, MARGIN, constant_values=True)
    expected = ndimage.binary_opening(wide, np.ones((4, 4, 4)))[(slice(MARGIN, -MARGIN),) * 3]
    np.testing.assert_array_equal(in_cubes(wide), expected)
    assert 0.05 < expected.mean() < 0.9 and (expected <= zero).all()


def source_of(image, mask=None):
    return MaskedSource(image, mask, [])


def boxes(shape, step):
    for corner in np.ndindex(*(-(-n // step) for n in shape)):
        places = zip(corner, shape, strict=True)
        yield tuple(slice(i * step, min((i + 1) * step, n)) for i, n in places)


@pytest.mark.parametrize("step", [1, 4, 7, 30])
def test_what_is_masked_does_not_depend_on_the_box(step):
    image = np.random.default_rng(0).integers(0, 2, (2, 14, 15, 16)).astype(np.uint8)
    image[:, 3:9, 2:11, 8:] = 0
    mask = np.ones((1, 14, 15, 16), np.uint8)
    mask[0, 12:, :, :3] = 0
    source, masked = source_of(image, mask), np.zeros((14, 15, 16), bool)
    for box in boxes(masked.shape, step):
        own = source.masked(box)
        masked[box] = False if own is None else own
    expected = np.zeros_like(masked)
    expected[3:9, 2:11, 8:] = expected[12:, :, :3] = True
    assert (masked >= expected).all()
    few = masked & ~expected
    assert (image[:, few] == 0).all()  # of noise that happens to be 0 beside what is cut out
    np.testing.assert_array_equal(masked, source.masked((slice(0, 14), slice(0, 15), slice(0, 16))))


def test_single_zeros_and_thin_walls_of_zeros_are_values():
    image = np.ones((1, 12, 12, 12), np.uint8)
    image[0, 5, 5, 5] = image[0, 1:4, 1:9, 1:9] = 0  # a wall of 3 voxels
    assert source_of(image).masked((slice(0, 12),) * 3) is None


def test_beyond_the_border_all_is_air():
    image = np.ones((1, 12, 12, 12), np.uint8)
    image[0, :, :, :2] = 0  # 2 voxels, and what lies outside
    masked = source_of(image).masked((slice(0, 12),) * 3)
    np.testing.assert_array_equal(masked, image[0] == 0)
