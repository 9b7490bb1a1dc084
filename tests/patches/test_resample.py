"""The map from patch to source, and resampling by it, against scipy on the whole volume."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from patches import augment, resample
from settings import Augment

OFF = dict.fromkeys(("flip", "turn90", "rotation", "scaling", "elastic"), 0.0)
CUBE = (1.0, 1.0, 1.0)
# name: (shape of the volume, patch, spacing of the source, spacing of the patch)
CASES = {
    "isotropic": ((30, 34, 38), (8, 9, 10), CUBE, CUBE),
    "anisotropic": ((13, 40, 44), (5, 12, 17), (3.0, 1.0, 1.2), (2.5, 1.1, 1.1)),
    "patch thicker than the volume": ((7, 30, 30), (12, 10, 11), CUBE, CUBE),
    "one slice": ((1, 30, 31), (1, 12, 13), (5.0, 1.0, 1.0), (5.0, 1.0, 1.0)),
    "one slice in a thick patch": ((1, 30, 31), (4, 12, 13), CUBE, CUBE),
    "patch larger than the volume": ((6, 9, 7), (11, 13, 12), CUBE, CUBE),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def settings(**changes):
    return {**Augment().model_dump(), **OFF, **changes}


WILD = settings(
    flip=0.5,
    turn90=0.5,
    rotation=1.0,
    rotation_axes="all",
    scaling=1.0,
    scaling_per_axis=0.5,
    elastic=1.0,
    elastic_spacing=8.0,
)


def of(matrix, **parts):
    return resample.Map(np.asarray(matrix, float), np.asarray(matrix, float), **parts)


def wild(rng, source_spacing=CUBE, spacing=CUBE, *, patch, **changes):
    """A random map with everything at once."""
    chosen = {**WILD, **changes}
    return augment.sample_spatial_params(rng, source_spacing, spacing, patch=patch, settings=chosen)


def volume(shape=(9, 12, 15), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, *shape)).astype(np.uint8)


def smooth(shape, seed=0):
    noise = np.random.default_rng(seed).normal(size=shape)
    return (ndimage.gaussian_filter(noise, 2.5) * 100).astype(np.float32)


def make_patch(image, label, mapping, center, patch, *, skeleton=None, **how):
    """((image, target, valid, skeleton), place): from the box alone, as a worker ships it."""
    place = resample.place_patch(mapping, center, patch, image.shape[1:])
    box = tuple(slice(a, b) for a, b in zip(place.start, place.stop, strict=True))
    patches = resample.resample_patch(
        torch.from_numpy(image[(slice(None), *box)]),
        torch.from_numpy(label[box]),
        None if skeleton is None else torch.from_numpy(skeleton[box]),
        geometry={**mapping._asdict(), **place._asdict(), "shape": image.shape[1:]},
        patch=patch,
        **{"regions": [[1]], "ignore_label": None} | how,
    )
    return patches, place


def places_of(mapping, origin, patch):
    """Source coordinates of the patch voxels, (3, D, H, W) float64; the field by scipy's spline."""
    index = np.indices(patch).astype(float)
    places = np.einsum("ab,bzyx->azyx", mapping.matrix, index) + np.reshape(origin, (3, 1, 1, 1))
    if mapping.control is not None:
        step = np.reshape(mapping.step, (3, 1, 1, 1))
        places += [
            ndimage.map_coordinates(c.astype(float), index / step + 1, order=3, prefilter=False)
            for c in mapping.control
        ]
    return places


def sampled(source, places, order=1):
    """The independent reference: scipy on the whole volume."""
    return ndimage.map_coordinates(source, places, order=order, mode="nearest")


def undecided(places, near=1e-4):
    """Where rounding decides which voxel is the nearest, or whether a place is inside."""
    return (np.abs(places % 1 - 0.5) < near).any(0)


def inside(places, shape):
    return ((places > -0.5) & (places.T < np.array(shape) - 0.5).T).all(0)


# ---------------------------------------------------------------------------- exact copies


def test_identity_gives_the_exact_source_voxels():
    image, label = volume(), (volume(seed=1)[0] > 128).astype(np.uint8)
    (out, target, valid, _), place = make_patch(image, label, of(np.eye(3)), (4, 6, 7), (4, 6, 8))
    z, y, x = place.origin.astype(int)
    assert torch.equal(out, torch.from_numpy(image[:, z : z + 4, y : y + 6, x : x + 8]).float())
    assert np.array_equal(target[0].numpy(), label[z : z + 4, y : y + 6, x : x + 8])
    assert valid.all() and place.inside


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_every_flip_gives_the_exact_source_voxels(signs):
    image = volume()
    (out, _, valid, _), _ = make_patch(image, image[0], of(np.diag(signs)), (4, 6, 7), (4, 6, 8))
    axes = [a + 1 for a in range(3) if signs[a] < 0]
    # A center between voxels is rounded up or down; the voxels must be a flipped box of the source.
    found = out.flip(axes).numpy()[0]
    boxes = np.lib.stride_tricks.sliding_window_view(image[0], found.shape)
    assert (boxes == found).all(axis=(3, 4, 5)).any()
    assert valid.all() and out.shape == (1, 4, 6, 8)


@pytest.mark.parametrize("plane", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_give_the_exact_source_voxels(plane, quarters):
    image = volume((10, 10, 10))
    turn = of(np.round(augment.rotate_in(plane, quarters * np.pi / 2)))
    (out, _, valid, _), _ = make_patch(image, image[0], turn, (4.5, 4.5, 4.5), (10, 10, 10))
    # Patch voxel p shows the source at turn @ p: what is seen is turned the other way.
    assert np.array_equal(out[0].numpy(), np.rot90(image[0], -quarters, plane))
    assert valid.all()


def test_quarter_turn_of_an_uneven_patch_is_a_turned_box_of_the_source():
    image = volume((8, 20, 20))
    turn = np.round(augment.rotate_in((1, 2), np.pi / 2))
    (out, _, valid, _), place = make_patch(image, image[0], of(turn), (4, 10, 10), (4, 5, 8))
    for p in itertools.product(range(4), range(5), range(8)):
        z, y, x = (place.origin + turn @ p).astype(int)
        assert out[(0, *p)] == image[0, z, y, x]
    assert valid.all()


# ---------------------------------------------------------------------------- interpolation


@pytest.mark.parametrize("angle", [7, 30, 133])
def test_rotation_and_scaling_agree_with_scipy(angle):
    image = smooth((20, 24, 28))
    label = (image > 0).astype(np.uint8)
    matrix = augment.rotate_in((1, 2), np.radians(angle)) @ augment.rotate_in((0, 1), 0.2)
    matrix = matrix @ np.diag([0.8, 1.1, 0.9])
    patch = (7, 8, 9)
    (out, target, valid, _), place = make_patch(image[None], label, of(matrix), (10, 12, 14), patch)
    affine = {"offset": place.origin, "output_shape": patch, "mode": "nearest"}
    expected = ndimage.affine_transform(image, matrix, order=1, **affine)
    assert np.allclose(out[0].numpy(), expected, atol=2e-3)
    nearest = ndimage.affine_transform(label, matrix, order=0, **affine)
    differs = target[0].numpy() != nearest
    assert not (differs & ~undecided(places_of(of(matrix), place.origin, patch))).any()
    assert valid.all()


def test_target_spacing_agrees_with_resampling_the_whole_volume_and_cropping():
    image = smooth((16, 40, 40))
    source_spacing, spacing = (3.0, 1.0, 1.0), (2.0, 1.6, 1.6)
    ratio = np.array(spacing) / source_spacing
    whole = ndimage.affine_transform(image, ratio, output_shape=(23, 25, 25), order=1)
    patch, corner = (8, 9, 10), np.array([5, 6, 7])
    native = augment.sample_spatial_params(
        np.random.default_rng(0), source_spacing, spacing, patch=patch, settings=None
    )
    center = (corner + (np.array(patch) - 1) / 2) * ratio
    (out, *_), place = make_patch(image[None], np.ones_like(image, np.uint8), native, center, patch)
    assert np.allclose(place.origin, corner * ratio)
    assert np.allclose([native.matrix, native.upright], np.diag(ratio))
    z, y, x = corner
    assert np.allclose(out[0].numpy(), whole[z : z + 8, y : y + 9, x : x + 10], atol=2e-3)


@EVERY_CASE
def test_everything_at_once_agrees_with_scipy_on_the_whole_volume(case):
    shape, patch, source_spacing, spacing = case
    rng, image = np.random.default_rng(1), smooth(shape)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    for _ in range(12):
        mapping = wild(rng, source_spacing, spacing, patch=patch)
        center = rng.uniform(0, shape)
        patches, place = make_patch(image[None], label, mapping, center, patch, ignore_label=2)
        seen, target, valid, _ = patches
        places = places_of(mapping, place.origin, patch)
        assert np.allclose(seen[0].numpy(), sampled(image, places), atol=3e-3)
        nearest, decided = sampled(label, places, order=0), ~undecided(places)
        labeled = inside(places, shape) & (nearest != 2)
        assert np.array_equal(valid[0].numpy()[decided], labeled[decided])
        assert np.array_equal(target[0].numpy()[decided], (labeled & (nearest == 1))[decided])


def test_channels_are_drawn_at_the_same_places():
    image, mapping = smooth((20, 20, 20))[None], wild(np.random.default_rng(2), patch=(6, 7, 8))
    both, label = np.concatenate([image, 3 * image]), np.ones((20, 20, 20), np.uint8)
    (patch_image, *_), _ = make_patch(both, label, mapping, (9, 9, 9), (6, 7, 8))
    assert torch.allclose(patch_image[1], 3 * patch_image[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float64])
def test_the_image_is_drawn_from_any_dtype_as_float32(dtype):
    image, label = volume((10, 12, 14)), volume((10, 12, 14), seed=1)[0]
    for mapping in (of(np.eye(3)), of(0.9 * np.eye(3))):
        (expected, *_), _ = make_patch(
            image.astype(np.float32), label, mapping, (5, 6, 7), (4, 5, 6)
        )
        (found, *_), _ = make_patch(image.astype(dtype), label, mapping, (5, 6, 7), (4, 5, 6))
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("copied", [True, False])
def test_the_target_is_a_mask_for_each_region_or_the_number_of_the_class(copied):
    shape = (9, 12, 15)
    image = np.ones((1, *shape), np.float32)
    label = np.random.default_rng(3).choice([0, 3, 7, 9, 255], size=shape).astype(np.uint8)
    skeleton = np.random.default_rng(4).integers(0, 2, shape).astype(np.uint8)
    at = image, label, of(np.eye(3) if copied else 0.9 * np.eye(3)), (5, 6, 7), (4, 5, 6)

    def target_of(regions, **more):
        how = {"skeleton": skeleton, "ignore_label": 255, "regions": regions}
        (_, target, valid, tube), _ = make_patch(*at, **how, **more)
        return target, valid, tube

    alone = {i: target_of([[i]]) for i in (3, 7, 9)}
    regions, valid, tube = target_of([[3, 7], [7]])
    assert torch.equal(regions, torch.cat([alone[3][0] + alone[7][0], alone[7][0]]))
    classes, _, tube_of_classes = target_of([[7], [3]], exclusive=True)
    assert torch.equal(classes, alone[7][0] + 2 * alone[3][0]) and classes.max() == 2
    assert all(torch.equal(valid, other) for _, other, _ in alone.values())
    assert torch.equal(tube, alone[3][2] + alone[7][2]) and torch.equal(tube, tube_of_classes)


def test_a_volume_without_a_label_gives_no_target_and_nothing_valid():
    place = resample.place_patch(of(np.eye(3)), (2, 2, 2), (3, 3, 3), (5, 5, 5))
    geometry = {**of(np.eye(3))._asdict(), **place._asdict(), "shape": (5, 5, 5)}
    image, target, valid, skeleton = resample.resample_patch(
        torch.ones(2, 3, 3, 3),
        None,
        geometry=geometry,
        patch=(3, 3, 3),
        regions=[[1]],
        ignore_label=2,
    )
    assert image.shape == (2, 3, 3, 3) and target.shape == valid.shape == (1, 3, 3, 3)
    assert not target.any() and not valid.any() and skeleton is None


# ---------------------------------------------------------------------------- borders of classes


def half_space(rng, size):
    """A signed distance in voxels, (3, ...) to (...): below 0 inside; and how far it may be off.

    A resampled voxel takes the class of the voxel whose center is nearest: at most half a voxel
    away along each axis. Over such a step the distance to a plane of unit normal n changes by
    at most |n|_1 / 2 (half a voxel along an axis), and any distance by at most sqrt(3) / 2.
    """
    normal = rng.normal(size=3) * rng.integers(0, 2, 3)
    normal = normal / np.linalg.norm(normal) if normal.any() else np.eye(3)[rng.integers(3)]
    through = size / 2 + rng.uniform(-2, 2, 3)
    return lambda p: np.tensordot(normal, p, 1) - normal @ through, np.abs(normal).sum() / 2


def ball(rng, size):
    center, radius = size / 2 + rng.uniform(-1, 1, (3, 1, 1, 1)), rng.uniform(4, 7)
    return lambda p: np.linalg.norm(p - center, axis=0) - radius, np.sqrt(3) / 2


def tube(rng, size):
    along, radius = rng.normal(size=3), rng.uniform(2, 5)
    along, center = along / np.linalg.norm(along), size / 2 + rng.uniform(-1, 1, (3, 1, 1, 1))

    def distance(p):
        across = p - center
        across = across - along[:, None, None, None] * np.tensordot(along, across, 1)
        return np.linalg.norm(across, axis=0) - radius

    return distance, np.sqrt(3) / 2


@pytest.mark.parametrize("shape", [half_space, ball, tube])
def test_drawn_labels_agree_with_the_true_shape_within_half_a_voxel(shape):
    rng, size, patch = np.random.default_rng(4), 28, (14, 14, 14)
    surplus, near = 0, 0
    for _ in range(100):
        sdf, reach = shape(rng, size)
        label = (sdf(np.indices((size,) * 3).astype(float)) < 0).astype(np.uint8)
        spacing = rng.uniform(0.7, 1.3, 3)
        mapping = wild(rng, CUBE, spacing, patch=patch, elastic=0.7)
        (_, target, valid, _), place = make_patch(
            label[None], label, mapping, size / 2 + rng.uniform(-3, 3, 3), patch
        )
        away = sdf(places_of(mapping, place.origin, patch))
        seen, valid = target[0].numpy() > 0, valid[0].numpy()
        wrong = (seen != (away < 0)) & valid
        assert not (wrong & (np.abs(away) > reach + 1e-4)).any()
        surplus += int(seen[valid].sum()) - int((away < 0)[valid].sum())
        near += int((np.abs(away[valid]) < 0.5).sum())
    # Resampled voxels within half a voxel of the border are a layer of thickness 1, so the surplus
    # over their number is how far the border lies outside the true one on average, in voxels. That
    # of planes along an axis is anywhere within half a voxel, for each patch: an error of 0.02.
    assert near > 10_000 and abs(surplus / near) < 0.05


# ---------------------------------------------------------------------------- valid


def test_outside_the_volume_is_invalid_and_repeats_the_border():
    image = volume((5, 8, 8))
    (out, _, valid, _), place = make_patch(image, image[0], of(np.eye(3)), (2, 4, 4), (9, 8, 8))
    assert valid[0, 2:7].all() and not valid[0, :2].any() and not valid[0, 7:].any()
    assert torch.equal(out[0, 0], torch.from_numpy(image[0, 0]).float())
    assert torch.equal(out[0, -1], torch.from_numpy(image[0, -1]).float())
    assert not place.inside


def test_unlabeled_voxels_are_invalid_and_no_target_whatever_the_map():
    image, label = volume((12, 12, 12)), np.zeros((12, 12, 12), np.uint8)
    label[:, :, 6:] = 2
    label[:, 4:8, :6] = 1
    for angle in (0.0, 0.4):
        matrix = augment.rotate_in((1, 2), angle)
        (_, target, valid, _), place = make_patch(
            image, label, of(matrix), (5.5, 5.5, 5.5), (6, 6, 6), ignore_label=2
        )
        places = place.origin + np.indices((6, 6, 6)).reshape(3, -1).T @ matrix.T
        right = places[:, 2] > 5.5 + 1e-6
        assert not valid.flatten().numpy()[right].any()
        assert valid.flatten().numpy()[places[:, 2] < 5.5 - 1e-6].all()
        assert not (target.bool() & ~valid).any() and target.any()


@pytest.mark.parametrize("elastic", [0.0, 1.0])
def test_valid_ends_at_the_faces_of_the_volume_at_every_corner(elastic):
    shape, patch, rng = (14, 17, 16), (8, 9, 10), np.random.default_rng(5)
    label, cut = np.ones(shape, np.uint8), 0
    for corner in itertools.product(*((0, n - 1) for n in shape)):
        for _ in range(8):
            mapping = wild(rng, patch=patch, elastic=elastic)
            (_, target, valid, _), place = make_patch(label[None], label, mapping, corner, patch)
            places = places_of(mapping, place.origin, patch)
            expected, decided = inside(places, shape), ~undecided(places)
            assert np.array_equal(valid[0].numpy()[decided], expected[decided])
            assert torch.equal(target.bool(), valid)
            assert not place.inside or valid.all()
            cut += not expected.all()
    assert cut > 32  # of 64: patches that do hang over


def test_inside_is_true_where_a_patch_fits_and_only_there():
    rng, patch, answers = np.random.default_rng(6), (8, 8, 8), set()
    for _ in range(200):
        mapping = wild(rng, patch=patch, elastic=float(rng.integers(2)))
        place = resample.place_patch(mapping, rng.uniform(0, 20, 3), patch, (20, 20, 20))
        fits = inside(places_of(mapping, place.origin, patch), (20, 20, 20)).all()
        assert fits or not place.inside
        assert place.inside or mapping.control is not None or not fits
        answers.add(place.inside)
    assert answers == {False, True}


# ---------------------------------------------------------------------------- the box


def test_patches_stay_inside_where_they_can_and_are_centerd_where_they_cannot():
    for center in ((0, 0, 0), (99, 99, 4)):
        origin, start, stop, fits = resample.place_patch(
            of(np.eye(3)), center, (16, 16, 16), (100, 100, 5)
        )
        assert (origin[:2] >= 0).all() and (origin[:2] + 16 <= 100).all()
        assert origin[2] in (-6, -5) and (start[2], stop[2]) == (0, 5) and not fits


@EVERY_CASE
@pytest.mark.parametrize("elastic", [0.0, 1.0])
def test_the_box_is_what_the_interpolation_needs_and_little_more(case, elastic):
    shape, patch, source_spacing, spacing = case
    rng = np.random.default_rng(7)
    for _ in range(40):
        mapping = wild(
            rng,
            source_spacing,
            spacing,
            patch=patch,
            elastic=elastic,
            elastic_spacing=rng.uniform(3, 30),
            elastic_amplitude_range=(0.0, 4.0),
        )
        place = resample.place_patch(mapping, rng.uniform(0, shape), patch, shape)
        places = places_of(mapping, place.origin, patch).reshape(3, -1)
        last = np.array(shape) - 1
        first_needed = np.clip(np.floor(places.min(1) + 1e-5), 0, last)
        last_needed = np.clip(np.ceil(places.max(1) - 1e-5), 0, last)
        assert (place.start <= first_needed).all() and (place.stop > last_needed).all()
        assert (place.start >= first_needed - 3 * elastic).all()
        assert (place.stop - 1 <= last_needed + 3 * elastic).all()
        assert (place.start >= 0).all() and (place.stop <= shape).all()


# ---------------------------------------------------------------------------- roll


@pytest.mark.parametrize("copied", [True, False])
def test_image_target_valid_and_skeleton_roll_together(copied):
    rng, shape, patch = np.random.default_rng(8), (7, 16, 16), (10, 8, 8)
    image, label = smooth(shape)[None], rng.integers(0, 3, shape).astype(np.uint8)
    skeleton = rng.integers(0, 2, shape).astype(np.uint8)
    still = of(np.eye(3)) if copied else wild(rng, patch=patch)
    for roll in (0, 1, 7, 9):
        straight, rolled = (
            make_patch(image, label, m, (3, 8, 8), patch, ignore_label=2, skeleton=skeleton)[0]
            for m in (still._replace(roll=0), still._replace(roll=roll))
        )
        for before, after in zip(straight, rolled, strict=True):
            assert np.array_equal(after.numpy(), np.roll(before.numpy(), roll, axis=1))
    assert straight[3].any() and not straight[2].all()


def test_slices_that_are_not_turned_are_not_blended_with_their_neighbours():
    rng = np.random.default_rng(0)
    image = np.zeros((9, 20, 20), np.float32)
    image[::2] = 100
    for _ in range(10):
        turn = np.eye(3)
        angle = rng.uniform(0.1, 1.4)
        turn[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        mapping = resample.Map(turn, np.eye(3))
        center = rng.uniform(3, 6), rng.uniform(8, 12), rng.uniform(8, 12)
        place = resample.place_patch(mapping, center, (4, 6, 6), image.shape)
        box = tuple(slice(a, b) for a, b in zip(place.start, place.stop, strict=True))
        found, *_ = resample.resample_patch(
            torch.from_numpy(image[box])[None],
            None,
            geometry={**mapping._asdict(), **place._asdict(), "shape": image.shape},
            patch=(4, 6, 6),
            regions=[[1]],
            ignore_label=None,
        )
        assert np.isin(found.numpy().round(3), (0, 100)).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("below", [2e-6, 3e-6, 1e-5, 1e-4, 2e-3])
def test_a_patch_that_ends_at_a_face_takes_the_last_voxels_there(axis, below):
    # In a box of 64 voxels and more, float32 takes a place so close to the face beyond it.
    plane = [1, 2] if axis else [0, 1]
    turn = np.eye(3)
    turn[np.ix_(plane, plane)] = [[0.8, -0.6], [0.6, 0.8]]
    shape, patch = (160, 160, 160), tuple(80 if a in plane else 3 for a in range(3))
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n - 2, n) if a == axis else slice(None) for a, n in enumerate(shape))] = 1
    mapping = resample.Map(turn, np.eye(3) * 1e-9)  # takes no room: it is not moved inside
    center = np.full(3, 80.0)
    center[axis] = shape[axis] - 0.5 - below - (np.abs(turn) @ ((np.array(patch) - 1) / 2))[axis]
    place = resample.place_patch(mapping, center, patch, shape)
    box = tuple(slice(a, b) for a, b in zip(place.start, place.stop, strict=True))
    _, target, valid, _ = resample.resample_patch(
        torch.from_numpy(label[box].astype(np.float32))[None],
        torch.from_numpy(label[box]),
        geometry={**mapping._asdict(), **place._asdict(), "shape": shape},
        patch=patch,
        regions=[[1]],
        ignore_label=None,
    )
    places = np.indices(patch).reshape(3, -1).T @ turn.T + place.origin
    last = places[:, axis] > shape[axis] - 1.5 - 1e-3  # nearest to the last two layers
    found = target.numpy().reshape(-1) > 0
    inside = valid.numpy().reshape(-1)
    assert (found | ~inside)[last].all() and last.any()
    assert inside[places.max(axis=1) < 159.4].all()
