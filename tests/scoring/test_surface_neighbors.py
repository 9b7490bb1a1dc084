"""Nearest corners by each of the ways to them, against all pairs of corners."""

import numpy as np
import pytest
from scipy import spatial

from scoring import surface
from scoring.surface import extract, is_mixed, nearest_distances

WAYS = {
    "as chosen": {},
    "rows": {"_VOXELS_PER_QUERY": 0, "_ROWS_PER_VOXEL": 10**9},
    "a few rows": {"_VOXELS_PER_QUERY": 0, "_ROWS_PER_VOXEL": 0.05},
    "rows of a few corners": {"_VOXELS_PER_QUERY": 0, "_SLAB": 50},
    "tree": {"_VOXELS_PER_QUERY": 0, "_ROWS_PER_VOXEL": 0},
    "transform": {"_VOXELS_PER_QUERY": 10**9, "_ROWS_PER_VOXEL": 0},
}
SPACINGS = [(1.0, 1.0, 1.0), (2.5, 1.0, 0.4), (0.3, 0.7, 3.0), (40.0, 1.0, 1.0)]


def by_all_pairs(own, other, spacing):
    z, y, x = np.moveaxis((own[:, None] - other) * spacing, -1, 0)
    return np.sqrt((z**2 + y**2) + x**2).min(axis=1)


def far_apart(rng):
    """A crowd of voxels in a corner, and a few anywhere."""
    crowd, few = np.zeros((2, 9, 30, 150), bool)
    crowd[:, :4, :6] = rng.random((9, 4, 6)) < 0.5
    few[tuple(rng.integers(0, few.shape, (5, 3)).T)] = True
    return crowd, few


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_corner_gets_its_nearest_one_exactly(way, spacing, monkeypatch):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(surface, name, value)
    rng = np.random.default_rng(0)
    for _ in range(3):
        pair = [extract(mask) for mask in far_apart(rng)]
        places = [np.argwhere(is_mixed(found.codes)) for found in pair]
        for own, other in ((0, 1), (1, 0)):
            found = nearest_distances(pair[own], pair[other], spacing)
            expected = by_all_pairs(places[own], places[other], np.array(spacing))
            np.testing.assert_array_equal(found, expected)


def test_most_of_a_far_surface_is_settled_by_rows(monkeypatch):
    asked = []
    monkeypatch.setattr(surface, "_by_tree", lambda ours, *_: asked.append(len(ours)) or 0)
    near, far = np.zeros((2, 60, 60, 60), bool)
    near[10, 10:13, 10:13] = far[30, 10:13, 10:13] = True  # 19 to 21 slices apart
    found = nearest_distances(extract(near), extract(far), (1.0, 1.0, 1.0))
    assert not asked
    assert sorted(set(found)) == [19.0, 20.0]


@pytest.mark.parametrize(
    ("places", "spacing"),
    [
        # 32 corners ahead is the first that a word does not show; 32.8 off in another row is shown.
        ([(0, 40, 40), (0, 40, 73), (0, 73, 48)], (40.0, 1.0, 1.0)),
        # 50 rows aside, of 0.3, is more than rows are asked for; 5 corners ahead, of 5, is not.
        ([(0, 0, 0), (0, 51, 0), (0, 0, 6)], (1.0, 0.3, 5.0)),
    ],
    ids=["beyond the word", "beyond the rows"],
)
def test_what_rows_do_not_show_is_asked_elsewhere(places, spacing):
    own, other = np.zeros((2, 1, 80, 80), bool)
    own[places[0]] = other[places[1]] = other[places[2]] = True
    pair = [extract(mask) for mask in (own, other)]
    corners = [np.argwhere(is_mixed(found.codes)) for found in pair]
    expected = by_all_pairs(*corners, np.array(spacing))
    np.testing.assert_array_equal(nearest_distances(*pair, spacing), expected)


def test_steps_to_the_nearest_1_of_a_window():
    bits = [(32,), (33, 30), (29, 37), (0,), (63,), (), (31,), (0, 63)]
    windows = np.array([sum(1 << bit for bit in places) for places in bits], np.uint64)
    found = surface._steps_to_one(windows).tolist()
    assert found[:5] == [0, 1, 3, 32, 31]
    assert found[5] > surface._HALF
    assert found[6:] == [1, 31]


def test_windows_start_at_any_bit():
    row = np.random.default_rng(0).integers(0, 2, 192).astype(np.uint8)
    words = np.packbits(row, bitorder="little").view("<u8")
    starts = np.arange(129)
    place, shift = np.divmod(starts, 64)
    words = np.append(words, np.uint64(0))
    found = surface._windows(words, place, shift.astype(np.uint64))
    bits = np.unpackbits(found.view(np.uint8), bitorder="little").reshape(-1, 64)
    np.testing.assert_array_equal(bits, [row[start : start + 64] for start in starts])


def test_a_tree_of_the_corners_says_the_same_of_random_masks():
    rng = np.random.default_rng(1)
    for _ in range(5):
        pair = [extract(rng.random((20, 21, 70)) < share) for share in (0.02, 0.0005)]
        places = [np.argwhere(is_mixed(found.codes)) for found in pair]
        spacing = rng.uniform(0.3, 3.0, 3)
        expected, _ = spatial.cKDTree(places[1] * spacing).query(places[0] * spacing)
        found = nearest_distances(*pair, tuple(spacing))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
