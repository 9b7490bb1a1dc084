"""Maps that sample_spatial_params samples, against what its settings ask for; whole batches."""

import collections
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from scipy.spatial.transform import Rotation

from patches import augment, intensity
from settings import Augment

CUBE = (1.0, 1.0, 1.0)
OFF = dict.fromkeys(("flip", "turn90", "rotation", "scaling", "elastic", "roll"), 0.0)
UNLIKELY = 1e-3  # p-value: samples are seeded, so that a test that passes once always does


def settings(**changes):
    return {**Augment().model_dump(), **OFF, **changes}


def sample_maps(count, spacing=CUBE, patch=(8, 8, 8), **changes):
    """Maps at the source's own spacing, each from a generator of its own, as a worker has it."""
    chosen = settings(**changes)
    return [
        augment.sample_spatial_params(
            np.random.default_rng((0, 0, 2, i)), spacing, spacing, patch=patch, settings=chosen
        )
        for i in range(count)
    ]


def is_uniform(values, low, high):
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > UNLIKELY


def happens(events, probability):
    return stats.binomtest(int(np.sum(events)), len(events), probability).pvalue > UNLIKELY


def are_alike(keys, kinds):
    """Whether each of a number of kinds comes as often as any other."""
    counts = list(collections.Counter(keys).values())
    return len(counts) == kinds and stats.chisquare(counts).pvalue > UNLIKELY


def angles_of(sampled):
    """Degrees about z, then y, then x, of each map, by scipy; its y turns from x to z."""
    turned = Rotation.from_matrix([m.matrix for m in sampled]).as_euler("XYZ", degrees=True)
    return turned * (1, -1, 1)


# ---------------------------------------------------------------------------- nothing asked


@pytest.mark.parametrize("chosen", [None, settings()])
def test_probability_zero_changes_nothing(chosen):
    sampled = augment.sample_spatial_params(
        np.random.default_rng(0), (2, 1, 1), (2, 1, 1), patch=(4, 4, 4), settings=chosen
    )
    assert np.array_equal(sampled.matrix, np.eye(3)) and np.array_equal(sampled.upright, np.eye(3))
    assert sampled.control is None and sampled.roll == 0


def test_one_transform_does_not_change_what_another_samples():
    on = {"flip": 0.5, "turn90": 0.5, "rotation": 0.5, "scaling": 0.5, "elastic": 0.5, "roll": 0.5}
    whole = sample_maps(40, **on)
    still = sample_maps(40, **{**on, "elastic": 0.0, "roll": 0.0})
    assert all(np.array_equal(a.matrix, b.matrix) for a, b in zip(whole, still, strict=True))
    upright = sample_maps(40, **{**on, "rotation": 0.0})
    for a, b in zip(whole, upright, strict=True):
        assert np.array_equal(a.upright, b.upright) and a.roll == b.roll
        assert (a.control is None) == (b.control is None)


# ---------------------------------------------------------------------------- rotation


def test_angles_are_uniform_in_the_range_about_every_axis():
    sampled = sample_maps(1000, rotation=1.0, rotation_axes="all", rotation_degrees=(-10.0, 40.0))
    for angles in angles_of(sampled).T:
        assert is_uniform(angles, -10, 40)


def test_rotation_comes_with_its_probability_about_each_axis_alone():
    angles = angles_of(sample_maps(1000, rotation=0.4))
    turned = np.abs(angles) > 1e-9
    for axis in range(3):
        assert happens(turned[:, axis], 0.4)
        assert is_uniform(angles[turned[:, axis], axis], -30, 30)
    assert happens(turned.all(1), 0.4**3)


def test_rotation_about_z_alone_if_asked():
    angles = angles_of(sample_maps(300, rotation=1.0, rotation_axes="z"))
    assert is_uniform(angles[:, 0], -30, 30) and np.allclose(angles[:, 1:], 0)


def test_anisotropic_data_rotate_and_turn_in_plane_only():
    for sampled in sample_maps(50, spacing=(5, 1, 1), rotation=1.0, turn90=1.0):
        assert np.allclose(sampled.matrix[0, 1:], 0) and np.allclose(sampled.matrix[1:, 0], 0)
    turned = [m.matrix for m in sample_maps(300, spacing=(5, 1, 1), rotation=1.0)]
    assert is_uniform([math.degrees(math.asin(m[2, 1])) for m in turned], -30, 30)


def test_anisotropic_data_rotate_about_every_axis_if_asked():
    sampled = sample_maps(20, spacing=(5, 1, 1), rotation=1.0, rotation_axes="all")
    assert all(np.abs(m.matrix[0, 1:]).min() > 1e-6 for m in sampled)


def test_rotation_keeps_physical_lengths():
    (sampled,) = sample_maps(1, spacing=(1.5, 1, 1), rotation=1.0, rotation_axes="all")
    physical = np.diag([1.5, 1, 1]) @ sampled.matrix @ np.diag([1 / 1.5, 1, 1])
    assert np.allclose(physical @ physical.T, np.eye(3))
    assert not np.allclose(physical, np.eye(3)) and np.allclose(sampled.upright, np.eye(3))


# ---------------------------------------------------------------------------- scaling


def test_scaling_shows_things_larger_by_the_factor():
    (sampled,) = sample_maps(1, scaling=1.0, scaling_range=(2.0, 2.0))
    assert np.allclose(sampled.matrix, np.eye(3) / 2)


def test_scale_is_log_uniform_with_the_asked_share_of_factors_per_axis():
    sampled = sample_maps(2000, scaling=0.6, scaling_range=(0.5, 2.0), scaling_per_axis=0.3)
    scales = np.array([-np.log(np.diag(m.matrix)) for m in sampled])
    scaled = np.abs(scales).max(1) > 0
    assert happens(scaled, 0.6)
    own = np.ptp(scales[scaled], axis=1) > 1e-9
    assert happens(own, 0.3)
    assert is_uniform(scales[scaled][~own, 0], -math.log(2), math.log(2))
    for axis in range(3):
        assert is_uniform(scales[scaled][own, axis], -math.log(2), math.log(2))
    correlation = np.corrcoef(scales[scaled][own].T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 4 / math.sqrt(own.sum())


# ---------------------------------------------------------------------------- flips, turns, roll


def test_each_axis_is_flipped_with_its_probability_and_alone():
    signs = [tuple(np.diag(m.matrix)) for m in sample_maps(1600, flip=0.5)]
    assert set(signs) == set(itertools.product((-1.0, 1.0), repeat=3)) and are_alike(signs, 8)
    rare = [tuple(np.diag(m.matrix)) for m in sample_maps(1000, flip=0.2)]
    assert all(happens([s[axis] < 0 for s in rare], 0.2) for axis in range(3))


def test_quarter_turns_are_uniform_in_the_plane_of_equal_spacing():
    turns = [tuple(m.matrix.ravel()) for m in sample_maps(1000, spacing=(3, 1, 1), turn90=1.0)]
    assert are_alike(turns, 4)
    halves = [m.matrix for m in sample_maps(1000, spacing=(3, 1, 1), turn90=0.5)]
    assert happens([np.array_equal(m, np.eye(3)) for m in halves], 0.5 + 0.5 / 4)


def test_isotropic_patches_come_in_all_24_orientations_and_no_mirrored_one():
    turns = {tuple(m.matrix.ravel()) for m in sample_maps(600, turn90=1.0)}
    assert len(turns) == 24
    assert all(math.isclose(np.linalg.det(np.reshape(m, (3, 3))), 1) for m in turns)


def test_roll_is_uniform_over_the_slices_with_its_probability():
    assert all(m.roll == 0 for m in sample_maps(50, roll=0.0))
    rolls = [m.roll for m in sample_maps(800, roll=1.0)]
    assert are_alike(rolls, 7) and min(rolls) == 1  # a patch of 8 slices; 0 would be none
    assert happens([m.roll == 0 for m in sample_maps(800, roll=0.3)], 0.7)


# ---------------------------------------------------------------------------- elastic


def elastic(count, distance, amplitude, **how):
    ranges = {"elastic_spacing": distance, "elastic_amplitude_range": amplitude}
    return sample_maps(count, elastic=1.0, **{**ranges, **how})


def field(sampled, points):
    """Displacements in patch voxels at points (3, ...) in patch voxels, by scipy's spline."""
    step = np.reshape(sampled.step, (3,) + (1,) * (points.ndim - 1))
    return np.array(
        [
            ndimage.map_coordinates(c.astype(float), points / step + 1, order=3, prefilter=False)
            for c in sampled.control
        ]
    )


@pytest.mark.parametrize("distance", [6.0, 40.0])
@pytest.mark.parametrize("spacing", [CUBE, (3.0, 1.0, 1.5)])
def test_displacement_has_the_asked_root_mean_square_along_each_axis(distance, spacing):
    patch, amplitude = (6, 12, 10), 0.05 * distance
    sampled = elastic(1000, distance, (amplitude, amplitude), spacing=spacing, patch=patch)
    places = np.indices(patch).astype(float)
    moved = np.array([field(m, places) for m in sampled]) * np.reshape(spacing, (1, 3, 1, 1, 1))
    rms = np.sqrt((moved**2).mean(axis=(0, 2, 3, 4)))
    assert np.abs(rms / amplitude - 1).max() < 0.04
    # Patches smaller than the distance are moved as one: 4 standard errors of that many samples.
    assert np.abs(moved.mean(axis=(0, 2, 3, 4))).max() < 4 * amplitude / math.sqrt(len(sampled))
    assert np.abs(np.corrcoef(moved.swapaxes(0, 1).reshape(3, -1))[0, 1:]).max() < 0.1


def test_amplitude_is_uniform_in_its_range_and_comes_with_its_probability():
    chosen = sample_maps(1000, elastic=0.7, elastic_spacing=9.0, elastic_amplitude_range=(0.2, 1.0))
    assert happens([m.control is not None for m in chosen], 0.7)
    unit = elastic(1000, 9.0, (1.0, 1.0))
    amplitudes = [
        a.control.ravel()[0] / b.control.ravel()[0]
        for a, b in zip(chosen, unit, strict=True)
        if a.control is not None
    ]
    assert is_uniform(amplitudes, 0.2, 1.0)


def test_displacement_forgets_itself_within_the_distance_of_the_control_points():
    # Independent control points make a cubic B-spline whose correlation over k distances is that
    # of the B-spline of degree 7 at k: 151/315, 397/1680, 1/42, 1/5040, as shares of the first.
    distance, patch = 8, (2, 2, 8 * 8)
    sampled = elastic(400, float(distance), (0.5, 0.5), patch=patch)
    moved = np.array([field(m, np.indices(patch).astype(float)) for m in sampled])
    for k, share in ((1, 0.4930), (2, 0.0497), (3, 0.0004), (4, 0.0)):
        ahead, behind = moved[..., : -k * distance], moved[..., k * distance :]
        assert abs((ahead * behind).mean() / (moved**2).mean() - share) < 0.05


def test_displacement_bends_no_more_than_its_control_points_do():
    (sampled,) = elastic(1, 10.0, (0.7, 0.7), patch=(3, 3, 60))
    line = field(sampled, np.indices((3, 3, 60)).astype(float))
    bend = np.abs(np.diff(line, n=2, axis=3)).max()
    assert 0 < bend <= np.abs(np.diff(sampled.control, n=2, axis=3)).max() / 10**2


@pytest.mark.parametrize("spacing", [CUBE, (4.0, 1.0, 1.0)])
def test_amplitude_below_0_075_of_the_distance_maps_one_to_one(spacing):
    rng, patch, smallest = np.random.default_rng(1), (10, 24, 24), np.inf
    h = 1e-3 * np.eye(3)[:, :, None]
    for sampled in elastic(150, 12.0, (0.9, 0.9), spacing=spacing, patch=patch):
        points = rng.uniform(0.01, np.array(patch) - 1.01, (400, 3)).T
        slopes = [
            (field(sampled, points + h[a]) - field(sampled, points - h[a])) / 2e-3
            for a in (0, 1, 2)
        ]
        jacobian = np.eye(3) + np.array(slopes).transpose(2, 1, 0)
        smallest = min(smallest, np.linalg.det(jacobian).min())
        # Choi & Lee 2000: one to one if no control point moves by 1 / 2.4795 of the distance.
        moves = np.abs(sampled.control).max(axis=(1, 2, 3)) / sampled.step
        assert (moves < 1 / 2.4795).all()
    assert 0 < smallest < 0.7


def test_displacement_is_sampled_in_the_unit_of_the_spacing_along_the_axes_of_the_patch():
    # A patch of 2 um that looks at voxels of 1 um, zoomed by 2 and turned by 90 degrees: a
    # displacement of one patch voxel is one source voxel, along another axis.
    how = {"elastic": 1.0, "elastic_spacing": 20.0, "elastic_amplitude_range": (1.0, 1.0)}
    rotation = {"rotation": 1.0, "rotation_axes": "z", "rotation_degrees": (90.0, 90.0)}
    turned, still = (
        augment.sample_spatial_params(
            np.random.default_rng(3), CUBE, (2.0, 2.0, 2.0), patch=(6, 6, 6), settings=settings(**s)
        )
        for s in (
            {**how, **rotation, "scaling": 1.0, "scaling_range": (2.0, 2.0)},
            {**how},
        )
    )
    assert turned.step == still.step == (10.0, 10.0, 10.0)
    z, y, x = still.control / 2  # source voxels to patch voxels
    assert np.allclose(turned.control, [z, -x, y], atol=1e-5)


def test_distance_and_amplitude_default_to_voxels_of_the_finest_axis():
    sampled = sample_maps(300, spacing=(2.0, 0.5, 0.5), patch=(4, 16, 16), elastic=1.0)
    unit = elastic(300, 12.0, (1.0, 1.0), spacing=(2.0, 0.5, 0.5), patch=(4, 16, 16))
    assert sampled[0].step == (6.0, 24.0, 24.0)
    ratios = [
        a.control[0, 0, 0, 0] / b.control[0, 0, 0, 0] for a, b in zip(sampled, unit, strict=True)
    ]
    assert is_uniform(ratios, 0.25, 0.75)


# ---------------------------------------------------------------------------- batches


def sample(number, *, image_size=9):
    """A sample as data.PatchDataset ships it, of a whole volume that is its own patch."""
    rng, shape = np.random.default_rng(number), (4, 5, 6)
    image = torch.from_numpy(rng.integers(0, image_size, (2, *shape)).astype(np.uint8))
    label = torch.from_numpy(rng.integers(0, 4, shape).astype(np.uint8))
    return {
        "image": image,
        "label": label,
        "skeleton": torch.ones(shape, dtype=torch.uint8),
        "matrix": np.eye(3),
        "control": None,
        "step": None,
        "roll": 0,
        "origin": np.zeros(3),
        "start": np.zeros(3, int),
        "inside": True,
        "shape": shape,
        "spacing": (2.0, 1.0, 1.0),
        "intensity": {},
        "mean": [1.0, 2.0],
        "std": [2.0, 4.0],
        "low": [0.0, 3.0],
        "high": [5.0, 4.0],
    }


def augment_batch(samples, regions=((1, 3),)):
    return augment.augment_batch(
        samples, (4, 5, 6), regions=regions, ignore_label=2, device=torch.device("cpu")
    )


def test_a_batch_holds_normalised_images_and_the_masks_of_its_samples():
    samples = [sample(i) for i in range(3)]
    images, targets, valids, skeletons = augment_batch(samples)
    assert images.shape == (3, 2, 4, 5, 6) and images.dtype == torch.float32
    assert targets.shape == valids.shape == skeletons.shape == (3, 1, 4, 5, 6)
    for i, one in enumerate(samples):
        raw = one["image"].float()
        assert torch.allclose(images[i, 0], (raw[0].clamp(0, 5) - 1) / 2)
        assert torch.allclose(images[i, 1], (raw[1].clamp(3, 4) - 2) / 4)
        foreground = (one["label"] == 1) | (one["label"] == 3)
        assert torch.equal(targets[i, 0], foreground.float())
        assert torch.equal(valids[i, 0], one["label"] != 2)
        assert torch.equal(skeletons[i], targets[i])  # here the tube is everywhere


def test_each_sample_of_a_batch_gets_the_intensities_that_were_sampled_for_it():
    samples = [sample(0), {**sample(1), "intensity": {"brightness": 0.5, "noise_seed": 1}}]
    images, *_ = augment_batch(samples)
    plain, *_ = augment_batch([sample(0), sample(1)])
    assert torch.equal(images[0], plain[0]) and torch.allclose(images[1], plain[1] + 0.5)
    several = {"noise": 0.2, "gamma": 1.3, "noise_seed": 5}
    images, *_ = augment_batch([{**sample(1), "intensity": several}])
    alone = intensity.change_intensity(plain[1:], [several], [(2.0, 1.0, 1.0)])
    assert torch.equal(images, alone)


def test_what_becomes_of_a_sample_does_not_depend_on_its_batch():
    samples = [sample(i) for i in range(3)]
    together, alone = augment_batch(samples), [augment_batch([one]) for one in samples]
    for k in range(4):
        assert torch.equal(together[k], torch.cat([one[k] for one in alone]))


def test_a_batch_without_skeletons_has_none():
    plain = sample(0)
    del plain["skeleton"]
    *masks, none = augment_batch([plain])
    *beside, _ = augment_batch([sample(0)])
    assert none is None and all(torch.equal(a, b) for a, b in zip(masks, beside, strict=True))
