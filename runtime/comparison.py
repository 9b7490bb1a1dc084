"""Variants compared by their runs: over folds and seeds, and case by case.

runs = [("bce", (0, 0), [{"case": "a", "dice": 0.8}]), ("cldice", (0, 0), ...)]
compare(runs, "dice", "bce")     # a `Compared` for each variant
"""

import itertools
import statistics
from typing import NamedTuple

from rich.table import Table

from scoring import report

FEW = 5  # pairs of runs below which an interval says little
MOST_ROWS = 40  # of a table on the terminal
WORDS = ("variant", "fold", "group", "case")  # columns of these


class Compared(NamedTuple):
    """A variant by one score. None where there are too few runs or cases.

    mean, deviation: of its runs, each the mean over its cases. difference, low, high: to the run of
    the first variant with the same fold and seed; mean and 95 % interval by Student's t over
    `pairs`. case_*: of all cases together, each the mean over the seeds; the difference to the
    first variant with its 95 % bootstrap interval, and in how many cases it is ahead and behind.
    """

    variant: str
    score: str
    runs: int
    mean: float
    deviation: float | None
    pairs: int = 0
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    cases: int = 0
    case_mean: float | None = None
    case_difference: float | None = None
    case_low: float | None = None
    case_high: float | None = None
    ahead: int | None = None
    behind: int | None = None


def compare(runs, name, first):
    """[`Compared`] of all variants by a score; [] of no runs.

    runs: [(variant, place, rows of cases)]. Runs of one place (fold, seed) and of the same cases
    are pairs, and only pairs are compared. first: the variant that the others are compared with.
    """
    by_variant = {}
    for variant, place, rows in runs:
        by_variant.setdefault(variant, {})[place] = rows
    return [_compare(variant, by_variant, name, first) for variant in by_variant]


def _compare(variant, by_variant, name, first):
    own, others = by_variant[variant], by_variant.get(first, {})
    values = [mean(rows, name) for rows in own.values()]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    cases = _by_case(variant, own, own, name)
    row = Compared(variant, name, len(own), statistics.fmean(values), deviation)
    row = row._replace(cases=len(cases), case_mean=mean(cases, name))
    pairs = [p for p in own if p in others and _cases(own[p]) == _cases(others[p])]
    if variant == first or not pairs:
        return row
    differences = [mean(own[place], name) - mean(others[place], name) for place in pairs]
    low, high = report.student_interval(differences) or (None, None)
    rows = _by_case(first, others, pairs, name) + _by_case(variant, own, pairs, name)
    board = {s.method: s for s in report.leaderboard(rows, name, against=first)}
    one = board[variant]
    case_low, case_high = one.difference_interval or (None, None)
    return row._replace(
        pairs=len(pairs),
        difference=statistics.fmean(differences),
        low=low,
        high=high,
        case_difference=one.difference,
        case_low=case_low,
        case_high=case_high,
        ahead=one.ahead,
        behind=one.behind,
    )


def mean(rows, name):
    """The mean of a score over the rows of a run's cases."""
    return statistics.fmean(row[name] for row in rows)


def _cases(rows):
    return {row["case"] for row in rows}


def _by_case(variant, runs, places, name):
    """A row for each case of the runs at some places: its mean over them, which are the seeds."""
    values = {}
    for place in places:
        for row in runs[place]:
            values.setdefault(row["case"], []).append(row[name])
    return [
        {"case": case, "method": variant, name: statistics.fmean(values[case])}
        for case in sorted(values)
    ]


# ---------------------------------------------------------------------------- for people


def tables(rows, names):
    """[(headings, rows of texts)] of all `Compared`: by the first of these scores, by others."""
    main, *others = names
    yield _filled(
        ["variant", "runs", main, "to the first", "95 % of runs", "all cases"]
        + ["to the first", "95 % of cases", "ahead", "behind"],
        [_cells(row) for row in rows if row.score == main],
    )
    if others:
        by_score = {(row.variant, row.score): _plus_minus(row) for row in rows}
        variants = dict.fromkeys(row.variant for row in rows)
        yield ["variant", *others], [[v, *(by_score[v, n] for n in others)] for v in variants]


def held_out_table(runs, names, groups):
    """(headings, rows of texts): each case with the fold that it was held out in, and its group.

    runs: as for `compare`; names: of scores, all of which are shown of one variant, of several the
    first; groups: {case: group}. Of several seeds it is the mean.
    """
    variants, values = list(dict.fromkeys(variant for variant, _, _ in runs)), {}
    columns = [(variant, names[0]) for variant in variants]
    heads = [f"{names[0]}, {variant}" for variant in variants]
    if len(variants) == 1:
        columns, heads = [(variants[0], name) for name in names], names
    for variant, (fold, _), rows in runs:
        for row, name in itertools.product(rows, names):
            own = values.setdefault((fold, groups.get(row["case"], ""), row["case"]), {})
            own.setdefault((variant, name), []).append(row[name])
    texts = [
        ["" if fold is None else str(fold), group, case]
        + [
            report.format_score(own.get(column) and statistics.fmean(own[column]), column[1])
            for column in columns
        ]
        for (fold, group, case), own in sorted(values.items())
    ]
    return _filled(["fold", "group", "case", *heads], texts)


def _filled(heads, texts):
    """A table without its columns that are empty."""
    filled = [any(column) for column in zip(*texts, strict=True)]
    heads, *texts = (list(itertools.compress(row, filled)) for row in (heads, *texts))
    return heads, texts


def _cells(row):
    return [
        *(row.variant, str(row.runs), _plus_minus(row)),
        *(_signed(row.difference), _interval(row.low, row.high)),
        f"{report.format_score(row.case_mean, row.score)} of {row.cases}",
        *(_signed(row.case_difference), _interval(row.case_low, row.case_high)),
        *("" if count is None else str(count) for count in (row.ahead, row.behind)),
    ]


def _plus_minus(row):
    values = [row.mean] if row.deviation is None else [row.mean, row.deviation]
    return " ± ".join(f"{value:.3f}" if value < 10 else f"{value:.1f}" for value in values)


def _signed(value):
    return "" if value is None else f"{value:+.3f}"


def _interval(low, high):
    return "" if low is None else report.interval_text((low, high), "+")


def print_table(console, heads, texts):
    table = Table(*(head.replace("_", " ") for head in heads))
    for name, column in zip(heads, table.columns, strict=True):
        column.justify = "left" if name in WORDS else "right"
    for row in texts[:MOST_ROWS]:
        table.add_row(*row)
    console.print(table)
    if len(texts) > MOST_ROWS:
        console.print(f"... and {len(texts) - MOST_ROWS} more in report.html")


def notes(rows, *, folds, choosing):
    """What a reader of the comparison must know, as sentences.

    folds: whether it is over folds; choosing: whether the held-out cases are those of validation.
    """
    yield (
        "mean ± standard deviation over runs (folds and seeds), where each run counts alike; of "
        "all cases, each case counts alike" + ", predicted by the runs that did not see it" * folds
    )
    if choosing:
        yield (
            "each run chose its threshold and smallest component on the cases that it is scored "
            "by, so scores are slightly too good, in all variants alike"
        )
    pairs = [row.pairs for row in rows if row.pairs]
    if pairs:
        yield (
            "differences are to the first variant at the same fold and seed, with 95 % intervals "
            "by Student's t over pairs of runs, and by the bootstrap over all cases"
        )
    if pairs and min(pairs) < FEW:
        yield f"intervals of {min(pairs)} pairs of runs are rough; {FEW} or more are needed"
    counts = [row.cases for row in rows if row.pairs]
    if counts and min(counts) < report.FEW:
        yield f"intervals of {min(counts)} cases are too narrow; {report.FEW} or more are needed"
