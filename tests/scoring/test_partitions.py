"""Components and the variation of information: cases worked out by hand, and scikit-image's."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import variation_of_information as reference

from scoring import partitions
from scoring.partitions import count_components, partition, variation_of_information, voi_score


def row(text):
    """A mask of one row: # is foreground."""
    return np.array([c == "#" for c in text]).reshape(1, 1, -1)


def entropy(*counts):
    return sum(n / sum(counts) * math.log2(sum(counts) / n) for n in counts)


def information(prediction, truth):
    return partition(row(prediction), row(truth)).variation_of_information()


# ---------------------------------------------------------------------------- by hand


def test_a_broken_bar_is_split_and_not_merged():
    # Of the 8 voxels of the bar 3 and 4 are in the pieces, 1 in the gap.
    split, merge = information("..###.####..", "..########..")
    assert split == pytest.approx(entropy(3, 4, 1))
    assert merge == 0.0


def test_two_touching_bars_are_merged_and_not_split():
    split, merge = information("..########..", "..###.####..")
    assert split == 0.0
    assert merge == pytest.approx(entropy(3, 4, 1))


def test_bars_at_the_same_place_cost_nothing_whatever_their_order():
    assert information("##..###.#", "##..###.#") == (0.0, 0.0)
    assert variation_of_information([1, 1, 2, 2, 3], [2, 2, 3, 3, 1]) == (0.0, 0.0)


def test_independent_halves_cost_a_bit_each_way():
    assert variation_of_information([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx((1.0, 1.0))


def test_the_score_falls_with_the_sum_of_both():
    assert voi_score(0.0, 0.0) == 1.0
    assert voi_score(1.0, 2.0) == voi_score(3.0, 0.0) == pytest.approx(1 / 1.9)


def test_components_touch_as_the_connectivity_says():
    mask = np.zeros((2, 2, 5), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True  # over a corner
    mask[0, 0, 4] = mask[0, 1, 4] = True  # over a face
    assert count_components(mask, 26) == 2
    assert count_components(mask, 6) == 3
    found = partition(mask, np.zeros_like(mask))
    assert (found.predicted, found.true) == (2, 0)


@pytest.mark.parametrize("shape", [(7, 1, 1), (1, 1, 7), (3, 3, 1), (1, 3, 3), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("connectivity", [6, 26])
def test_every_mask_of_a_thin_volume_has_its_components(shape, connectivity):
    touching = ndimage.generate_binary_structure(3, 1 if connectivity == 6 else 3)
    for bits in itertools.product([False, True], repeat=math.prod(shape)):
        mask = np.array(bits).reshape(shape)
        expected, count = ndimage.label(mask, touching)
        labels, found = partitions.label(mask, connectivity)
        assert found == count
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    "shape", [(1, 31, 33), (33, 1, 6), (3, 3, 3), (3, 5, 9), (5, 5, 5)], ids=str
)
def test_as_many_components_as_a_volume_can_hold(shape):
    mask = np.zeros(shape, bool)
    mask[::2, ::2, ::2] = True
    assert count_components(mask) == mask.sum()


# ---------------------------------------------------------------------------- degenerate


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("....", "....", (0.0, 0.0)),
        ("....", "####", (0.0, 0.0)),  # one component on either side
        ("####", "....", (0.0, 0.0)),
        ("....", "#..#", (0.0, 1.0)),  # of two, undivided
        ("#..#", "....", (1.0, 0.0)),
        ("####", "####", (0.0, 0.0)),
        ("#", "#", (0.0, 0.0)),
    ],
)
def test_degenerate_masks(prediction, truth, expected):
    assert information(prediction, truth) == pytest.approx(expected)


def test_no_labels_cost_nothing():
    assert variation_of_information(np.zeros(0, int), np.zeros(0, int)) == (0.0, 0.0)


# ---------------------------------------------------------------------------- references


@pytest.mark.parametrize("cells_per_voxel", [0, partitions._CELLS_PER_VOXEL, 10**6])
def test_information_agrees_with_scikit_image(cells_per_voxel, monkeypatch):
    monkeypatch.setattr(partitions, "_CELLS_PER_VOXEL", cells_per_voxel)  # 0: sorted; 10^6: counted
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(30):
        shape = rng.integers(2, 14, 3)
        prediction, truth = (
            ndimage.gaussian_filter(rng.normal(size=shape), 0.7) > 0.2 for _ in range(2)
        )
        labels = [ndimage.label(mask, np.ones((3, 3, 3)))[0] for mask in (prediction, truth)]
        predicted, true = (found[prediction | truth] for found in labels)
        found = partition(prediction, truth)
        expected = reference(true, predicted) if true.size else (0.0, 0.0)
        assert found.variation_of_information() == pytest.approx(tuple(expected), abs=1e-9)
        assert (found.predicted, found.true) == tuple(int(labels[i].max()) for i in (0, 1))
        seen.append(expected)
    assert (np.std(seen, axis=0) > 0.1).all()
