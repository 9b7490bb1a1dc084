"""Summaries, standings and intervals of scores."""

import numpy as np
import pytest

from scoring import report

CASES = "abcd"


def rows_of(**scores):
    """Rows of hd95 (lower is better) and dice of cases a, b, ... for each method."""
    return [
        {"case": case, "method": method, "hd95": value, "dice": 1 - value / 10}
        for method, values in scores.items()
        for case, value in zip(CASES, values, strict=False)
    ]


def test_worst_is_the_end_that_is_not_better():
    found = report.summary(rows_of(m=(1.0, 4.0, 2.0, 3.5)), ("hd95", "dice"))["m"]
    assert found["hd95"] == {"mean": 2.625, "median": 2.75, "worst": 4.0, "worst_case": "b"}
    assert (found["dice"]["worst"], found["dice"]["worst_case"]) == (0.6, "b")
    for name in ("hd95", "dice"):
        rows = report.worst_first(rows_of(m=(1.0, 4.0, 2.0)), "m", name)
        assert [row["case"] for row in rows] == ["b", "c", "a"]


def test_the_method_of_the_best_mean_leads_and_others_are_compared_case_by_case():
    rows = rows_of(far=(9.0, 5.0, 3.0), near=(8.0, 4.0, 3.0), mixed=(7.0, 4.5, 4.5))
    lead, second, last = report.leaderboard(rows, "hd95")
    assert (lead.method, lead.mean, lead.difference, lead.ahead) == ("near", 5.0, None, None)
    assert (second.method, second.ahead, second.behind) == ("mixed", 1, 2)
    assert second.difference == pytest.approx(1 / 3)
    assert (last.method, last.ahead, last.behind) == ("far", 0, 2)
    assert last.difference == pytest.approx(2 / 3)
    assert [one.method for one in report.leaderboard(rows, "dice")] == ["near", "mixed", "far"]


def test_a_difference_that_holds_in_every_case_has_an_interval_without_zero():
    cases = 12
    base = np.linspace(0.1, 0.9, cases)  # cases differ much more than methods
    rows = [
        {"case": str(i), "method": method, "dice": base[i] + gain}
        for method, gain in (("old", 0.0), ("new", 0.02))
        for i in range(cases)
    ]
    best, other = report.leaderboard(rows, "dice")
    assert best.method == "new"
    assert best.interval[0] < other.mean < best.interval[1]
    low, high = other.difference_interval
    assert low == pytest.approx(-0.02)
    assert high == pytest.approx(-0.02)


def test_the_interval_is_that_of_the_mean_of_a_normal_sample():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = report.bootstrap_interval(values)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.03)
    assert high == pytest.approx(values.mean() + error, abs=0.03)
    assert report.bootstrap_interval(values) == (low, high)  # the same sample each time


def test_one_case_has_no_interval():
    (found,) = report.leaderboard(rows_of(m=(1.0,)), "hd95")
    assert found.interval is None
    assert found.mean == 1.0
