import itertools

import numpy as np
import pytest

from runtime import columns
from runtime.parts import Part
from runtime.window_axis import axis_spans

SHAPE, SHARD = (40, 50, 36), (16, 24, 16)
GRID = (3, 3, 3)


def box(index):
    return tuple(
        slice(i * s, min((i + 1) * s, n)) for i, s, n in zip(index, SHARD, SHAPE, strict=True)
    )


def spans(window=(8, 12, 8), overlap=0.5):
    return [axis_spans(n, w, overlap, 1, "cpu") for n, w in zip(SHAPE, window, strict=True)]


def test_a_column_lies_beside_the_one_before():
    order = columns.snake((2, 3, 4))
    assert sorted(order) == list(np.ndindex(3, 4))
    steps = [abs(a - c) + abs(b - d) for (a, b), (c, d) in itertools.pairwise(order)]
    assert set(steps) == {1}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_parts_share_out_all_shards_in_runs_of_the_snake(count):
    whole = columns.share(GRID, box, spans())
    each = [columns.share(GRID, box, spans(), Part(n, count)) for n in range(count)]
    assert list(itertools.chain(*each)) == whole
    assert sorted(whole) == list(np.ndindex(GRID))


def test_shards_that_are_missing_make_stretches_of_their_own():
    missing = [(0, 0, 0), (2, 0, 0), (0, 0, 1), (1, 0, 1), (2, 0, 1)]
    plan = columns.plan(spans(), SHAPE, box, missing)
    assert [list(one.shards) for one in plan] == [missing[:1], missing[1:2], missing[2:]]
    assert [one.box[0] for one in plan] == [slice(0, 16), slice(32, 40), slice(0, 40)]


def test_a_stretch_needs_the_rows_that_reach_into_it_and_reads_what_they_read():
    (one,) = columns.plan(spans(), SHAPE, box, [(1, 1, 1)])  # 16:32, 24:48, 16:32
    assert [s.start for s in spans()[0]] == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert (one.rows, one.needed) == (range(4, 8), range(3, 8))
    assert one.reads[0] == slice(9, 20) and one.reads[-1] == slice(25, 36)  # 3 before a row
    assert one.area == (slice(16, 50), slice(12, 36))  # of windows from 16 to 38, from 12 to 28


def test_planes_that_come_out_late_are_read_until_then():
    (one,) = columns.plan(spans(), SHAPE, box, [(1, 1, 1)], late=2)
    assert [read.start for read in one.reads] == [9, 9, 9, 13, 17]
