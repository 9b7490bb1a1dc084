"""Pieces, handles and cavities drawn by hand, against gudhi, and as published."""

import gudhi
import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import euler_number

from scoring import homology
from scoring.homology import betti_matching, betti_numbers, matching_f1, toposcore
from scoring.surface import extract


def drawn(*planes):
    """A mask of these planes, each a text of rows: # is foreground."""
    return np.array([[[c == "#" for c in line] for line in text.split()] for text in planes])


BAR = drawn("......... .#######. .........")
BROKEN_BAR = drawn("......... .###.###. .........")
RING = drawn("..... .###. .#.#. .###. .....")
BROKEN_RING = drawn("..... .###. .#... .###. .....")
HOLLOW_BALL = drawn("### ### ###", "### #.# ###", "### ### ###")
CORNER_TO_CORNER = drawn("##... ##... ..... .....", "..... ..... ..##. ..##.")
PINHOLE_SHEET = drawn("##### ##### ##.## #####")
ONE_VOXEL, FULL, EMPTY = drawn("#"), np.ones((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
TWO_RINGS = drawn("####### #.#.#.# #######")  # three holes in a row


# ---------------------------------------------------------------------------- Betti numbers


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (BAR, (1, 0, 0)),
        (BROKEN_BAR, (2, 0, 0)),
        (RING, (1, 1, 0)),
        (BROKEN_RING, (1, 0, 0)),
        (HOLLOW_BALL, (1, 0, 1)),
        (PINHOLE_SHEET, (1, 1, 0)),
        (TWO_RINGS, (1, 3, 0)),
        (ONE_VOXEL, (1, 0, 0)),
        (FULL, (1, 0, 0)),
        (EMPTY, (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("connectivity", [6, 26])
def test_betti_numbers_of_known_shapes(mask, expected, connectivity):
    assert betti_numbers(mask, connectivity) == expected


def test_touching_over_a_corner_is_touching_for_26_only():
    assert betti_numbers(CORNER_TO_CORNER, 6) == (2, 0, 0)
    assert betti_numbers(CORNER_TO_CORNER, 26) == (1, 0, 0)


def test_a_ring_closed_over_edges_is_a_ring_for_26_only():
    diamond = drawn("..#.. .#.#. ..#..")
    assert betti_numbers(diamond, 6) == (4, 0, 0)
    assert betti_numbers(diamond, 26) == (1, 1, 0)


def test_a_hollow_that_opens_over_an_edge_is_a_cavity_for_26_only():
    # The background of a 6-connected foreground is 26-connected: it leaks where edges are missing.
    ball = HOLLOW_BALL.copy()
    ball[0, 0, 1] = False
    assert betti_numbers(ball, 26) == (1, 0, 1)
    assert betti_numbers(ball, 6)[2] == 0


def test_outside_of_the_volume_is_background():
    tube = np.zeros((4, 3, 3), bool)
    tube[:] = HOLLOW_BALL[1]  # open at both ends of the volume
    assert betti_numbers(tube) == (1, 1, 0)


def test_betti_numbers_agree_with_gudhi_and_with_euler_characteristics():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        mask = rng.random(rng.integers(1, 9, 3)) < rng.uniform(0.1, 0.9)
        for connectivity, cells in ((6, "vertices"), (26, "top_dimensional_cells")):
            field = np.where(np.pad(mask, 1), 0.0, 1.0)
            pairs = gudhi.CubicalComplex(**{cells: field}).persistence() if mask.any() else []
            alive = [dim for dim, (birth, death) in pairs if birth == 0 < death]
            found = betti_numbers(mask, connectivity)
            assert found == tuple(alive.count(dim) for dim in range(3))
            euler = homology.euler_characteristic(extract(mask).histogram, connectivity)
            assert euler == euler_number(mask, connectivity=1 if connectivity == 6 else 3)
            seen.add(found)
    assert len(seen) > 30


def test_what_is_known_already_is_not_worked_out_again(monkeypatch):
    known = {"histogram": extract(RING).histogram, "components": 1}
    monkeypatch.setattr(homology, "extract", None)
    assert betti_numbers(RING, **known) == (1, 1, 0)


def test_what_is_no_mask_is_refused():
    with pytest.raises(ValueError, match=r"a connectivity of 6 or 26, got \(3, 4, 5\) and 18"):
        betti_numbers(FULL, 18)
    with pytest.raises(ValueError, match=r"a mask \(D, H, W\) .* got \(3, 4\) and 26"):
        betti_numbers(FULL[..., 0], 26)
    with pytest.raises(ValueError, match=r"of one shape \(D, H, W\), got \(3, 4, 5\) and \(1, 1"):
        betti_matching(FULL, ONE_VOXEL)


# ---------------------------------------------------------------------------- Betti matching


def placed(*masks, shape=(7, 11, 11)):
    """Masks at (z, y, x) in an empty volume."""
    volume = np.zeros(shape, bool)
    for (z, y, x), mask in masks:
        depth, height, width = mask.shape
        volume[z : z + depth, y : y + height, x : x + width] |= mask
    return volume


def test_a_ring_matches_itself_and_no_ring_elsewhere():
    here, there = placed(((1, 0, 0), RING)), placed(((5, 6, 6), RING))
    assert betti_matching(here, here)[1] == (1, 1, 1)
    assert betti_matching(here, there)[1] == (0, 1, 1)
    assert betti_matching(here, here | there)[1] == (1, 1, 2)


def test_a_ring_matches_a_thicker_one_around_the_same_hole():
    thick = ndimage.binary_dilation(placed(((3, 3, 3), RING)), np.ones((3, 1, 1)))
    assert betti_matching(placed(((3, 3, 3), RING)), thick)[1] == (1, 1, 1)


def test_a_broken_ring_is_a_ring_missed():
    found = betti_matching(placed(((3, 3, 3), BROKEN_RING)), placed(((3, 3, 3), RING)))
    assert found == {0: (0, 0, 0), 1: (0, 0, 1), 2: (0, 0, 0)}


def test_a_pinhole_is_a_ring_too_many():
    sheet = np.ones((1, 4, 5), bool)
    assert betti_matching(placed(((3, 3, 3), PINHOLE_SHEET)), placed(((3, 3, 3), sheet))) == {
        0: (0, 0, 0), 1: (0, 1, 0), 2: (0, 0, 0),
    }  # fmt: skip


def test_a_hollow_ball_matches_one_with_a_thicker_wall_and_no_full_one():
    hollow, thick = np.ones((7, 7, 7), bool), np.ones((7, 7, 7), bool)
    hollow[1:6, 1:6, 1:6] = thick[2:5, 2:5, 2:5] = False
    assert betti_matching(hollow, thick)[2] == (1, 1, 1)
    assert betti_matching(hollow, np.ones_like(hollow))[2] == (0, 1, 0)


def test_of_several_pieces_all_but_one_count():
    # Bars at three places; the prediction has the first two and one elsewhere.
    places = [(0, 0, 0), (0, 5, 0), (5, 0, 0), (5, 8, 0)]
    bars = [placed((place, BAR)) for place in places]
    found = betti_matching(bars[0] | bars[1] | bars[3], bars[0] | bars[1] | bars[2])
    assert found[0] == (1, 2, 2)
    assert betti_matching(bars[0], bars[0] | bars[1])[0] == (0, 0, 1)


def test_a_broken_bar_in_its_tiles_is_whole():
    # Cut in the middle, where it is broken: each tile has one piece, which counts nowhere.
    found = betti_matching(BROKEN_BAR, BAR, tiles=(1, 1, 2))
    assert found == dict.fromkeys(range(3), (0, 0, 0))
    assert betti_matching(BROKEN_BAR, BAR)[0] == (0, 1, 0)


def test_the_first_tiles_are_the_larger_ones():
    spans = [
        [(side.start, side.stop) for side in tile] for tile in homology._tiles((5, 4, 1), (2,) * 3)
    ]
    assert spans == [
        [(0, 3), (0, 2), (0, 1)], [(0, 3), (2, 4), (0, 1)],
        [(3, 5), (0, 2), (0, 1)], [(3, 5), (2, 4), (0, 1)],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "truth"), [(EMPTY, EMPTY), (EMPTY, FULL), (FULL, EMPTY), (FULL, FULL)]
)
@pytest.mark.parametrize("tiles", [(1, 1, 1), (2, 2, 2)])
def test_empty_and_full_masks_have_no_class(prediction, truth, tiles):
    counts = betti_matching(prediction, truth, tiles=tiles)
    assert counts == dict.fromkeys(range(3), (0, 0, 0))
    assert toposcore(counts) == 1.0


def deaths_by_gudhi(first, union):
    """Levels at which the classes of `first` die that live on in the union, by dimension."""
    level = 2.0 - union - first
    level += np.linspace(0.0, 1.0, level.size, endpoint=False).reshape(level.shape)
    pairs = gudhi.CubicalComplex(vertices=level).persistence(min_persistence=0.0)
    found = [(dim, death) for dim, (birth, death) in pairs if birth < 1 and 2 <= death < 3]
    return [sorted(death for dim, death in found if dim == d) for d in range(3)]


def common(first, second):
    second = list(second)
    return sum(value in second and not second.remove(value) for value in first)


def test_matches_agree_with_a_filtration_of_the_whole_volume_by_gudhi():
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(60):
        shape = rng.integers(5, 11, 3)
        field = ndimage.gaussian_filter(rng.normal(size=shape), 0.6)
        other = field + 0.4 * rng.normal(size=shape) * field.std()
        around = rng.integers(0, 3, (3, 2))  # empty slices, which a crop to the box leaves out
        pair = [np.pad(f > rng.uniform(0.0, 0.3), around) for f in (other, field)]
        union = pair[0] | pair[1]
        died = zip(*(deaths_by_gudhi(mask, union) for mask in pair), strict=True)
        expected = [common(*deaths) for deaths in died]
        found = betti_matching(*pair)
        assert [found[dim][0] for dim in range(3)] == expected
        for dim, mortal in ((0, 1), (1, 0), (2, 0)):
            betti = (betti_numbers(mask, 6)[dim] for mask in pair)
            assert found[dim][1:] == tuple(max(0, number - mortal) for number in betti)
        seen.append(expected)
    assert np.sum(seen, axis=0)[:2].min() > 30


def test_the_background_before_the_box_joins_pieces_first():
    prediction, truth = drawn(".# ..", "#. .."), drawn(".# #.", ".. .#")
    pair = [np.pad(mask, 2) for mask in (prediction, truth)]
    died = [deaths_by_gudhi(mask, pair[0] | pair[1])[0] for mask in pair]
    assert common(*died) == betti_matching(*pair)[0][0] == 0
    # Where the volume ends at the box there is no such background.
    assert betti_matching(prediction, truth)[0] == (1, 1, 2)


def test_a_tile_without_common_classes_takes_no_pass_and_one_of_pieces_none_for_loops(monkeypatch):
    import cripser

    tops, compute = [], cripser.computePH
    monkeypatch.setattr(
        cripser, "computePH", lambda f, maxdim: tops.append(maxdim) or compute(f, maxdim=maxdim)
    )
    assert betti_matching(RING, BROKEN_RING)[1] == (0, 1, 0)
    assert tops == []
    two = placed(((0, 0, 0), BAR), ((0, 5, 0), BAR))
    assert betti_matching(two, two | placed(((3, 3, 3), RING))) == {
        0: (1, 1, 2), 1: (0, 0, 1), 2: (0, 0, 0),
    }  # fmt: skip
    assert tops == [0, 0]


def test_either_mask_may_come_first_and_tiles_run_on_any_number_of_threads():
    rng = np.random.default_rng(1)
    field = ndimage.gaussian_filter(rng.normal(size=(20, 20, 20)), 1.0)
    first, second = field > 0.1, ndimage.shift(field, (0, 1, 1), order=1) > 0.1
    found = betti_matching(first, second, tiles=(2, 2, 2), threads=1)
    assert found == betti_matching(first, second, tiles=(2, 2, 2), threads=3)
    swapped = betti_matching(second, first, tiles=(2, 2, 2))
    assert found == {dim: (m, p, t) for dim, (m, t, p) in swapped.items()}
    same = betti_matching(first, first)
    assert all(matched == predicted == true for matched, predicted, true in same.values())


# ---------------------------------------------------------------------------- scores of counts


def test_f1_of_counts():
    assert matching_f1(7, 8, 7) == pytest.approx(14 / 15)
    assert matching_f1(0, 3, 0) == pytest.approx(0.5 / 3.5)
    assert matching_f1(0, 0, 4) == 0.0
    assert matching_f1(0, 0, 0) == 1.0


def test_toposcore_of_published_counts():
    # Three cases of the challenge's package.
    counts = {0: (7, 8, 7), 1: (0, 4, 0), 2: (0, 0, 0)}
    assert toposcore(counts) == pytest.approx(0.5283582089552239, abs=1e-12)
    counts = {0: (12, 18, 21), 1: (31, 57, 5507), 2: (0, 7, 2)}
    assert toposcore(counts) == pytest.approx(0.2129079798705967, abs=1e-12)
    counts = {0: (7, 10, 8), 1: (0, 2, 0), 2: (0, 0, 0)}
    assert toposcore(counts) == pytest.approx(0.49320066334991713, abs=1e-12)
