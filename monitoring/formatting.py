"""Quantities in few characters, for people: numbers, bytes, times, and curves of one line."""

import itertools
import math
import time

BLOCKS = "▁▂▃▄▅▆▇█"
UNITS = (("TB", 1e12, 1), ("GB", 1e9, 1), ("MB", 1e6, 0))  # name, bytes, decimals


def number(value):
    """Four digits of a number: 0.2381, 1.2e-05, 312.4, 12; "–" for none."""
    return "–" if finite(value) is None else f"{value:.4g}"


def format_bytes(count):
    """Bytes in a unit of 10^6, 10^9 or 10^12 of them: 541 MB, 12.3 GB; "–" for none."""
    if finite(count) is None:
        return "–"
    unit, size, decimals = next((u for u in UNITS if abs(count) >= 0.9995 * u[1]), UNITS[-1])
    return f"{count / size:.{decimals}f} {unit}"


def format_share(part, total):
    """Bytes of so many in all: 12.3 GB of 64.0 GB."""
    return f"{format_bytes(part)} of {format_bytes(total)}"


def duration(seconds):
    """Two units of a length of time: 45 s, 4 min, 2 h 10 min, 3 d 4 h; "–" for none."""
    if finite(seconds) is None:
        return "–"
    seconds = max(0, round(seconds))
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def clock(moment, now):
    """Local time of day, with the date if it is another day than that of `now`; "–" for none."""
    if finite(moment) is None:
        return "–"
    then, today = time.localtime(moment), time.localtime(now)
    day = "" if then[:3] == today[:3] else "%d %b " if then[0] == today[0] else "%d %b %Y "
    return time.strftime(f"{day}%H:%M:%S", then)


def sparkline(values, width):
    """A curve of at most `width` characters, from its lowest value to its highest.

    None and NaN leave gaps. More values than `width` become means of equal stretches. Heights are
    logarithms if all values are above 0 and the highest is more than ten times the lowest.
    """
    if len(values) > width:
        edges = [len(values) * i // width for i in range(width + 1)]
        values = [mean(values[a:b]) for a, b in itertools.pairwise(edges)]
    values = [finite(value) for value in values]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    if low > 0 and high > 10 * low:
        values = [None if value is None else math.log(value) for value in values]
        low, high = math.log(low), math.log(high)
    if high - low <= 1e-9 * abs(high):  # rounding is no curve
        low, high = low - 3, low + 4
    scale = 7 / (high - low)
    return "".join(" " if v is None else BLOCKS[round((v - low) * scale)] for v in values)


def mean(values):
    """Of the finite ones; None of none."""
    known = [value for value in map(finite, values) if value is not None]
    return sum(known) / len(known) if known else None


def finite(value):
    """The value if it is a finite number, else None: a log may hold anything."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
