"""What the scores of many cases say of the methods: mean, median, worst, and who is ahead of whom.

    rows = [{"case": "a", "method": "new", "dice": 0.9}, {"case": "a", "method": "old", ...}, ...]
    summary(rows, ("dice",))["new"]["dice"]      # mean, median, worst, worst_case
    standings(rows, "dice")                      # the best method first, each against that

Methods are compared case by case: a difference that holds in every case counts, however much the
cases differ. Intervals are of the bootstrap over cases (Efron 1979, percentiles).
"""

import statistics
from typing import NamedTuple

import numpy as np

from scoring import metrics

RESAMPLES = 10_000
LEVEL = 0.95
FEW = 10  # cases below which such an interval is known to be too narrow


class Standing(NamedTuple):
    """A method and its mean score; then the same of its difference to the best method.

    interval, difference_interval: (low, high), None of fewer than 2 cases; ahead, behind: of how
    many cases. Of the best method all but the first three are None.
    """

    method: str
    mean: float
    interval: tuple | None
    difference: float | None = None
    difference_interval: tuple | None = None
    ahead: int | None = None
    behind: int | None = None


def methods_of(rows):
    return list(dict.fromkeys(row["method"] for row in rows))


def summary(rows, names):
    """{method: {score: {"mean", "median", "worst", "worst_case"}}} of the rows of all cases.

    The last two are None for a score that is better at no end. Of several worst cases the first.
    """
    return {
        method: {name: _summary([r for r in rows if r["method"] == method], name) for name in names}
        for method in methods_of(rows)
    }


def _summary(rows, name):
    values = [row[name] for row in rows]
    better = metrics.entry(name)[0].better
    worst = {"higher": min, "lower": max}.get(better)
    worst = worst(values) if worst else None
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "worst": worst,
        "worst_case": None if worst is None else rows[values.index(worst)]["case"],
    }


def worst_cases(rows, method, name):
    """Cases of a method, the worst by a score first."""
    sign = -1 if metrics.entry(name)[0].better == "lower" else 1
    found = [row for row in rows if row["method"] == method]
    return [row["case"] for row in sorted(found, key=lambda row: sign * row[name])]


def standings(rows, name):
    """[`Standing`] of all methods by the mean of a score, the best first."""
    scores = {
        method: np.array([row[name] for row in rows if row["method"] == method], float)
        for method in methods_of(rows)
    }
    sign = -1 if metrics.entry(name)[0].better == "lower" else 1
    best, *others = sorted(scores, key=lambda method: -sign * scores[method].mean())
    found = [Standing(best, float(scores[best].mean()), bootstrap_interval(scores[best]))]
    for method in others:
        difference = scores[method] - scores[best]
        found.append(
            Standing(
                method,
                float(scores[method].mean()),
                bootstrap_interval(scores[method]),
                float(difference.mean()),
                bootstrap_interval(difference),
                int(np.count_nonzero(sign * difference > 0)),
                int(np.count_nonzero(sign * difference < 0)),
            )
        )
    return found


def bootstrap_interval(values):
    """(low, high) of the mean of values that were drawn by chance; None of fewer than 2."""
    if len(values) < 2:
        return None
    from scipy.stats import bootstrap  # late: half a second

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
