"""Steps by blocks against the same in memory: equal bit for bit, whatever the blocks."""

import errno
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring import block_postprocess, partitions, postprocess
from scoring.blocks import Bits, Grid, Joined

few = functools.partial(settings, deadline=None, derandomize=True)
SHAPES = st.tuples(*[st.integers(1, 10)] * 3)
BLOCKS = st.tuples(*[st.integers(2, 8)] * 3)  # with many blocks an example takes long
SEEDS = st.integers(0, 2**32 - 1)


def whole(shape):
    return tuple(map(slice, [0] * 3, shape))


def counted(read, reads):
    def counting(box):
        reads.append(box)
        return read(box)

    return counting


@few(max_examples=60)
@given(SHAPES, BLOCKS, SEEDS, st.sampled_from([6, 26]), st.floats(0.05, 0.9))
def test_components_across_blocks_are_those_of_the_whole_volume(shape, block, seed, touch, share):
    mask = np.random.default_rng(seed).random(shape) < share
    labels, count = partitions.label(mask, touch)
    grid = Grid(shape, block)
    joined = Joined(grid, lambda voxels, marked: voxels >= 4, connectivity=touch)
    for index in grid:
        joined.add(index, mask[grid.grown(index)])
    joined.settle()
    kept = np.zeros(shape, bool)
    for index in grid:
        kept[grid.box(index)] = joined.kept(index, mask[grid.grown(index)])
    large = np.bincount(labels.ravel(), minlength=count + 1) >= 4
    large[0] = False
    assert joined.components == large.sum()
    assert np.array_equal(kept, large[labels])


def test_a_spiral_through_all_blocks_is_one_component():
    """One voxel wide, so that each of 64 blocks holds pieces that others join."""
    mask = np.zeros((16, 16, 16), bool)
    mask[::4, ::2] = True  # bars in x, joined at alternate ends
    for z in range(0, 16, 4):
        for n, y in enumerate(range(1, 15, 2)):
            mask[z, y, -1 if n % 2 else 0] = True
    mask[:, 14, 15] = True
    grid = Grid(mask.shape, (4, 4, 4))
    joined = Joined(grid, lambda voxels, marked: voxels >= int(mask.sum()), connectivity=6)
    for index in grid:
        joined.add(index, mask[grid.grown(index)])
    joined.settle()
    assert joined.components == 1
    for index in grid:
        kept = joined.kept(index, mask[grid.grown(index)])
        assert np.array_equal(kept, mask[grid.box(index)])


STEPS = st.fixed_dictionaries(
    {
        "hysteresis": st.sampled_from([None, 0.3]),
        "min_component_voxels": st.sampled_from([0, 5, {"a": 9}, {"a": 2, "b": 30}]),
        "max_hole_voxels": st.sampled_from([0, 1, 6, 100]),
        "closing_radius": st.sampled_from([0.0, 1.0, 1.5, 2.3]),
        "spacing": st.sampled_from([None, (2.0, 1.0, 0.7)]),
    }
)


@few(max_examples=25)
@given(SHAPES, BLOCKS, SEEDS, STEPS, st.booleans(), st.floats(0.1, 0.9))
def test_steps_by_blocks_are_those_in_memory_bit_for_bit(
    tmp_path_factory, shape, block, seed, steps, exclusive, share
):
    rng = np.random.default_rng(seed)
    values, first = rng.random(shape), rng.random(shape) < 0.7
    sides = {"a": first, "b": ~first if exclusive else rng.random(shape) < 0.7}
    if exclusive:
        steps = steps | {"hysteresis": None}
    high = {name: (values < share) & side for name, side in sides.items()}
    low = {name: (values < share + 0.2) & side for name, side in sides.items()}
    low["a"] &= values > share / 9  # high is not always within low

    def read(box):
        assert all(0 <= s.start < s.stop <= n for s, n in zip(box, shape, strict=True))
        return {n: v[box] for n, v in high.items()}, {n: v[box] for n, v in low.items()}

    how = steps | {"exclusive": exclusive}
    expected = postprocess.apply_to_regions(high, low, **how)
    folder = tmp_path_factory.mktemp("steps")
    masks = block_postprocess.postprocessed(read, shape, folder, block=block, **how)
    once = masks(whole(shape))
    assert list(once) == list(expected)
    for name, mask in expected.items():
        assert np.array_equal(once[name], mask)
    box = tuple(slice(n // 3, n // 3 + max(1, n // 2)) for n in shape)
    for name, mask in masks(box).items():
        assert np.array_equal(mask, expected[name][box])


def test_a_block_of_more_pinholes_than_16_bits_count(tmp_path):
    mask = np.ones((4, 300, 302), bool)
    mask[:, 1:-1:2, 1:-1:2] = False  # 22 350 in each plane; as tunnels they are open to the border

    def read(box):
        return {"a": mask[box]}, {}

    masks = block_postprocess.postprocessed(read, mask.shape, tmp_path, max_hole_voxels=1)
    expected = postprocess.apply_to_regions({"a": mask}, max_hole_voxels=1)["a"]
    assert np.array_equal(masks(whole(mask.shape))["a"], expected)
    assert expected.all()


def test_a_ball_reaches_from_one_block_into_the_next_but_one(tmp_path):
    """A voxel is closed by voxels up to 8 away: the ball, of radius 4, lies between."""
    mask = np.random.default_rng(0).random((26, 27, 28)) < 0.03

    def read(box):
        return {"a": mask[box]}, {}

    how = {"block": (4, 5, 6), "closing_radius": 4.0}
    masks = block_postprocess.postprocessed(read, mask.shape, tmp_path, **how)
    expected = postprocess.apply_to_regions({"a": mask}, closing_radius=4.0)["a"]
    assert np.array_equal(masks(whole(mask.shape))["a"], expected)
    assert mask.sum() < expected.sum() < mask.size


ALL = {
    "hysteresis": 0.3, "min_component_voxels": 4, "max_hole_voxels": 9, "closing_radius": 1.5,
}  # fmt: skip


def test_a_second_start_goes_on_after_the_last_complete_step(tmp_path):
    values = np.random.default_rng(3).random((12, 13, 14))
    reads = []

    def read(box):
        return {"a": values[box] < 0.4}, {"a": values[box] < 0.5}

    def start(**changes):
        reads.clear()
        how = {"block": (5, 6, 7), **ALL, **changes}
        return block_postprocess.postprocessed(counted(read, reads), values.shape, tmp_path, **how)

    expected = start()(whole(values.shape))["a"]
    assert len(reads) > 8
    again = start()
    assert len(reads) == 1  # the names of the regions
    assert np.array_equal(again(whole(values.shape))["a"], expected)
    start(max_hole_voxels=8)
    assert len(reads) > 8  # another setting is another result


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    values = np.random.default_rng(3).random((12, 13, 14))

    def read(box):
        return {"a": values[box] < 0.4}, {"a": values[box] < 0.5}

    def start():
        how = {"block": (5, 6, 7), **ALL}
        return block_postprocess.postprocessed(read, values.shape, tmp_path, **how)

    def die(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(OSError, match="got No space left on device; make room and start again"):
            start()
    assert not any(tmp_path.iterdir())
    expected = postprocess.apply_to_regions(*read(whole(values.shape)), **ALL)["a"]
    assert np.array_equal(start()(whole(values.shape))["a"], expected)


def test_bits_on_disk_are_read_in_any_box(tmp_path):
    rng, grid = np.random.default_rng(0), Grid((5, 7, 21), (2, 3, 11))
    masks = {"a": rng.random(grid.shape) < 0.5, "b": rng.random(grid.shape) < 0.1}
    bits = Bits(tmp_path / "bits", grid, masks)
    bits.fill(lambda box: {name: mask[box] for name, mask in masks.items()})
    edges = [[(0, n), (n // 2, n), (1, n // 2 + 1)] for n in grid.shape]
    for ends in itertools.product(*edges):
        box = tuple(slice(*pair) for pair in ends)
        for name, mask in bits.read(box).items():
            assert np.array_equal(mask, masks[name][box])
