"""Intensity statistics: those of numpy for an ordinary image, and of the image alone for others."""

import numpy as np
import pytest

from volumes import statistics
from volumes.statistics import intensity_statistics


def image_of(dtype=np.int16, shape=(24, 40, 48)):
    """A wavy sheet of 180 in 100, with a texture of 10 about both."""
    z, y, x = np.indices(shape)
    sheet = np.abs(y - 20 - 3 * np.sin(x / 5)) < 2
    return (100 + 80 * sheet + 10 * np.sin(x * 1.7 + y * 2.3 + z * 3.1)).astype(dtype)


def usual(image):
    about = intensity_statistics(image[None])
    return about.get("typical", about)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_an_ordinary_image_has_the_statistics_of_numpy_and_no_others(dtype):
    image = image_of(dtype)
    image[:4] = 0  # these are outside
    about, values = intensity_statistics(image[None]), image[4:].reshape(-1)
    assert "typical" not in about and about["dtype"] == image.dtype.str
    assert about["mean"] == [float(values.mean(dtype=np.float64))]
    assert about["std"] == [float(values.std(dtype=np.float64))]
    cuts = np.percentile(values, statistics.PERCENTILES)
    assert [cut for (cut,) in about["percentiles"].values()] == cuts.tolist()
    assert about["range"] == [[float(values.min()), float(values.max())]]
    assert statistics.describe_fill(about) == ""


FILLED = [
    (np.float32, -3.4e38, 0.0),  # one voxel
    (np.float32, 3.4e38, 0.4),
    (np.float64, -1.797e308, 0.3),
    (np.int16, -1e4, 0.3),
    (np.int16, -32768, 0.005),
    (np.uint16, 65535, 0.8),
    (np.int64, -(2**63), 0.1),
    (np.uint64, 2**64 - 2**11, 0.1),
    (np.float16, -65504, 0.3),
]


@pytest.mark.parametrize("dtype, value, share", FILLED)
def test_a_fill_value_counts_in_no_statistics(dtype, value, share):
    image = image_of(dtype)
    filled = np.random.default_rng(0).random(image.shape) < share
    filled[0, 0, 0] = True
    rest = image[~filled]
    image[filled] = value
    about = intensity_statistics(image[None])
    assert about["typical"]["mean"] == [float(rest.mean(dtype=np.float64))]
    assert about["typical"]["std"] == [float(rest.std(dtype=np.float64))]
    assert about["typical"]["range"] == [[float(rest.min()), float(rest.max())]]
    low, high = (about["typical"]["percentiles"][p][0] for p in ("0.5", "99.5"))
    assert (low, high) == pytest.approx(np.percentile(rest.astype(float), (0.5, 99.5)), abs=0.5)
    assert f"up to {float(image[0, 0, 0]):g} lie far" in statistics.describe_fill(about)


@pytest.mark.parametrize("share", [0.005, 0.01, 0.05, 0.5, 0.95, 0.99])
def test_a_fill_value_of_as_many_voxels_as_a_percentile_counts_in_no_statistics(share):
    image = image_of(np.float32).reshape(-1)[:40_000]
    rest = image[round(share * image.size) :].copy()
    image[: round(share * image.size)] = -1e4
    assert usual(image[None, None])["std"] == [float(rest.std(dtype=np.float64))]


def test_fill_values_at_both_ends_and_scattered_rubbish_count_in_no_statistics():
    image, rng = image_of(np.float32), np.random.default_rng(1)
    kinds = rng.choice(4, image.shape, p=(0.6, 0.3, 0.097, 0.003))
    rest = image[kinds == 0]
    image[kinds == 1], image[kinds == 2] = -9999, 65535
    image[kinds == 3] = rng.uniform(-1e30, 1e30, (kinds == 3).sum())
    about = usual(image)
    assert about["std"] == [pytest.approx(float(rest.std(dtype=np.float64)), rel=0.02)]
    assert about["range"] == [[float(rest.min()), float(rest.max())]]


@pytest.mark.parametrize("power", [-120, -40, 30, 80])
def test_the_scale_of_an_image_scales_its_statistics_and_nothing_else(power):
    image, factor = image_of(np.float32), 2.0**power
    image[:, :3], image[0, 0, 0] = -1e4, 1e9
    plain, scaled = usual(image), usual(image * np.float32(factor))
    for key in ("mean", "std"):
        assert scaled[key] == [plain[key][0] * factor]
    for cut in plain["percentiles"]:
        assert scaled["percentiles"][cut] == [plain["percentiles"][cut][0] * factor]


def test_percentiles_of_integers_do_not_wrap():
    values = np.array([-32768] * 5 + [100] * 995, np.int16)
    (low,) = intensity_statistics(values[None, None, None])["percentiles"]["0.5"]
    assert low == pytest.approx(100 - 32868 * 0.005, abs=1)  # between rank 4 and 5, at 4.995


def test_the_classes_of_an_image_of_few_values_are_no_fill_values():
    image = np.full((10, 10, 10), 50, np.uint8)
    image[2:4], image[6:9] = 100, 255
    assert "typical" not in intensity_statistics(image[None])


def test_a_mask_as_an_image_counts_its_zeros_and_is_clipped_to_its_range():
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[0, 0, :3] = 255
    about = usual(mask)
    assert about["mean"] == [0.765] and about["std"] == [
        pytest.approx(255 * (0.003 * 0.997) ** 0.5)
    ]
    assert about["percentiles"]["0.5"] == [0] and about["percentiles"]["95.0"] == [255]
    assert statistics.blank_channels(intensity_statistics(mask[None])) == {}


def test_blank_channels_are_named_by_their_value():
    image = np.stack([image_of(), np.zeros_like(image_of()), np.full_like(image_of(), 7)])
    assert statistics.blank_channels(intensity_statistics(image)) == {1: 0.0, 2: 7.0}


BEYOND = [
    (np.float64, 1e300, 0, "can hold"),
    (np.float64, 1e-300, 0, "can hold"),
    (np.int64, 1, 10**15, "can tell apart"),
    (np.uint32, 1, 10**9, "can tell apart"),
]


@pytest.mark.parametrize("dtype, factor, offset, what", BEYOND)
def test_values_that_float32_cannot_hold_or_tell_apart_are_named(dtype, factor, offset, what):
    image = image_of(np.int64).astype(dtype) * dtype(factor) + dtype(offset)
    (fault,) = statistics.faults_of_contrast(intensity_statistics(image[None]))
    assert what in fault


@pytest.mark.parametrize(
    "dtype, factor", [(np.float32, 1e-36), (np.float32, 1e36), (np.int32, 9999)]
)
def test_values_that_float32_holds_are_no_fault(dtype, factor):
    image = image_of(np.float64) * factor
    assert not list(statistics.faults_of_contrast(intensity_statistics(image.astype(dtype)[None])))


def test_fill_values_of_a_picture_become_the_nearest_others():
    image = image_of()
    expected = image.copy()
    image[:8], image[0, 0, 0] = -9999, 30000
    expected[:8], expected[0, 0, 0] = image[8:].min(), image[8:].max()
    assert (statistics.clip_fill(image) == expected).all()
    about = intensity_statistics(image[None])
    assert (statistics.clip_fill(image[2], about) == expected[2]).all()
    plain = image_of()
    assert statistics.clip_fill(plain) is plain
