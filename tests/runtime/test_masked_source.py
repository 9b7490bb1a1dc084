import numpy as np
import pytest
from scipy import ndimage

from runtime.masked_source import MARGIN, MaskedSource, in_cubes
from runtime.sliding_window import predict_volume
from runtime.window_axis import window_spans


def test_cubes_of_zeros_are_an_opening():
    zero = np.random.default_rng(0).random((20, 22, 24)) < 0.97
    zero[5:12, 3:9, 4:20] = True
    wide = np.pad(zero, MARGIN, constant_values=True)
    expected = ndimage.binary_opening(wide, np.ones((4, 4, 4)))[(slice(MARGIN, -MARGIN),) * 3]
    np.testing.assert_array_equal(in_cubes(wide), expected)
    assert 0.05 < expected.mean() < 0.9 and (expected <= zero).all()


def source_of(image, mask=None, spans=()):
    return MaskedSource(image, mask, spans)


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


@pytest.mark.parametrize("window, ratio", [((8, 8, 8), 1), ((8, 8, 8), 5), ((3, 8, 8), 1)])
@pytest.mark.parametrize("edge", [23, 25, 26, 40])
def test_windows_that_are_skipped_change_no_voxel_that_is_not_masked(window, ratio, edge):
    image = np.random.default_rng(0).integers(1, 9, (1, 64, 16, 12)).astype(np.float32)
    image[:, edge:] = image[:, edge - 9 : edge - 7] = 0  # a wall of 2 planes too
    spans = window_spans(image.shape[1:], window, 0.5, (ratio, 1, 1), "cpu")
    source, skipped = source_of(image, spans=spans[0]), []

    def skip(spans):
        skipped.append(source.skip(spans))
        return skipped[-1]

    def network(x):  # not 0 in air
        return x.mean((2, 3, 4), keepdim=True) - 2 + 0.1 * x

    how = {"window": window, "overlap": 0.5, "ratio": (ratio, 1, 1)}
    probs = predict_volume(network, source, **how, skip=skip)[0]
    masked = source.masked(tuple(map(slice, (0, 0, 0), image.shape[1:])))
    assert masked[edge:].all() and not masked[:edge].any()
    whole = predict_volume(network, image, **how)[0]
    np.testing.assert_array_equal(probs[~masked], whole[~masked])
    assert any(skipped) == (window[0] > 3 and (ratio == 1 or edge <= 24))
