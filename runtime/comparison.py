"""Variants compared by their runs: over folds and seeds, and case by case.

runs = [Scored("bce", (0, 0), [{"case": "a", "dice": 0.8}]), Scored("cldice", (0, 0), ...)]
compare(runs, "dice")       # a `Compared` for each variant, the first one first
"""

import statistics
from typing import NamedTuple

from rich.table import Table

from scoring import report

FEW = 5  # pairs of runs below which an interval says little


class Scored(NamedTuple):
    """A run: its variant, what it shares with a run of another (fold, seed), rows of its cases."""

    variant: str
    place: tuple
    rows: list


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


def compare(runs, name, first=None):
    """[`Compared`] of all variants by a score; first: the variant that the others are compared
    with, None: that of the first run. [] of no runs. Only pairs of runs are compared: what one
    variant lacks is left out of the other.
    """
    by_variant = {}
    for run in runs:
        by_variant.setdefault(run.variant, {})[run.place] = run.rows
    first = first or next(iter(by_variant), None)
    compared = []
    for variant, own in by_variant.items():
        means = _means(own, name)
        deviation = statistics.stdev(means.values()) if len(means) > 1 else None
        cases = _by_case(variant, own, own, name)
        row = Compared(variant, name, len(own), statistics.fmean(means.values()), deviation)
        row = row._replace(cases=len(cases), case_mean=statistics.fmean(c[name] for c in cases))
        if variant != first and (pairs := own.keys() & by_variant.get(first, {}).keys()):
            row = _against(row, own, first, by_variant[first], pairs)
        compared.append(row)
    return compared


def _against(row, own, first, others, pairs):
    """The row of a variant with its differences to another one in these pairs of runs."""
    name, (means, others_means) = row.score, (_means(runs, row.score) for runs in (own, others))
    differences = [means[place] - others_means[place] for place in sorted(pairs, key=str)]
    low, high = report.student_interval(differences) or (None, None)
    rows = _by_case(first, others, pairs, name) + _by_case(row.variant, own, pairs, name)
    standings = {s.method: s for s in report.leaderboard(rows, name, against=first)}
    one = standings[row.variant]
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


def _means(runs, name):
    """{place: mean over the cases of its run}."""
    return {place: statistics.fmean(row[name] for row in rows) for place, rows in runs.items()}


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


def headings(score):
    """Of the cells of a `Compared`."""
    return [
        *("variant", "runs", score.replace("_", " "), "to the first", "95 % of runs"),
        *("all cases", "to the first", "95 % of cases", "ahead", "behind"),
    ]


def cells(row):
    """The texts of a `Compared`, for people."""
    return [
        *(row.variant, str(row.runs), plus_minus(row)),
        *(_signed(row.difference), _interval(row.low, row.high)),
        f"{report.format_score(row.case_mean, row.score)} of {row.cases}",
        *(_signed(row.case_difference), _interval(row.case_low, row.case_high)),
        *("" if count is None else str(count) for count in (row.ahead, row.behind)),
    ]


def plus_minus(row):
    """The mean of a `Compared`, with its deviation where there are several runs."""
    deviation = "" if row.deviation is None else f" ± {row.deviation:.3f}"
    return report.format_score(row.mean, row.score) + deviation


def _signed(value):
    return "" if value is None else f"{value:+.3f}"


def _interval(low, high):
    return "" if low is None else report.interval_text((low, high), "+")


def print_table(console, rows, score):
    """The `Compared` rows of a score, then all other scores as mean and deviation."""
    main = [row for row in rows if row.score == score]
    others = list(dict.fromkeys(row.score for row in rows if row.score != score))
    tables = [(headings(score), [cells(row) for row in main])]
    tables += [(["variant", *others], other_scores(rows, others))] if others else []
    for heads, texts in tables:
        table = Table()
        for head in heads:
            left = head == "variant"
            table.add_column(head.replace("_", " "), justify="left" if left else "right")
        for row in texts:
            table.add_row(*row)
        console.print(table)
    for note in notes(main):
        console.print(f"note: {note}")


def other_scores(rows, names):
    """[variant, mean and deviation of each score] of each variant."""
    by_score = {(row.variant, row.score): plus_minus(row) for row in rows}
    variants = dict.fromkeys(row.variant for row in rows)
    return [[variant, *(by_score[variant, name] for name in names)] for variant in variants]


def notes(rows):
    """What a reader of the comparison must know, as sentences."""
    yield (
        "mean ± standard deviation over runs (folds and seeds); differences are to the first "
        "variant at the same fold and seed, with 95 % intervals by Student's t over pairs of runs, "
        "and by the bootstrap over all cases, each predicted by the runs that did not see it"
    )
    pairs = [row.pairs for row in rows if row.pairs]
    if pairs and min(pairs) < FEW:
        yield f"intervals of {min(pairs)} pairs of runs are rough; {FEW} or more are needed"
    counts = [row.cases for row in rows if row.pairs]
    if counts and min(counts) < report.FEW:
        yield f"intervals of {min(counts)} cases are too narrow; {report.FEW} or more are needed"
