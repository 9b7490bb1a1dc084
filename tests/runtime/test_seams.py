"""Seams across borders of shards and windows, and grids of windows that are shifted."""

import functools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from runtime import seams
from runtime.sliding_window import predict_slabs
from volumes import phantoms

SHARD = (48, 48, 48)


@functools.cache
def clean():
    """Probabilities (1, 96, 96, 96) uint8 of thin sheets, as a network gives them."""
    sheets = phantoms.scroll((96, 96, 96), seed=3).label == 1
    noise = phantoms.smooth_field(sheets.shape, 6.0, np.random.default_rng(0))
    logits = 12 * (ndimage.gaussian_filter(sheets.astype(np.float32), 1.0) - 0.5) + noise
    return np.rint(255 / (1 + np.exp(-logits))).astype(np.uint8)[None]


def changed(box, change):
    """Those probabilities with a change in a box."""
    probability = clean().astype(np.float32)
    probability[0][box] = change(probability[0][box])
    return np.clip(np.rint(probability), 0, 255).astype(np.uint8)


def seen(probability, shard=SHARD, **borders):
    rows = seams.check_seams(probability, shard, borders)
    return [(row.kind, row.axis) for row in rows if row.visible]


def test_a_prediction_without_seams_is_not_accused():
    grid = [range(10, 96, 17)] * 3
    rows = seams.check_seams(clean(), SHARD, {"window": grid})
    assert len(rows) == 6 and not any(row.visible for row in rows)
    assert all(0.6 < row.ratio < 1.4 for row in rows)
    assert seams.describe(rows)[-1] == "no seam"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_seam_of_5_percent_is_found_on_its_axis(axis):
    box = [slice(None)] * 3
    box[axis] = slice(48, None)
    probability = changed(tuple(box), lambda p: p + 0.05 * 255)
    assert seen(probability) == [("shard", "zyx"[axis])]
    assert "seams at shard borders" in seams.describe(seams.check_seams(probability, SHARD, {}))[-1]


def test_one_shard_that_differs_is_found_by_its_faces():
    box = (slice(0, 48), slice(48, 96), slice(0, 48))
    rows = seams.check_seams(changed(box, lambda p: p + 0.05 * 255), SHARD, {})
    assert [row.visible for row in rows] == [True] * 3
    assert [row.worst for row in rows] == [48] * 3


def test_a_seam_of_windows_is_theirs_and_not_that_of_shards():
    probability = changed((slice(None), slice(None), slice(30, None)), lambda p: p + 0.05 * 255)
    borders = [[], [], [30, 48, 70]]
    assert seen(probability, window=borders) == [("window", "x")]
    assert seen(probability) == []  # nobody said that a border is there


def test_a_plane_that_is_a_border_of_both_counts_for_shards():
    probability = changed((slice(None), slice(None), slice(48, None)), lambda p: p + 0.05 * 255)
    assert seen(probability, window=[[], [], [30, 48, 70]]) == [("shard", "x")]


@pytest.mark.parametrize("place", [48, 52])
def test_the_border_of_what_is_masked_is_no_seam(place):
    masked = clean() + 1
    masked[:, :place, 20:] = 0
    masked[:, 60:, :, 48:] = 0
    assert seen(masked, window=[[52], [20], []]) == []
    assert seen(np.zeros((1, 64, 64, 64), np.uint8), (32, 32, 32)) == []


def test_steps_that_stick_out_are_those_larger_than_both_beside_them(monkeypatch):
    monkeypatch.setattr(seams, "BLOCK", 4)
    shard, values = (9, 4, 6), np.random.default_rng(0).integers(0, 6, (2, 20, 11, 7), np.uint8)
    for axis, counts in enumerate(seams._count(values, shard, lambda done, total: None)):
        lines, expected = np.moveaxis(values.astype(int), axis + 1, 0), np.zeros_like(counts)
        tiles = np.delete(shard, axis)
        for k in range(2, len(lines) - 1):
            before, step, after = (abs(lines[j] - lines[j - 1]) for j in (k - 1, k, k + 1))
            counted = lines[k - 2 : k].any(axis=0) & lines[k : k + 2].any(axis=0)
            for number, what in enumerate((counted & (step > before) & (step > after), counted)):
                for place in zip(*np.nonzero(what), strict=True):
                    expected[number, k, *np.floor_divide(place[1:], tiles)] += 1
        np.testing.assert_array_equal(counts, expected)


def test_each_voxel_is_read_once_in_boxes_that_are_small():
    reads = np.zeros((96, 96, 96), int)

    class Watched:
        shape, dtype = (1, 96, 96, 96), np.dtype(np.uint8)

        def __getitem__(self, box):
            reads[box[1:]] += 1
            assert reads[box[1:]].size <= 48**3
            return clean()[box]

    rows = seams.check_seams(Watched(), SHARD, {})
    assert (reads == 1).all() and rows == seams.check_seams(clean(), SHARD, {})


def test_windows_have_borders_where_they_begin_and_end():
    assert seams.window_borders([[0, 6], [-2], [0]], (8, 20, 5)) == [
        [0, 8, 6, 14],
        [-2, 18],
        [0, 5],
    ]


def test_no_border_is_judged_where_there_is_none_or_no_plane_between_borders():
    assert seams.check_seams(clean(), (96, 96, 96), {"window": [[0, 96]] * 3}) == []
    assert seams.check_seams(clean(), (96, 96, 96), {"window": [range(0, 96, 2)] * 3}) == []
    assert "no borders to judge" in seams.describe([])[0]


def test_probabilities_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="expected probabilities as uint8, got float32"):
        seams.check_seams(np.zeros((1, 8, 8, 8), np.float32), SHARD, {})


# ---------------------------------------------------------------------------- shifted windows


def predictor(network, window=(8, 8, 8), overlap=0.5):
    """As an `ensemble.Predictor` of one region."""

    def probabilities(image, spacing, intensity, box):
        return predict_slabs(network, image, window, overlap, box=box)

    return SimpleNamespace(
        settings=SimpleNamespace(inference=SimpleNamespace(window=window, overlap=overlap)),
        metadata={"spacing": (None, None, None)},
        probabilities=probabilities,
        thresholded=lambda probs: {"": probs[0] >= 0.5},
    )


def volume(*shape):
    voxels = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    about = {"shape": shape, "spacing": None, "intensity": {}}
    return SimpleNamespace(voxels=lambda: nullcontext(voxels), **about)


def test_a_network_that_sees_voxels_alone_gives_one_mask_whatever_the_grid():
    boxes = [(slice(2, 14), slice(4, 12), slice(6, 9)), (slice(10, 22),) * 3]
    for box in boxes:
        assert seams.shift_consistency(predictor(lambda x: x), volume(24, 24, 24), box) == {"": 1.0}


def test_a_network_that_goes_by_the_place_in_its_window_is_found_out():
    def network(patches):  # foreground is the first half of a window along z
        place = torch.linspace(1, -1, patches.shape[2])
        return 20 * place[:, None, None].expand(patches.shape)

    box = (slice(8, 20), slice(4, 12), slice(4, 12))
    about = predictor(network, overlap=0.0), volume(40, 24, 24)
    # Windows of 8 voxels, half of each foreground; those of the other grid lie 4 further on.
    assert seams.shift_consistency(*about, box) == {"": 0.0}


def test_where_both_masks_are_empty_there_is_no_dice():
    empty = predictor(lambda x: torch.full_like(x, -5.0))
    box = (slice(8, 16),) * 3
    assert math.isnan(seams.shift_consistency(empty, volume(24, 24, 24), box)[""])


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_the_second_grid_lies_half_a_step_from_the_first(overlap):
    extent, step = 20, {0.0: 20, 0.25: 15, 0.5: 10, 0.8: 4}[overlap]
    for box in (slice(40, 60), slice(11, 90), slice(10, 11), slice(50, 90)):
        one, other = seams._two_grids("z", 100, extent, overlap, box)
        assert other.start - one.start == step // 2 and 0 <= one.start and other.stop <= 100
        assert other.start <= box.start and box.stop <= one.stop
        assert one.stop - one.start == other.stop - other.start >= extent


def test_an_axis_of_one_window_is_not_shifted():
    whole = slice(0, 20)
    assert seams._two_grids("z", 20, 20, 0.5, slice(0, 20)) == (whole, whole)


def test_a_box_at_the_end_of_the_volume_is_refused():
    with pytest.raises(ValueError, match="within 2:22 on axis y"):
        box = (slice(8, 16), slice(0, 8), slice(8, 16))
        seams.shift_consistency(predictor(lambda x: x), volume(24, 24, 24), box)
