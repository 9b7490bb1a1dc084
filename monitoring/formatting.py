"""Numbers, bars, curves and tables for a terminal.

number, size, sizes, duration, clock    quantities for people, in few characters
sparkline                               a curve of one line
labeled, table, flowing, bars, with_curves
                                        lines, as texts of rich, of a section of a view
"""

import itertools
import math
import time

from rich.text import Text

LABEL = 8  # characters before each line of a section
SHORT_BAR, LONG_BAR, LONG_CURVE = 8, 24, 60  # characters
FAINT, BAD, FILL, CURVE = "grey50", "red3", "steel_blue", "deep_sky_blue3"
BLOCKS = "▁▂▃▄▅▆▇█"
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6}


# ---------------------------------------------------------------------------- quantities


def number(value):
    """Four digits of a number: 0.2381, 1.2e-05, 312.4, 12; "–" for none."""
    value = _finite(value)
    if value is None:
        return "–"
    if value == round(value) and abs(value) < 1e5:
        return f"{value:.0f}"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}"
    whole = len(str(int(abs(value))))
    return f"{value:.{4 if whole == 1 else max(0, 4 - whole)}f}"


def size(count):
    """Bytes in a unit of 10^6, 10^9 or 10^12 of them: 541 MB, 12.3 GB; "–" for none."""
    if _finite(count) is None:
        return "–"
    unit = _unit(count)
    return f"{_in_unit(count, unit)} {unit}"


def sizes(count, total):
    """Bytes of so many in all: 12.3 of 64.0 GB."""
    if _finite(count) is None or _finite(total) is None:
        return f"{size(count)} of {size(total)}"
    unit = _unit(total)
    return f"{_in_unit(count, unit)} of {_in_unit(total, unit)} {unit}"


def _unit(count):
    return next((unit for unit, value in UNITS.items() if abs(count) >= 0.9995 * value), "MB")


def _in_unit(count, unit):
    return f"{count / UNITS[unit]:.{0 if unit == 'MB' else 1}f}"


def duration(seconds):
    """Two units of a length of time: 45 s, 4 min, 2 h 10 min, 3 d 4 h."""
    seconds = _finite(seconds)
    if seconds is None:
        return "–"
    seconds = max(0, round(seconds))
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(moment, now, seconds=True):
    """Local time of day, with the date if it is another day than that of `now`; "–" for none."""
    moment = _finite(moment)
    if moment is None:
        return "–"
    then, today = time.localtime(moment), time.localtime(now)
    text = time.strftime("%H:%M:%S" if seconds else "%H:%M", then)
    if then[:3] == today[:3]:
        return text
    date = f"{then.tm_mday} {time.strftime('%b', then)}"
    return f"{date} {text}" if then.tm_year == today.tm_year else f"{date} {then.tm_year} {text}"


# ---------------------------------------------------------------------------- lines


def sparkline(values, width):
    """A curve of at most `width` characters, from its lowest value to its highest.

    values: numbers in their order; None and NaN leave gaps. More than `width` become means of
    equal stretches. If all are above 0 and the highest is ten times the lowest, heights are those
    of logarithms, as a loss that has fallen far would be a flat line.
    """
    known = _stretches([_finite(value) for value in values], width)
    present = [value for value in known if value is not None]
    if not present:
        return ""
    low, high = min(present), max(present)
    if low > 0 and high > 10 * low:
        known = [None if value is None else math.log(value) for value in known]
        low, high = math.log(low), math.log(high)
    span = high - low if high - low > 1e-9 * abs(high) else 0.0  # else rounding would show
    heights = [
        None if value is None else round((value - low) / span * 7) if span else 3 for value in known
    ]
    return "".join(" " if height is None else BLOCKS[height] for height in heights)


def _finite(value):
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _stretches(values, width):
    """Means of `width` stretches of the values; the values themselves if there are no more."""
    if len(values) <= width:
        return values
    edges = [len(values) * i // width for i in range(width + 1)]
    return [_mean(values[a:b]) for a, b in itertools.pairwise(edges)]


def _mean(values):
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def labeled(label, lines):
    """Lines with a label before the first, as text, and all indented."""
    labels = [label, *[""] * len(lines)]
    pairs = zip(labels, lines, strict=False)
    return [Text.assemble((text.ljust(LABEL), "bold"), line) for text, line in pairs]


def table(rows):
    """Rows of (text, style) cells as lines, the cells of a column equally wide."""
    widths = [max(len(row[i][0]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [(f"{text:{w}}  ", style) for (text, style), w in zip(row, widths, strict=True)]
        line = Text.assemble(*cells)
        line.rstrip()
        lines.append(line)
    return lines


def flowing(texts, room):
    """Texts, each in parts, one after another in lines of at most `room` characters."""
    lines = [Text()]
    for parts in texts:
        text = Text.assemble(*parts)
        if lines[-1].plain and len(lines[-1]) + 2 + len(text) > room:
            lines.append(Text())
        lines[-1].append("  " * bool(lines[-1].plain)).append_text(text)
    return lines if texts else []


def bars(rows, room):
    """Bars of equal length, each with its percentage and a text, in lines of `room` characters.

    rows: (share, texts, style); of the texts, from long to short, the first that leaves room.
    """
    texts = [
        next((text for text in texts if len(text) + SHORT_BAR + 7 <= room), texts[-1])
        for _, texts, _ in rows
    ]
    longest = max(map(len, texts), default=0)
    width = max(SHORT_BAR, min(LONG_BAR, room - longest - 7))
    lines = []
    for (share, _, style), text in zip(rows, texts, strict=True):
        filled = round(min(1.0, max(0.0, share)) * width)
        line = Text("█" * filled, style).append("░" * (width - filled), FAINT)
        lines.append(line.append(f"{share:5.0%}  {text}", "default"))
    return lines


def with_curves(rows, curves, room):
    """A table with a sparkline at the end of each row, as long as there is room."""
    lines = table(rows)
    width = min(LONG_CURVE, room - max((len(line.plain) for line in lines), default=0) - 2)
    for line, curve in zip(lines, curves, strict=True):
        line.pad_right(max(0, room - width - len(line.plain)))
        line.append(sparkline(curve, width) if width >= 4 else "", CURVE)
    return lines
