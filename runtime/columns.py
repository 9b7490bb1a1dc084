"""In which order a volume larger than memory is predicted: in columns of shards along z.

    stretches = plan(spans, store.grid, store.box, share(grid, windows, part), missing)

Columns go in a snake over y and x, so that each lies beside the one before, and one slab moves
through each: no window is predicted twice along z. Of windows on the border of two columns each
predicts its own part.
"""

import itertools
from dataclasses import dataclass

from runtime import parts
from runtime.window_axis import rows_needed, touching

MARGIN = 3  # voxels around those that are predicted, which say whether a voxel is masked


@dataclass(frozen=True)
class Stretch:
    """Shards that follow each other along z.

    shards: {index in the grid: box}, boxes and all slices below in voxels of the volume; box: of
    them all; rows: those of windows that finish its planes; needed: those that must be predicted
    for that; reads: for each of these the z that are read; area: the (y, x) that are read.
    """

    shards: dict
    box: tuple
    rows: range
    needed: range
    reads: list
    area: tuple


def snake(grid):
    """The (y, x) of all columns of a grid of shards (z, y, x), each beside the one before."""
    _, rows, columns = grid
    return [(y, x if y % 2 == 0 else columns - 1 - x) for y in range(rows) for x in range(columns)]


def share(grid, box, spans, part=None):
    """The shards that a part predicts, indexes in order: all where there are no parts.

    Each part gets a run of the snake with about as many windows as any other's; few columns are cut
    in z too. box(index): of a shard; spans: of the windows on each axis.
    """
    columns = snake(grid)
    costs = []
    for y, x in columns:
        _, *area = box((0, y, x))
        counts = [len(touching(s, one)) for s, one in zip(spans[1:], area, strict=True)]
        costs.append((grid[0], counts[0] * counts[1]))
    index, count = (part.index, part.count) if part else (0, 1)
    ranges = parts.share(costs, count)[index]
    return [(z, y, x) for (y, x), own in zip(columns, ranges, strict=True) for z in own]


def plan(spans, shape, box, indexes, late=0):
    """The `Stretch` of each run of shards that follow each other in z, in the order of indexes.

    spans: of the windows on each axis of a volume of this shape (D, H, W); box(index): of a shard;
    late: how many rows after its own the planes of a row come out of `predict_slabs`.
    """
    stretches = []
    for column, own in itertools.groupby(indexes, key=lambda index: index[1:]):
        for numbers in parts.runs([index[0] for index in own]):
            boxes = {(z, *column): box((z, *column)) for z in numbers}
            stretches.append(_stretch(spans, shape, boxes, late))
    return stretches


def _stretch(spans, shape, boxes, late):
    first, last = boxes[min(boxes)], boxes[max(boxes)]
    whole = (slice(first[0].start, last[0].stop), *first[1:])
    starts = [z.start for z in spans[0]]
    before = sum(start <= whole[0].start for start in starts) - 1
    rows = range(before, sum(start < whole[0].stop for start in starts))
    needed = rows_needed(spans[0], rows)
    reads = []
    for row in needed:
        read = spans[0][row].reach
        # Planes that come out late are looked at again, to see what is masked.
        due = max(needed.start, row - late)
        reads.append(slice(max(0, min(read.start, starts[due] - MARGIN)), read.stop))
    area = []
    for axis in (1, 2):
        own = [span.reach for span in touching(spans[axis], whole[axis])]
        low = min(min(read.start for read in own), whole[axis].start - MARGIN)
        high = max(max(read.stop for read in own), whole[axis].stop + MARGIN)
        area.append(slice(max(0, low), min(high, shape[axis])))
    return Stretch(boxes, whole, rows, needed, reads, tuple(area))
