import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

import augment
from settings import Augment

OFF = dict.fromkeys(
    ("flip", "turn90", "rotation", "scaling", "blur", "noise", "brightness", "contrast", "gamma"),
    0.0,
)


def settings(**changes):
    return {**Augment().model_dump(), **OFF, **changes}


def volume(shape=(9, 12, 15), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, *shape)).astype(np.uint8)


def draw(image, label, matrix, centre, patch, upright=None, ignore_label=None):
    shape = image.shape[1:]
    origin, start, stop = augment.place_patch(
        matrix, matrix if upright is None else upright, centre, patch, shape
    )
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return augment.draw_patch(
        torch.from_numpy(image[(slice(None), *box)]),
        torch.from_numpy(label[box]),
        matrix=matrix,
        origin=origin,
        start=start,
        shape=shape,
        patch=patch,
        foreground=[1],
        ignore_label=ignore_label,
    ), origin


def smooth(shape, seed=0):
    noise = np.random.default_rng(seed).normal(size=shape)
    return (ndimage.gaussian_filter(noise, 2.5) * 100).astype(np.float32)


def sampled(source, matrix, origin, patch, order=1):
    """The independent reference: scipy's affine_transform of the whole volume."""
    return ndimage.affine_transform(
        source, matrix, offset=origin, output_shape=patch, order=order, mode="nearest"
    )


def test_identity_gives_the_exact_source_voxels():
    image, label = volume(), (volume(seed=1)[0] > 128).astype(np.uint8)
    (drawn, target, valid, _), origin = draw(image, label, np.eye(3), (4, 6, 7), (4, 6, 8))
    z, y, x = origin.astype(int)
    assert torch.equal(drawn, torch.from_numpy(image[:, z : z + 4, y : y + 6, x : x + 8]).float())
    assert np.array_equal(target[0].numpy(), label[z : z + 4, y : y + 6, x : x + 8])
    assert valid.all()


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_every_flip_gives_the_exact_source_voxels(signs):
    image = volume()
    (drawn, _, valid, _), _ = draw(
        image, image[0], np.diag(np.array(signs, float)), (4, 6, 7), (4, 6, 8)
    )
    (straight, *_), _ = draw(image, image[0], np.eye(3), (4, 6, 7), (4, 6, 8))
    axes = [a + 1 for a in range(3) if signs[a] < 0]
    # A centre between voxels is rounded up or down; the voxels must be a flipped box of the source.
    found = drawn.flip(axes).numpy()[0]
    boxes = np.lib.stride_tricks.sliding_window_view(image[0], found.shape)
    assert (boxes == found).all(axis=(3, 4, 5)).any()
    assert valid.all() and straight.shape == drawn.shape


@pytest.mark.parametrize("plane", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_give_the_exact_source_voxels(plane, quarters):
    image = volume((10, 10, 10))
    turn = np.round(augment._rotate_in(plane, quarters * np.pi / 2))
    (drawn, _, valid, _), _ = draw(image, image[0], turn, (4.5, 4.5, 4.5), (10, 10, 10))
    expected = [np.rot90(image[0], k, plane) for k in range(4)]
    assert any(np.array_equal(drawn[0].numpy(), e) for e in expected[1:])
    assert valid.all()


def test_quarter_turn_of_an_uneven_patch_is_a_turned_box_of_the_source():
    image = volume((8, 20, 20))
    turn = np.round(augment._rotate_in((1, 2), np.pi / 2))
    (drawn, _, valid, _), origin = draw(image, image[0], turn, (4, 10, 10), (4, 5, 8))
    for p in itertools.product(range(4), range(5), range(8)):
        z, y, x = (origin + turn @ p).astype(int)
        assert drawn[(0, *p)] == image[0, z, y, x]
    assert valid.all()


@pytest.mark.parametrize("angle", [7, 30, 133])
def test_rotation_and_scaling_agree_with_scipy(angle):
    image = smooth((20, 24, 28))
    label = (image > 0).astype(np.uint8)
    matrix = augment._rotate_in((1, 2), np.radians(angle)) @ augment._rotate_in((0, 1), 0.2)
    matrix = matrix @ np.diag([0.8, 1.1, 0.9])
    patch = (7, 8, 9)
    (drawn, target, valid, _), origin = draw(image[None], label, matrix, (10, 12, 14), patch)
    assert np.allclose(drawn[0].numpy(), sampled(image, matrix, origin, patch), atol=2e-3)
    nearest = sampled(label, matrix, origin, patch, order=0)
    assert (target[0].numpy() == nearest).mean() > 0.99  # ties between two voxels may fall apart
    assert valid.all()


def test_target_spacing_agrees_with_resampling_the_whole_volume_and_cropping():
    image = smooth((16, 40, 40))
    source_spacing, spacing = (3.0, 1.0, 1.0), (2.0, 1.6, 1.6)
    ratio = np.array(spacing) / source_spacing
    whole = sampled(image, np.diag(ratio), np.zeros(3), (23, 25, 25))
    matrix, upright = augment.draw_spatial(
        np.random.default_rng(0), source_spacing, spacing, settings=None
    )
    patch, corner = (8, 9, 10), np.array([5, 6, 7])
    centre = (corner + (np.array(patch) - 1) / 2) * ratio
    (drawn, *_), origin = draw(image[None], (image > 0) * np.uint8(1), matrix, centre, patch)
    assert np.allclose(origin, corner * ratio) and np.allclose(upright, np.diag(ratio))
    z, y, x = corner
    assert np.allclose(drawn[0].numpy(), whole[z : z + 8, y : y + 9, x : x + 10], atol=2e-3)


def test_outside_the_volume_is_invalid_and_repeats_the_border():
    image = volume((5, 8, 8))
    (drawn, _, valid, _), _ = draw(image, image[0], np.eye(3), (2, 4, 4), (9, 8, 8))
    assert valid[0, 2:7].all() and not valid[0, :2].any() and not valid[0, 7:].any()
    assert torch.equal(drawn[0, 0], torch.from_numpy(image[0, 0]).float())
    assert torch.equal(drawn[0, -1], torch.from_numpy(image[0, -1]).float())


def test_unlabeled_voxels_are_invalid_and_no_target_whatever_the_map():
    image, label = volume((12, 12, 12)), np.zeros((12, 12, 12), np.uint8)
    label[:, :, 6:] = 2
    label[:, 4:8, :6] = 1
    for angle in (0.0, 0.4):
        matrix = augment._rotate_in((1, 2), angle)
        (_, target, valid, _), origin = draw(
            image, label, matrix, (5.5, 5.5, 5.5), (6, 6, 6), ignore_label=2
        )
        places = origin + np.indices((6, 6, 6)).reshape(3, -1).T @ matrix.T
        right = places[:, 2] > 5.5 + 1e-6
        assert not valid.flatten().numpy()[right].any()
        assert valid.flatten().numpy()[places[:, 2] < 5.5 - 1e-6].all()
        assert not (target.bool() & ~valid).any() and target.any()


def test_patches_stay_inside_where_they_can_and_are_centred_where_they_cannot():
    for centre in ((0, 0, 0), (99, 99, 4)):
        origin, start, stop = augment.place_patch(
            np.eye(3), np.eye(3), centre, (16, 16, 16), (100, 100, 5)
        )
        assert (origin[:2] >= 0).all() and (origin[:2] + 16 <= 100).all()
        assert origin[2] in (-6, -5) and (start[2], stop[2]) == (0, 5)


def test_box_holds_every_voxel_that_the_interpolation_needs():
    rng = np.random.default_rng(3)
    image = smooth((30, 30, 30))
    for _ in range(10):
        matrix, upright = augment.draw_spatial(
            rng, (1, 1, 1), (1, 1, 1), settings=settings(rotation=1.0, scaling=1.0, flip=0.5)
        )
        (drawn, *_), origin = draw(
            image[None],
            np.ones_like(image, np.uint8),
            matrix,
            rng.uniform(0, 30, 3),
            (8, 8, 8),
            upright,
        )
        assert np.allclose(drawn[0].numpy(), sampled(image, matrix, origin, (8, 8, 8)), atol=2e-3)


def test_anisotropic_data_rotate_and_turn_in_plane_only():
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix, _ = augment.draw_spatial(
            rng, (5, 1, 1), (5, 1, 1), settings=settings(rotation=1.0, turn90=1.0)
        )
        assert np.allclose(matrix[0, 1:], 0) and np.allclose(matrix[1:, 0], 0)


def test_rotation_keeps_physical_lengths():
    matrix, _ = augment.draw_spatial(
        np.random.default_rng(0),
        (1.5, 1, 1),
        (1.5, 1, 1),
        settings=settings(rotation=1.0, rotation_axes="all"),
    )
    physical = np.diag([1.5, 1, 1]) @ matrix @ np.diag([1 / 1.5, 1, 1])
    assert np.allclose(physical @ physical.T, np.eye(3))
    assert not np.allclose(physical, np.eye(3))


def test_scaling_shows_things_larger_by_the_factor():
    matrix, _ = augment.draw_spatial(
        np.random.default_rng(0),
        (1, 1, 1),
        (1, 1, 1),
        settings=settings(scaling=1.0, scaling_range=(2.0, 2.0)),
    )
    assert np.allclose(matrix, np.eye(3) / 2)


def test_probability_zero_leaves_the_patch_as_it_is():
    image = torch.randn(1, 4, 5, 6)
    chosen = augment.draw_intensity(np.random.default_rng(0), settings=settings())
    assert set(chosen) == {"noise_seed"}
    assert torch.equal(augment.change_intensity(image, chosen, (1, 1, 1)), image)
    matrix, _ = augment.draw_spatial(
        np.random.default_rng(0), (2, 1, 1), (2, 1, 1), settings=settings()
    )
    assert np.array_equal(matrix, np.eye(3))


def test_gamma_keeps_mean_and_deviation():
    image = torch.rand(2, 6, 7, 8) * 3 - 1
    bent = augment.change_intensity(image, {"gamma": 1.7}, (1, 1, 1))
    assert torch.allclose(bent.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(bent.std((1, 2, 3)), image.std((1, 2, 3)), atol=1e-4)
    assert not torch.allclose(bent, image, atol=1e-2)


def test_contrast_and_brightness_do_what_they_say():
    image = torch.rand(1, 4, 4, 4)
    out = augment.change_intensity(image, {"contrast": 2.0, "brightness": 0.5}, (1, 1, 1))
    assert torch.allclose(out, (image - image.mean()) * 2 + image.mean() + 0.5, atol=1e-6)


def test_blur_agrees_with_scipy_and_follows_the_spacing():
    image = np.random.default_rng(0).normal(size=(9, 14, 14)).astype(np.float32)
    out = augment.change_intensity(torch.from_numpy(image[None]), {"blur": 1.0}, (2, 1, 1))[0]
    expected = ndimage.gaussian_filter(image, (0.5, 1, 1), mode="nearest", radius=(2, 3, 3))
    assert np.allclose(out.numpy(), expected, atol=1e-5)


def test_noise_is_a_function_of_its_seed_with_the_asked_deviation():
    image = torch.zeros(1, 20, 20, 20)
    a, b, other = (
        augment.change_intensity(image, {"noise": 0.3, "noise_seed": s}, (1, 1, 1))
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert abs(float(a.std()) - 0.3) < 0.01


def test_normalise_clips_and_standardises_each_channel():
    image = torch.tensor([[0.0, 10.0, 100.0], [1.0, 2.0, 3.0]])
    out = augment.normalise(image, mean=[10, 2], std=[5, 0], low=[5, 0], high=[20, 9])
    assert torch.allclose(out[0], torch.tensor([-1.0, 0.0, 2.0]))
    assert torch.isfinite(out[1]).all()
