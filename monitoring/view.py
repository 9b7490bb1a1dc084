"""The view of a run for a terminal of any size, from what the files of its folder say.

    console.print(View(run, verdict, pace, now))

One column in a narrow terminal, two or three in a wide one. Where the height is limited, as in a
live view, lists are shortened first, and then cut, which the view says. Without colours it is
plain text.
"""

import math
from dataclasses import dataclass

from rich.text import Text

from monitoring import health as vitals
from monitoring import panels as sections
from monitoring.formatting import BAD, FAINT, LABEL
from monitoring.panels import cache, gpus, host, losses, memories, progress, saved, scores, times

GAP = 3  # characters between columns
COLUMNS_FROM = 110, 165  # characters from which there are two columns, and three
LAYOUTS = {
    1: [[progress, losses, scores, times, memories, gpus, host, cache, saved]],
    2: [[progress, losses, scores, saved], [times, memories, gpus, host, cache]],
    3: [[progress, losses], [scores, times, saved, cache], [memories, gpus, host]],
}


@dataclass
class View:
    """What a `history.History` says of a run at the time `now`, in seconds since 1970.

    verdict: of a `vitals.RunHealth`; pace: of `vitals.pace`. A renderable of rich.
    """

    run: object
    verdict: vitals.Verdict
    pace: vitals.Pace
    now: float
    plain: bool = False  # whether there are no colours
    compact: bool = False  # whether lists are shortened, for want of lines

    def __rich_console__(self, console, options):
        self.plain = console.color_system is None
        yield from self.lines(options.max_width, options.height)

    def lines(self, width, height=None):
        """The view as texts of at most `width` characters; height: the most of them, or None."""
        count = 1 + sum(width >= least for least in COLUMNS_FROM)
        inner = (width - GAP * (count - 1)) // count
        limit = math.inf if height is None else height
        for self.compact in (False, True):
            top, columns, last = self._parts(width, inner, LAYOUTS[count])
            room = limit - len(top) - len(last)
            if all(sum(map(len, column)) <= room for column in columns):
                break
        fitted = [_fitted(column, room, fixed=not top) for column in columns]
        lines = [*top, *_beside(fitted, inner), *last][:height]
        for line in lines:
            line.no_wrap = True
            line.truncate(width, overflow="ellipsis")
            if not line.plain.isprintable():  # such as the codes of colours in an error
                line.plain = "".join(c if c.isprintable() else " " for c in line.plain)
        return lines

    def _parts(self, width, inner, layout):
        """(lines above, columns of sections, lines below); of a single column all is in it."""
        top, last = sections.head(self, width), sections.events(self, width)
        columns = [[self._section(one, inner) for one in column] for column in layout]
        if len(columns) == 1:
            return [], [[top, *columns[0], last]], []
        return [*top, Text()], columns, [Text(), *last]

    def _section(self, section, width):
        # A log of an older version, or of a script that was changed, may hold anything.
        try:
            return section(self, width)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            return [Text(f"{section.__name__} cannot be shown: {error!r}", BAD)]


def _spaced(blocks):
    """The lines of several blocks, an empty one between each."""
    lines = []
    for block in blocks:
        lines += [Text()] * bool(lines) + block
    return lines


def _fitted(blocks, height, fixed):
    """The lines of blocks in at most `height` lines: the longest are cut; of the fixed first none.

    At least one line of each block, all the same.
    """
    blocks = [block for block in blocks if block]
    if len(lines := _spaced(blocks)) <= height:
        return lines
    lengths = [len(block) for block in blocks]
    while sum(lengths) > height and max(lengths[fixed:], default=1) > 1:
        # Of equally long ones the last, which matters least.
        longest = max(range(fixed, len(lengths)), key=lambda i: (lengths[i], i))
        lengths[longest] -= 1
    cut = [_cut(block, length) for block, length in zip(blocks, lengths, strict=True)]
    return [line for block in cut for line in block]


def _cut(block, length):
    """The first lines of a block, the last of them saying how many are left out."""
    if length == len(block) or length < 3:
        return block[:length]
    rest = len(block) - length + 1
    return [*block[: length - 1], Text(f"{'':{LABEL}}… {rest} more", FAINT)]


def _beside(columns, width):
    """Columns of lines beside each other, each `width` characters wide."""
    lines = []
    for row in range(max(map(len, columns))):
        line = Text()
        for column in columns:
            cell = column[row].copy() if row < len(column) else Text()
            cell.truncate(width, overflow="ellipsis", pad=True)
            line.append_text(cell).append(" " * GAP)
        line.rstrip()
        lines.append(line)
    return lines
