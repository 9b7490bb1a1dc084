"""Augmentation: the spatial parameters of a patch, and the batch that is made on the device.

`sample_spatial_params` samples the map from patch to source (resample.py) with a numpy generator,
in a worker, as a few numbers; intensity.py samples what happens to grey values. `augment_batch`
does the work of both on the device. contact_sheet.py shows each transformation as a picture.
"""

import itertools
import math

import numpy as np
import torch

from patches import intensity, resample

ISOTROPY = 2.0  # axes whose voxels are more than this many times the shortest are not rotated into
ELASTIC_SPACING = 24.0  # voxels of the finest axis, where the settings give no distance
ELASTIC_AMPLITUDE = (0.5, 1.5)  # the same


def sample_spatial_params(rng, source_spacing, spacing, *, patch, settings):
    """Sample the `resample.Map` of one patch.

    rng: numpy Generator; source_spacing: of the stored voxels, spacing: of the patch's, z, y, x in
    one unit; patch: voxels; settings: plain dict of the `augment` settings, or None for none.
    """
    source_spacing, spacing = np.asarray(source_spacing, float), np.asarray(spacing, float)
    to_source = np.diag(1 / source_spacing)
    if settings is None:
        matrix = to_source @ np.diag(spacing)
        return resample.Map(matrix, matrix)
    turn = _turn(rng, spacing, settings)
    rotation = _rotation(rng, spacing, settings)
    upright = turn @ np.diag(spacing / _zoom(rng, settings))  # patch voxels to physical distances
    matrix = to_source @ rotation @ upright
    rolled, roll = rng.random() < settings["roll"], 1 + int(rng.integers(max(patch[0] - 1, 1)))
    control, step = _elastic(rng, spacing, patch, settings)
    if control is not None:  # from the patch's own axes to the source's
        control = np.einsum("ab,bzyx->azyx", matrix, control).astype(np.float32)
    return resample.Map(matrix, to_source @ upright, control, step, roll if rolled else 0)


def _turn(rng, spacing, settings):
    """A signed permutation: flips, and quarter turns in the planes whose two spacings are equal."""
    turn = np.eye(3)
    for plane in itertools.combinations(range(3), 2):
        quarters = rng.integers(0, 4)
        turned = rng.random() < settings["turn90"]
        if turned and math.isclose(spacing[plane[0]], spacing[plane[1]], rel_tol=1e-3):
            turn = turn @ np.round(rotate_in(plane, quarters * math.pi / 2))
    signs = np.where(rng.random(3) < settings["flip"], -1.0, 1.0)
    return turn @ np.diag(signs)


def rotate_in(plane, angle):
    """The (3, 3) rotation by `angle` (radians) from the first axis of a plane to the second."""
    a, b = plane
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def _rotation(rng, spacing, settings):
    """About z alone, or about every axis; never between axes of too different spacing if auto."""
    matrix = np.eye(3)
    for axis, plane in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        chance, angle = rng.random(), math.radians(rng.uniform(*settings["rotation_degrees"]))
        ratio = max(spacing[list(plane)]) / min(spacing[list(plane)])
        allowed = {"all": True, "z": axis == 0, "auto": ratio <= ISOTROPY}
        if allowed[settings["rotation_axes"]] and chance < settings["rotation"]:
            matrix = matrix @ rotate_in(plane, angle)
    return matrix


def _zoom(rng, settings):
    """How many times larger things are shown, per axis; log-uniform: 1/2 is as likely as 2."""
    low, high = np.log(settings["scaling_range"])
    chance, per_axis = rng.random(2)
    factors = np.exp(rng.uniform(low, high, size=3))
    if chance >= settings["scaling"]:
        return np.ones(3)
    return factors if per_axis < settings["scaling_per_axis"] else np.full(3, factors[0])


def elastic_range(spacing, settings):
    """(distance of control points, (least, largest) amplitude) in the unit of the spacing.

    ValueError if the points are closer than the finest voxels.
    """
    finest = float(min(spacing))
    if settings["elastic_spacing"] is None or settings["elastic_amplitude_range"] is None:
        return ELASTIC_SPACING * finest, tuple(finest * a for a in ELASTIC_AMPLITUDE)
    if settings["elastic_spacing"] < finest:
        raise ValueError(
            f"augment.elastic_spacing: expected at least a voxel, {finest:g} in the unit of the "
            f"spacing, got {settings['elastic_spacing']:g}; is it in another unit?"
        )
    return settings["elastic_spacing"], settings["elastic_amplitude_range"]


def _elastic(rng, spacing, patch, settings):
    """Control points in patch voxels, (3, nz, ny, nx), and their distance in voxels, per axis.

    Control points are uniform in a cube and independent: with an amplitude of at most 0.075 of
    their distance, a B-spline of them maps one to one (Choi & Lee 2000). They are scaled so that
    the root mean square of the field over the patch, along each axis, is the amplitude.
    """
    distance, amplitudes = elastic_range(spacing, settings)
    chance, amplitude, seed = rng.random(), rng.uniform(*amplitudes), rng.integers(2**62)
    if chance >= settings["elastic"]:
        return None, None
    step = tuple(float(distance / s) for s in spacing)
    size = resample.lattice_size(patch, step)
    share = math.prod(  # of the variance of the control points that the field has
        np.square(resample.spline_weights(np.arange(n), s, count)).sum(axis=1).mean()
        for n, s, count in zip(patch, step, size, strict=True)
    )
    # A generator of its own: how many numbers a lattice takes must not shift what is sampled next.
    control = np.random.default_rng(int(seed)).uniform(-1, 1, (3, *size))
    control *= amplitude * math.sqrt(3 / share)
    return control / spacing[:, None, None, None], step


def augment_batch(samples, patch, *, device, **labels):
    """Samples of data.PatchDataset to (image, target, valid, skeleton or None): (B, C, D, H, W).

    labels: regions, ignore_label and exclusive, as in `resample.resample_patch`.
    """
    images, masks = [], []
    for sample in samples:
        names = [name for name in ("image", "label", "skeleton") if name in sample]
        boxes = {name: sample[name].to(device, non_blocking=True) for name in names}
        boxes = {name: intensity.widened(box) for name, box in boxes.items()}
        boxes["image"] = intensity.within_float32(boxes["image"])
        image, *own_masks = resample.resample_patch(**boxes, geometry=sample, patch=patch, **labels)
        scale = {key: sample[key] for key in ("mean", "std", "low", "high")}
        images.append(intensity.normalise(image, **scale))
        masks.append(own_masks)
    images = intensity.change_intensity(
        torch.stack(images),
        [sample["intensity"] for sample in samples],
        [sample["spacing"] for sample in samples],
    )
    targets, valids, skeletons = zip(*masks, strict=True)
    skeleton = None if skeletons[0] is None else torch.stack(skeletons)
    return images, torch.stack(targets), torch.stack(valids), skeleton
