"""Scores by blocks against the same in memory: equal bit for bit, whatever the blocks."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from scoring import block_scores, homology, metrics

few = functools.partial(settings, deadline=None, derandomize=True)
ADDED = [name for name in metrics.SCORES if name not in block_scores.WHOLE]
OF_MASKS = [name for name in ADDED if not metrics.SCORES[name].probs]
CHEAP = [name for name in OF_MASKS if metrics.SCORES[name].cost == "cheap"]
CHEAP += ["surface_dice@0", "surface_dice@1", "surface_dice@3.5"]


def by_blocks(prediction, truth, names, block, spacing=metrics.VOXEL, labeled=None, probs=None):
    def read(box):
        on = np.True_ if labeled is None else labeled[box]
        return prediction[box] & on, truth[box] & on, None if labeled is None else on

    how = {"block": block, "probs": lambda box: probs[box]}
    pair = block_scores.BlockPair(read, truth.shape, spacing, **how)
    return block_scores.score(pair, names)


def blobs(rng, shape, smooth=0.8):
    return ndimage.gaussian_filter(rng.normal(size=shape), smooth) > rng.uniform(-0.1, 0.4)


@few(max_examples=25)
@given(
    st.tuples(*[st.integers(1, 14)] * 3),
    st.tuples(*[st.integers(3, 9)] * 3),
    st.integers(0, 2**32 - 1),
    st.sampled_from([metrics.VOXEL, (2.0, 1.0, 0.7)]),
    st.sampled_from([None, "prediction", "truth", "both"]),
)
def test_scores_by_blocks_are_those_in_memory_bit_for_bit(shape, block, seed, spacing, empty):
    rng = np.random.default_rng(seed)
    prediction, truth = blobs(rng, shape), blobs(rng, shape)
    prediction &= empty not in ("prediction", "both")
    truth &= empty not in ("truth", "both")
    expected = metrics.score(prediction, truth, spacing, names=CHEAP)
    assert by_blocks(prediction, truth, CHEAP, block, spacing) == expected


@pytest.mark.parametrize("share", [0.03, 0.5])
def test_components_of_white_noise_overlap_by_blocks_as_in_memory(share):
    """Thousands of components, of which most meet another block or lie in one alone."""
    rng = np.random.default_rng(0)
    prediction, truth = (rng.random((21, 22, 23)) < share for _ in range(2))
    names = ["voi_split", "voi_merge", "components", "components_truth", "handles", "cavities"]
    expected = metrics.score(prediction, truth, names=names)
    assert by_blocks(prediction, truth, names, (5, 7, 23)) == expected
    assert expected["components"] > (1 if share == 0.5 else 100)


def test_unlabeled_voxels_are_in_no_mask_by_blocks_either():
    rng = np.random.default_rng(1)
    prediction, truth, labeled = (blobs(rng, (12, 13, 14)) for _ in range(3))
    volume = np.where(labeled, truth, 2).astype(np.uint8)
    expected = metrics.score(prediction, volume, ignore_label=2, names=CHEAP)
    assert by_blocks(prediction, truth, CHEAP, (5, 6, 7), labeled=labeled) == expected


def test_a_tolerance_of_more_rows_than_are_shifted_is_measured_in_distances():
    rng = np.random.default_rng(2)
    prediction, truth = np.zeros((2, 70, 12, 12), bool)
    prediction[3, 2:9, 2:9], truth[30:60, 4, 4] = True, rng.random(30) < 0.5
    names = ["surface_dice@32", "surface_dice@40"]
    expected = metrics.score(prediction, truth, names=names)
    assert by_blocks(prediction, truth, names, (16, 12, 8)) == expected
    assert 0 < expected["surface_dice@32"] < expected["surface_dice@40"] < 1


def test_calibration_by_blocks_is_that_in_memory_but_for_rounding():
    rng = np.random.default_rng(3)
    truth, labeled = blobs(rng, (12, 13, 14)), blobs(rng, (12, 13, 14))
    probs = np.clip(truth * 0.5 + rng.random(truth.shape) * 0.6, 0, 1).astype(np.float32)
    volume = np.where(labeled, truth, 2).astype(np.uint8)
    names = ["ece", "ece@5"]
    how = {"ignore_label": 2, "probs": probs, "names": names}
    expected = metrics.score(probs > 0.5, volume, **how)
    found = by_blocks(probs > 0.5, truth, names, (5, 6, 7), labeled=labeled, probs=probs)
    assert found == pytest.approx(expected, rel=1e-12)


def test_betti_matching_of_a_volume_up_to_two_tiles_wide_is_that_in_memory():
    rng = np.random.default_rng(4)
    truth = blobs(rng, (14, 15, 16), 1.0)
    prediction = truth ^ (rng.random(truth.shape) < 0.02)
    names = ["betti_matching_f1_0", "betti_matching_f1_1", "betti_matching_f1_2", "toposcore"]
    names += ["vesuvius_score"]
    expected = metrics.score(prediction, truth, names=names)
    assert by_blocks(prediction, truth, names, (9, 6, 16)) == expected
    assert 0 < expected["betti_matching_f1_1"] < 1


def test_betti_matching_of_a_larger_volume_has_more_tiles(monkeypatch):
    monkeypatch.setattr(block_scores, "TILE", 6)
    rng = np.random.default_rng(5)
    truth = blobs(rng, (13, 12, 11), 1.0)
    prediction = truth ^ (rng.random(truth.shape) < 0.02)
    assert block_scores.tile_of(truth.shape) == (5, 6, 6)
    counts = homology.betti_matching(prediction, truth, tiles=(3, 2, 2))
    expected = {"betti_matching_f1_0": homology.matching_f1(*counts[0])}
    assert by_blocks(prediction, truth, list(expected), (9, 6, 16)) == expected


def test_every_score_is_added_up_or_named_as_one_that_is_not():
    rng = np.random.default_rng(6)
    prediction, truth = blobs(rng, (7, 8, 9)), blobs(rng, (7, 8, 9))
    found = by_blocks(prediction, truth, ADDED, (4, 4, 4), probs=prediction.astype(np.float32))
    assert list(found) == ADDED
    assert {*block_scores.WHOLE} | {*ADDED} == {*metrics.SCORES}
