import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from patches import intensity
from settings import Augment

CUBE = (1.0, 1.0, 1.0)
VALUES = {
    "illumination": 0.3,
    "blur": 1.0,
    "low_resolution": 2.0,
    "rician": 0.2,
    "noise": 0.2,
    "gamma": 1.5,
    "contrast": 1.3,
    "brightness": 0.4,
    "dropout": 0.1,
}


def settings(probability, **changes):
    names = dict.fromkeys(intensity.NAMES, probability)
    return {**Augment().model_dump(), **names, **changes}


def choose(*names, seed=7, **values):
    chosen = {name: VALUES[name] for name in names} | values
    return {**chosen, "noise_seed": seed, "dropout_boxes": 4}


def change(image, chosen, spacing=CUBE):
    """One sample (C, D, H, W)."""
    return intensity.change_intensity(image[None], [chosen], [spacing])[0]


def random_patch(shape=(1, 12, 14, 16), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- parameters


def test_probability_zero_chooses_nothing_and_one_chooses_all_as_plain_numbers():
    assert intensity.sample_intensity_params(np.random.default_rng(0), settings=None) == {}
    off = intensity.sample_intensity_params(np.random.default_rng(0), settings=settings(0.0))
    on = intensity.sample_intensity_params(np.random.default_rng(0), settings=settings(1.0))
    assert set(off) == {"noise_seed"}
    assert set(on) == {*intensity.NAMES, "dropout_boxes", "noise_seed"}
    assert json.loads(json.dumps(on)) == on


def test_values_lie_in_their_ranges_and_reach_over_them():
    asked = settings(1.0)
    sampled = [
        intensity.sample_intensity_params(np.random.default_rng(s), settings=asked)
        for s in range(400)
    ]
    for name in intensity.NAMES:
        low, high = asked[f"{name}_range"]
        found = [chosen[name] for chosen in sampled]
        assert low <= min(found) < low + 0.05 * (high - low)
        assert high >= max(found) > high - 0.05 * (high - low)
    assert {chosen["dropout_boxes"] for chosen in sampled} == set(range(1, 9))


def test_each_transform_is_chosen_as_often_as_asked():
    rng, asked = np.random.default_rng(0), settings(0.3)
    sampled = [intensity.sample_intensity_params(rng, settings=asked) for _ in range(2000)]
    for name in intensity.NAMES:
        assert abs(sum(name in chosen for chosen in sampled) / 2000 - 0.3) < 0.04


def test_one_setting_does_not_shift_the_others():
    rngs = [np.random.default_rng(5) for _ in range(3)]
    narrow = settings(1.0, dropout_boxes=(3, 3), gamma_range=(1.0, 1.0))
    asked = settings(1.0), settings(0.0, noise=1.0), narrow
    all_on, only_noise, fixed = (
        intensity.sample_intensity_params(rng, settings=each)
        for rng, each in zip(rngs, asked, strict=True)
    )
    assert only_noise == {key: all_on[key] for key in ("noise", "noise_seed")}
    assert fixed == {**all_on, "gamma": 1.0, "dropout_boxes": 3}
    assert len({rng.random() for rng in rngs}) == 1


def test_an_augmentation_with_a_probability_alone_leaves_what_comes_before_it(monkeypatch):
    asked = settings(1.0)
    before = intensity.sample_intensity_params(np.random.default_rng(5), settings=asked)
    changes = (*intensity.CHANGES, (("invert",), lambda patch, params, spacing: patch.neg_()))
    monkeypatch.setattr(intensity, "CHANGES", changes)
    monkeypatch.setattr(intensity, "NAMES", (*intensity.NAMES, "invert"))
    asked["invert"] = 1.0
    chosen = intensity.sample_intensity_params(np.random.default_rng(5), settings=asked)
    assert chosen["invert"] == 1.0
    assert {name: chosen[name] for name in VALUES} == {name: before[name] for name in VALUES}
    asked["invert"] = 0.0
    off = intensity.sample_intensity_params(np.random.default_rng(5), settings=asked)
    assert off == {name: chosen[name] for name in chosen if name != "invert"}
    image = random_patch()
    assert torch.equal(change(image, {"invert": 1.0, "noise_seed": 7}), -image)


def test_the_numbers_of_a_seed_are_those_of_earlier_versions():
    chosen = intensity.sample_intensity_params(np.random.default_rng(5), settings=settings(1.0))
    expected = {
        "illumination": 0.5655585528155456,
        "blur": 0.6429006900440708,
        "low_resolution": 1.3833688807855182,
        "rician": 0.013582558170733549,
        "noise": 0.2997528345195214,
        "gamma": 0.8876081613358591,
        "contrast": 1.478058264270367,
        "brightness": 0.34423103760874096,
        "dropout": 0.05437207168585684,
        "dropout_boxes": 6,
    }
    assert chosen.pop("noise_seed") == 280403021231121101
    assert chosen == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------- the batch


def test_normalise_clips_if_asked_and_standardises_each_channel():
    image = torch.tensor([[0.0, 10.0, 100.0], [1.0, 2.0, 3.0]])
    before = image.clone()
    out = intensity.normalise(image, mean=[10, 2], std=[5, 0], low=[5, 0], high=[20, 9])
    assert torch.allclose(out[0], torch.tensor([-1.0, 0.0, 2.0]))
    assert torch.equal(out[1], torch.tensor([-1.0, 0.0, 1.0]))
    unclipped = intensity.normalise(image[:1], mean=[10], std=[5])
    assert torch.equal(unclipped, torch.tensor([[-2.0, 0.0, 18.0]]))
    assert torch.equal(image, before)


@pytest.mark.parametrize("name", intensity.NAMES)
def test_every_transform_changes_the_image_and_not_its_input(name):
    image = random_patch()
    before = image.clone()
    out = change(image, choose(name))
    assert (out - image).abs().max() > 0.05
    assert torch.equal(image, before)
    assert out.shape == image.shape and out.dtype == torch.float32


@pytest.mark.parametrize("name", intensity.NAMES)
def test_the_place_of_zero_does_not_matter(name):
    image = random_patch()
    moved = change(image + 8, choose(name)) - 8
    assert torch.allclose(moved, change(image, choose(name)), atol=2e-4)


def test_a_batch_that_chose_nothing_is_returned_as_it_is():
    images = random_patch((2, 1, 3, 4, 5))
    assert intensity.change_intensity(images, [{}, {"noise_seed": 3}], [CUBE] * 2) is images


def test_a_sample_that_chose_nothing_keeps_its_bits_beside_others():
    images = random_patch((3, 2, 4, 5, 6))
    chosen = [choose(*VALUES), {"noise_seed": 3}, choose(*VALUES, seed=8)]
    out = intensity.change_intensity(images, chosen, [CUBE] * 3)
    assert torch.equal(out[1], images[1]) and not torch.equal(out[0], images[0])


def test_a_sample_is_the_same_bit_for_bit_alone_and_in_a_batch():
    images = random_patch((3, 2, 9, 11, 13))
    chosen = [choose(*VALUES), choose("gamma", "blur", seed=8), choose(*VALUES, seed=9, blur=0.7)]
    spacings = [CUBE, (2.0, 1.0, 1.0), (3.0, 0.5, 0.5)]
    together = intensity.change_intensity(images, chosen, spacings)
    for i in (2, 0, 1):
        assert torch.equal(together[i], change(images[i], chosen[i], spacings[i]))


def test_a_strided_batch_gives_what_its_copy_gives():
    images = random_patch((2, 1, 6, 7, 8)).transpose(2, 4)
    arguments = [choose(*VALUES)] * 2, [CUBE] * 2
    copied = intensity.change_intensity(images.contiguous(), *arguments)
    assert torch.equal(intensity.change_intensity(images, *arguments), copied)


@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (1, 9, 1, 1), (2, 1, 1, 1), (3, 2, 3, 2)])
def test_patches_of_one_slice_or_one_voxel_stay_finite(shape):
    for values in (torch.zeros(shape), random_patch(shape), random_patch(shape) * 60 + 128):
        for chosen in (*(choose(name) for name in VALUES), choose(*VALUES)):
            out = change(values, chosen, (4.0, 1.0, 1.0))
            assert out.shape == shape and torch.isfinite(out).all()


@pytest.mark.parametrize("name", [n for n in VALUES if n not in ("noise", "rician", "brightness")])
@pytest.mark.parametrize("value", [0.0, -0.7, 200.0])
def test_a_constant_patch_stays_constant(name, value):
    image = torch.full((2, 6, 7, 8), value)
    assert torch.allclose(change(image, choose(name)), image, rtol=1e-6, atol=1e-6)


def test_channels_are_changed_by_their_own_statistics():
    image = random_patch((2, 8, 9, 10)) * torch.tensor([1.0, 20.0]).view(2, 1, 1, 1)
    for name in ("gamma", "contrast", "dropout", "blur", "low_resolution"):
        out = change(image, choose(name))
        alone = torch.cat([change(channel[None], choose(name)) for channel in image])
        assert torch.allclose(out, alone, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(
    "images, chosen, spacings, named",
    [
        (torch.zeros(1, 2, 3, 4), [{}], [CUBE], "B, C, D, H, W"),
        (torch.zeros(1, 1, 2, 3, 4, dtype=torch.uint8), [{}], [CUBE], "uint8"),
        (torch.zeros(2, 1, 2, 3, 4), [{}], [CUBE] * 2, "each of 2 samples, got 1 and 2"),
        (torch.zeros(1, 1, 2, 3, 4), [{"gama": 1.2}], [CUBE], "gama"),
    ],
)
def test_wrong_input_is_named(images, chosen, spacings, named):
    with pytest.raises(ValueError, match=named):
        intensity.change_intensity(images, chosen, spacings)


# ---------------------------------------------------------------------------- noise


def test_noise_has_the_asked_deviation_and_no_mean():
    out = change(torch.zeros(1, 30, 30, 30), choose(noise=0.3))
    assert abs(float(out.std()) - 0.3) < 0.005 and abs(float(out.mean())) < 0.005


@pytest.mark.parametrize("name", intensity.RANDOM + ("dropout",))
def test_what_is_random_is_a_function_of_the_seed(name):
    image = random_patch()
    a, b, other = (change(image, choose(name, seed=s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.allclose(a, other, atol=0.01)


def test_rician_noise_without_signal_is_rayleigh():
    out = change(torch.zeros(1, 40, 40, 40), choose(rician=0.5)).double()
    assert out.min() >= 0
    assert abs(float(out.mean()) - 0.5 * math.sqrt(math.pi / 2)) < 0.005
    assert abs(float(out.var()) - 0.25 * (2 - math.pi / 2)) < 0.003


def test_rician_noise_has_the_second_and_fourth_moment_of_the_formula():
    signal, sigma = 1.5, 0.4
    image = torch.full((1, 40, 40, 40), signal - 2)
    image[0, 0, 0, 0] = -2.0  # the patch minimum: there is no signal
    squares = (change(image, choose(rician=sigma)).double()[0, 1:] + 2) ** 2
    expected = signal**2 + 2 * sigma**2
    fourth = signal**4 + 8 * signal**2 * sigma**2 + 8 * sigma**4
    assert abs(float(squares.mean()) - expected) < 0.02
    assert abs(float((squares**2).mean()) - fourth) < 0.15


def test_rician_and_gaussian_noise_are_independent():
    image = torch.full((1, 20, 20, 20), 50.0)
    image[0, 0, 0, 0] = 0.0
    noises = [
        (change(image, choose(name)) - image).flatten()[1:].numpy() for name in ("noise", "rician")
    ]
    assert abs(np.corrcoef(noises)[0, 1]) < 0.05


# ---------------------------------------------------------------------------- resolution


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.3])
def test_blur_agrees_with_scipy_and_follows_the_spacing(sigma):
    image = random_patch((1, 9, 14, 15)).numpy()[0]
    out = change(torch.from_numpy(image)[None], choose(blur=sigma), (2.0, 1.0, 1.0))
    expected = ndimage.gaussian_filter(image, (sigma / 2, sigma, sigma), mode="nearest")
    assert np.allclose(out[0].numpy(), expected, atol=1e-5)


def test_blur_leaves_an_axis_of_much_coarser_voxels_as_it_is():
    image = torch.zeros(1, 5, 9, 9)
    image[0, 2, 4, 4] = 1.0
    out = change(image, choose(blur=1.0), (6.0, 1.0, 1.0))
    assert out[0, 2].sum() == pytest.approx(1.0) and not out[0, [0, 1, 3, 4]].any()


def test_low_resolution_by_two_is_averaging_and_a_trilinear_raise():
    image = random_patch((2, 8, 12, 10))
    out = change(image, choose(low_resolution=2.0))
    expected = F.interpolate(F.avg_pool3d(image[None], 2), scale_factor=2, mode="trilinear")[0]
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(
    "factor, line, expected",
    [
        (2.0, [0, 0, 4, 4], [0, 1, 3, 4]),
        # Voxels of 1.5 hold 1/3, 5/3, 10/3, 14/3.
        (1.5, [0, 1, 2, 3, 4, 5], [1 / 3, 1, 35 / 18, 55 / 18, 4, 14 / 3]),
        # Three voxels of 2 hang over both ends by a half, which does not count: the outer ones hold
        # (0 + 3/2) / 1.5 = 1 and (6/2 + 15) / 1.5 = 12, the middle one (3/2 + 3 + 6/2) / 2.
        (2.0, [0, 3, 3, 6, 15], [1, 2.375, 3.75, 7.875, 12]),
        (9.0, [1, 2, 6], [3, 3, 3]),  # one voxel larger than the patch
    ],
)
def test_low_resolution_of_a_line_is_as_computed_by_hand(factor, line, expected):
    image = torch.tensor(line, dtype=torch.float32).view(1, 1, 1, -1)
    out = change(image, choose(low_resolution=factor))
    assert np.allclose(out.flatten().numpy(), expected, atol=1e-5)


def test_low_resolution_spares_axes_whose_voxels_are_large_already():
    image = random_patch((1, 6, 8, 8))
    out = change(image, choose(low_resolution=2.0), (2.0, 1.0, 1.0))
    plane = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="bilinear")
    assert torch.allclose(out, plane, atol=1e-6)


def test_blur_and_low_resolution_together_are_one_after_the_other():
    image = random_patch((2, 9, 10, 11))
    together = change(image, choose(blur=1.2, low_resolution=1.7))
    after = change(change(image, choose(blur=1.2)), choose(low_resolution=1.7))
    assert torch.allclose(together, after, atol=1e-5)


# ---------------------------------------------------------------------------- pointwise


def test_gamma_is_a_power_brought_back_to_mean_and_deviation():
    image = random_patch()
    x = image.numpy().astype(np.float64)
    bent = ((x - x.min()) / (x.max() - x.min())) ** 1.7
    expected = (bent - bent.mean()) / bent.std() * x.std() + x.mean()
    assert np.allclose(change(image, choose(gamma=1.7)).numpy(), expected, atol=1e-4)
    assert np.abs(expected - x).max() > 0.1


def test_gamma_of_one_is_neutral():
    image = random_patch() * 3 + 5
    assert torch.allclose(change(image, choose(gamma=1.0)), image, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 255.0])
def test_gamma_acts_alike_on_values_of_any_scale(scale):
    image = random_patch()
    out = change(image * scale, choose(gamma=0.7)) / scale
    assert torch.allclose(out, change(image, choose(gamma=0.7)), atol=1e-4)


def test_contrast_and_brightness_do_what_they_say():
    image = random_patch() + 1
    mean = image.mean()
    assert torch.equal(change(image, choose(brightness=0.5)), image + 0.5)
    out = change(image, choose(contrast=2.0, brightness=0.5))
    assert torch.allclose(out, (image - mean) * 2 + mean + 0.5, atol=1e-5)
    assert float(out.std() / image.std()) == pytest.approx(2.0, rel=1e-5)


def gain_of(strength, seed, shape=(2, 16, 20, 24)):
    image = torch.ones(shape)
    image[:, 0, 0, 0] = 0.0  # the patch minimum, from which the gain counts
    gain = change(image, choose(illumination=strength, seed=seed)).log()
    gain[:, 0, 0, 0] = gain[:, 0, 0, 1]
    return gain.numpy()


def test_illumination_gain_reaches_its_bound_and_is_one_on_average():
    for seed in range(5):
        for log_gain in gain_of(0.3, seed):
            assert 0.28 < np.abs(log_gain).max() < 0.3 + 1e-5
            assert abs(log_gain.mean()) < 1e-3 and abs(np.exp(log_gain).mean() - 1) < 0.05
            assert log_gain.std() > 0.05


def test_illumination_is_smooth_and_differs_between_channels_and_seeds():
    a, b = gain_of(0.3, 0), gain_of(0.3, 1)
    for axis, n in enumerate(a.shape[1:], start=1):
        # The fastest cosine, a whole wave of the largest height, has a slope of 0.3 * 2 pi / n; a
        # sum of several that is bounded by the same height may be steeper, hardly twice.
        assert np.abs(np.diff(a, axis=axis)).max() < 0.3 * 2 * 2 * math.pi / n
    assert not np.allclose(a[0], a[1], atol=0.05) and not np.allclose(a, b, atol=0.05)


def test_the_illumination_of_one_slice_varies_within_it():
    log_gain = gain_of(0.3, 2, shape=(1, 1, 20, 24))
    assert 0.28 < np.abs(log_gain).max() < 0.3 + 1e-5 and abs(log_gain.mean()) < 2e-3


# ---------------------------------------------------------------------------- dropout


def boxes_of(seed, shape, share, count):
    return intensity.blank_boxes(np.random.default_rng(seed), shape, share=share, count=count)


@pytest.mark.parametrize("shape", [(24, 40, 40), (1, 64, 64), (5, 9, 33)])
@pytest.mark.parametrize("share, count", [(0.01, 1), (0.05, 3), (0.1, 8), (0.6, 5)])
def test_boxes_are_disjoint_and_cover_the_asked_share(shape, share, count):
    voxels = math.prod(shape)
    for seed in range(8):
        covered = np.zeros(shape, int)
        boxes = boxes_of(seed, shape, share, count)
        for box in boxes:
            covered[box] += 1
        assert covered.max() == 1 and 1 <= len(boxes) <= count
        # The last edge of the last box is rounded to a voxel: half a plane of it at most.
        assert abs(covered.sum() - share * voxels) <= 0.15 * share * voxels + 2


def test_as_many_boxes_come_as_were_asked_for():
    for count in (1, 2, 5, 8):
        assert len(boxes_of(count, (24, 40, 40), 0.1, count)) == count


def test_rounding_is_carried_from_box_to_box():
    for seed in range(100):
        boxes = boxes_of(seed, (8, 12, 12), 0.1, 8)
        covered = sum(math.prod(side.stop - side.start for side in box) for box in boxes)
        assert covered / (8 * 12 * 12) == pytest.approx(0.1, rel=0.05)


def test_boxes_lie_anywhere_in_the_patch():
    hits = np.zeros((8, 8, 8))
    for seed in range(400):
        for box in boxes_of(seed, hits.shape, 0.1, 1 + seed % 8):
            hits[box] += 1
    assert hits.min() > 0 and abs(hits.mean() / 400 - 0.1) < 0.01


def test_a_patch_too_small_for_its_boxes_gets_fewer():
    assert boxes_of(0, (1, 1, 1), 0.1, 4) == []
    assert 1 <= len(boxes_of(0, (1, 1, 3), 0.9, 8)) <= 3


def test_dropout_fills_with_the_patch_mean_and_spares_the_rest():
    image = random_patch((2, 20, 24, 28))
    out = change(image, choose(dropout=0.1))
    changed = out != image
    assert torch.equal(changed[0], changed[1])
    assert float(changed[0].float().mean()) == pytest.approx(0.1, rel=0.1)
    for channel, kept in zip(out, image, strict=True):
        assert torch.allclose(channel[changed[0]], kept.mean(), atol=1e-6)


# ---------------------------------------------------------------------------- the scale of an image


@pytest.mark.parametrize("power", [-120, -40, 60])
def test_an_image_of_another_scale_is_normalised_to_the_same_bits(power):
    image, factor = torch.randn(1, 4, 5, 6), 2.0**power
    how = {"mean": 0.1, "std": 0.7, "low": -1.5, "high": 1.5}
    plain = intensity.normalise(image, **{key: [value] for key, value in how.items()})
    how = {key: [value * factor] for key, value in how.items()}
    assert torch.equal(intensity.normalise(image * factor, **how), plain)


def test_values_beyond_float32_are_cut_so_that_their_differences_are_finite():
    image = torch.tensor([1e300, -1e300, 5.0], dtype=torch.float64)
    cut = intensity.within_float32(image)
    assert cut.dtype == torch.float32 and cut[2] == 5 and (cut[0] - cut[1]).isfinite()
    integers = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    assert intensity.within_float32(integers) is integers


def test_every_uint16_is_widened_to_itself_and_other_types_stay():
    box = torch.from_numpy(np.arange(2**16, dtype=np.uint16).reshape(4, 8, 2048)[:, ::2])
    assert intensity.widened(box).dtype == torch.int32
    assert intensity.widened(box).tolist() == box.numpy().tolist()
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float32):
        assert intensity.widened(other := torch.zeros(3, dtype=dtype)) is other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_every_uint16_is_widened_to_itself():
    box = torch.from_numpy(np.arange(2**16, dtype=np.uint16)).pin_memory()
    wide = intensity.widened(box.to("cuda", non_blocking=True))
    assert wide.is_cuda and wide.tolist() == [*range(2**16)]


def test_gamma_leaves_a_faint_patch_its_deviation():
    patch = (1e-9 * torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))[None]
    out = intensity.change_intensity(patch, [{"gamma": 2.0, "noise_seed": 1}], [(1, 1, 1)])
    assert out.std().item() == pytest.approx(patch.std().item(), rel=1e-3)
    same = torch.full((1, 1, 4, 8, 8), 3.0)
    out = intensity.change_intensity(same, [{"gamma": 2.0, "noise_seed": 1}], [(1, 1, 1)])
    assert torch.equal(out, same)
