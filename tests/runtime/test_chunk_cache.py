import itertools

import numpy as np
import pytest

from runtime import columns
from runtime.chunk_cache import ChunkCache
from runtime.window_axis import axis_spans
from volumes.volume import VolumeError


class Stored:
    """A volume in chunks as `ome_zarr.ZarrVolume` is sliced; reads: the chunks, in order."""

    path, fill = "a.zarr", 0

    def __init__(self, array, chunks=(8, 8, 8)):
        self.array, self.shape, self.dtype, self.chunks = array, array.shape, array.dtype, chunks
        self.reads = []

    def stored(self, *index):
        return self._box(index)[0].any()

    def _box(self, index):
        where = (slice(i * n, (i + 1) * n) for i, n in zip(index, self.chunks, strict=True))
        return self.array[:, *where]

    def __getitem__(self, box):
        self.reads.append(tuple(s.start // n for s, n in zip(box[1:], self.chunks, strict=True)))
        return self.array[box].copy()


def volume_of(*shape, channels=1):
    return np.random.default_rng(0).integers(1, 255, (channels, *shape)).astype(np.uint8)


def plan_of(shape, shard, window=8, overlap=0.5):
    spans = [axis_spans(n, window, overlap, 1, "cpu") for n in shape]
    grid = tuple(-(-n // s) for n, s in zip(shape, shard, strict=True))

    def box(index):
        places = zip(index, shard, shape, strict=True)
        return tuple(slice(i * s, min((i + 1) * s, n)) for i, s, n in places)

    return columns.plan(spans, shape, box, columns.share(grid, box, spans))


def walk(cache, plan):
    """Read all that the plan reads, and yield (box, voxels) of each row."""
    for number, stretch in enumerate(plan):
        for row, read in zip(stretch.needed, stretch.reads, strict=True):
            cache.go_to(number, row)
            box = (slice(None), read, *stretch.area)
            yield box, cache[box]


@pytest.mark.parametrize("budget", [0, 40_000, 10**9])
def test_boxes_are_those_of_the_volume_whatever_is_kept(budget):
    array = volume_of(30, 37, 41, channels=2)
    plan = plan_of((30, 37, 41), (16, 16, 16))
    cache = ChunkCache(Stored(array), plan, budget)
    for box, voxels in walk(cache, plan):
        np.testing.assert_array_equal(voxels, array[box])
        assert cache._held <= cache.bytes_kept
    cache.close()


def test_each_chunk_is_read_once_where_all_that_is_used_again_fits():
    stored, plan = Stored(volume_of(40, 48, 56)), plan_of((40, 48, 56), (16, 16, 16))
    cache = ChunkCache(stored, plan, 10**9)
    list(walk(cache, plan))
    cache.close()
    assert sorted(stored.reads) == list(np.ndindex(5, 6, 7))
    assert cache.decoded == 40 * 48 * 56
    assert {index[0] for index in cache._chunks} == {3, 4}  # those of the last row are there still


def fewest_reads(uses, room):
    """Reads of the best of all rules that hold each chunk from the step before its use on, in a
    cache of some chunks, by trying them all."""
    states = {frozenset(): 0}
    for now in itertools.pairwise([*uses, uses[-1]]):
        following = {}
        for kept, cost in states.items():
            total = cost + len({*now} - kept)
            for n in range(room + 1):
                for state in map(frozenset, itertools.combinations(kept | {*now}, n)):
                    if state >= {*now}:
                        following[state] = min(total, following.get(state, total))
        states = following
    return min(states.values())


@pytest.mark.parametrize("room", [2, 3, 4])
def test_no_rule_that_reads_a_row_ahead_reads_less(room):
    # Stretches of one row that reads one chunk: the order of uses is free.
    order = np.random.default_rng(room).integers(0, 6, 24)
    stretches = []
    for i in order:
        row, x = range(1), slice(8 * i, 8 * i + 8)
        area = (slice(0, 8), x)
        stretches.append(columns.Stretch({}, (slice(0, 8), *area), row, row, [slice(0, 8)], area))
    stored = Stored(volume_of(8, 8, 48))
    cache = ChunkCache(stored, stretches, room * 512)
    list(walk(cache, stretches))
    cache.close()
    assert len(stored.reads) == fewest_reads(list(order), room)


def test_chunks_of_zeros_and_those_that_are_not_stored_take_no_memory():
    array = volume_of(16, 16, 32)
    array[..., 8:] = 0
    stored, plan = Stored(array), plan_of((16, 16, 32), (16, 16, 32))
    cache = ChunkCache(stored, plan, 0)
    for box, voxels in walk(cache, plan):
        np.testing.assert_array_equal(voxels, array[box])
    assert cache.is_empty((slice(0, 16), slice(0, 16), slice(8, 32)))
    assert not cache.is_empty((slice(0, 16), slice(0, 16), slice(7, 32)))
    cache.close()  # when all that was asked for is read
    assert 0 < cache._held <= 4 * 512
    assert {index[2] for index in stored.reads} == {0}


def test_the_chunks_of_the_next_row_are_read_meanwhile():
    stored, plan = Stored(volume_of(32, 16, 16)), plan_of((32, 16, 16), (32, 16, 16), overlap=0)
    cache = ChunkCache(stored, plan, 0)
    cache.go_to(0, 0)
    cache.close()
    assert set(stored.reads) <= set(itertools.product((0, 1), range(2), range(2)))
    assert {(1, *yx) for yx in np.ndindex(2, 2)} <= cache._chunks.keys()


def test_a_chunk_with_nan_is_named():
    array = volume_of(16, 16, 16).astype(np.float32)
    array[0, 3, 9, 3] = np.nan
    plan = plan_of((16, 16, 16), (16, 16, 16))
    cache = ChunkCache(Stored(array), plan, 0)
    with pytest.raises(VolumeError, match=r"a.zarr: expected finite values, .* chunk \(0, 1, 0\)"):
        list(walk(cache, plan))
    cache.close()
