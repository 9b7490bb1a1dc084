"""Phantoms: seeded, of any shape, fair to a network and unfair to a threshold."""

import math

import numpy as np
import pytest
from scipy import ndimage
from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances

from volumes.phantoms import (
    CLASSES,
    PHANTOMS,
    arteries_veins,
    scroll,
    smooth_field,
    spinal_cord,
    vessels,
)

SHAPES = [(10, 64, 64), (24, 96, 96), (17, 33, 40), (3, 5, 5)]


def otsu(image):
    """The threshold that maximises the variance between the two classes, from its definition."""
    counts = np.bincount(image, minlength=256) / image.size
    levels, best = np.arange(256), (0.0, 0)
    for cut in range(1, 256):
        low, high = counts[:cut].sum(), counts[cut:].sum()
        if low > 0 and high > 0:
            gap = (levels[:cut] @ counts[:cut]) / low - (levels[cut:] @ counts[cut:]) / high
            best = max(best, (low * high * gap**2, cut))
    return best[1]


def surface_dice(mask, truth, spacing, tolerance=2.0):
    distances = compute_surface_distances(truth, mask, spacing)
    return compute_surface_dice_at_tolerance(distances, tolerance)


@pytest.mark.parametrize("kind", PHANTOMS)
def test_the_same_seed_and_index_give_the_same_voxels(kind):
    first, again = (PHANTOMS[kind]((12, 40, 40), 3, 1) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)
    for seed, index in ((3, 2), (4, 1)):
        assert not np.array_equal(first.label, PHANTOMS[kind]((12, 40, 40), seed, index).label)


@pytest.mark.parametrize("kind", PHANTOMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_gives_uint8_volumes_of_that_shape(kind, shape):
    phantom = PHANTOMS[kind](shape, 0, 0)
    for volume in (phantom.image, phantom.label):
        assert volume.shape == shape
        assert volume.dtype == np.uint8


@pytest.mark.parametrize("kind", PHANTOMS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_no_phantom_of_usable_size_is_empty(kind, shape):
    for index in range(5):
        share = (PHANTOMS[kind](shape, 0, index).label == 1).mean()
        assert 0.003 < share < 0.3, (index, share)


def test_a_quarter_to_a_half_of_a_scroll_is_unlabeled_and_no_vessel_is():
    for index in range(4):
        assert 0.25 <= (scroll((20, 48, 48), 0, index).label == 2).mean() <= 0.55
    assert vessels((10, 40, 40), 0, 0).label.max() == 1


@pytest.mark.filterwarnings("ignore:.*namespace:DeprecationWarning")
@pytest.mark.parametrize("kind", PHANTOMS)
def test_otsu_scores_badly_on_the_surface(kind):
    for index in range(2):
        phantom = PHANTOMS[kind]((96, 96, 96) if kind == "scroll" else (48, 96, 96), 0, index)
        valid = phantom.label != phantom.ignore_label
        mask = (phantom.image >= otsu(phantom.image[valid])) & valid
        structure = valid & (phantom.label > 0)
        assert surface_dice(mask, structure, phantom.spacing) < 0.6


@pytest.mark.parametrize("kind", PHANTOMS)
def test_the_structure_is_brighter_than_what_surrounds_it(kind):
    phantom = PHANTOMS[kind]((48, 64, 64), 1, 0)
    valid = phantom.label != phantom.ignore_label
    structure = valid & (phantom.label > 0)
    image = phantom.image.astype(np.float32)
    local = image - ndimage.gaussian_filter(image, 6)
    noise = local[valid & ~structure].std()
    assert local[structure].mean() - local[valid & ~structure].mean() > 0.8 * noise


def test_sheets_are_about_three_voxels_thick():
    label = scroll((64, 64, 64), 0, 0).label
    depth = ndimage.distance_transform_edt(label == 1)
    # In a slab of 3 voxels the middle lies 2 from the outside, in two that touch at most 4.
    assert 1.5 < np.percentile(depth[label == 1], 95) <= 4


def test_a_vessel_tree_is_in_one_piece():
    for index in range(3):
        label = vessels((10, 64, 64), 0, index).label
        _, pieces = ndimage.label(label, np.ones((3, 3, 3)))
        # One tree; a branch that leaves the volume may come back.
        assert 1 <= pieces <= 3


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_every_class_of_a_phantom_is_in_every_case_of_usable_size(kind, shape):
    ids = set(CLASSES[kind].values())
    assert all(set(np.unique(PHANTOMS[kind](shape, 0, index).label)) == ids for index in range(5))


def test_arteries_are_brighter_and_thinner_than_veins_and_a_nerve_is_rare_and_brightest():
    shares, greys, depths = np.zeros(4), np.zeros(4), np.zeros(4)
    for index in range(3):
        phantom = arteries_veins((32, 80, 80), 0, index)
        image = phantom.image - ndimage.gaussian_filter(phantom.image.astype(np.float32), 12)
        for i in range(1, 4):
            mask = phantom.label == i
            shares[i] += mask.mean() / 3
            greys[i] += image[mask].mean() / 3
            away = ndimage.distance_transform_edt(mask, sampling=phantom.spacing)
            depths[i] += np.percentile(away[mask], 90) / 3
    assert greys[3] > greys[1] > 1.5 * greys[2] > 0
    assert depths[2] > 1.2 * depths[1]
    assert 0.0005 < shares[3] < 0.2 * shares[1]


def test_grey_matter_lies_within_white_matter_and_is_darker():
    for index in range(3):
        phantom = spinal_cord((24, 64, 64), 0, index)
        cord, grey = phantom.label > 0, phantom.label == 2
        assert ndimage.label(cord)[1] == 1
        assert not (ndimage.binary_dilation(grey, np.ones((1, 3, 3))) & ~cord).any()
        assert 0.15 < grey.sum() / cord.sum() < 0.6
        image = phantom.image.astype(np.float32)
        assert image[phantom.label == 1].mean() > 1.1 * image[grey].mean()


def test_smooth_field_has_unit_variance_and_its_grain():
    rng = np.random.default_rng(0)
    field = smooth_field((40, 120, 120), (4, 8, 8), rng)
    assert field.shape == (40, 120, 120)
    assert math.isclose(float(field.std()), 1, rel_tol=0.1)
    near = np.corrcoef(field[:, :, 1:].ravel(), field[:, :, :-1].ravel())[0, 1]
    far = np.corrcoef(field[:, :, 40:].ravel(), field[:, :, :-40].ravel())[0, 1]
    assert near > 0.95
    assert abs(far) < 0.1
