import time

import pytest

from monitoring import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.23812, "0.2381"),
        (2.1234, "2.123"),
        (12.5, "12.5"),
        (312.44, "312.4"),
        (4321.7, "4322"),
        (12.0, "12"),
        (0.0, "0"),
        (1.2e-5, "1.2e-05"),
        (0.00042, "0.00042"),
        (3.5e7, "3.5e+07"),
        (-0.5, "-0.5"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert formatting.number(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(541e6, "541 MB"), (999.6e6, "1.0 GB"), (12.34e9, "12.3 GB"), (2e12, "2.0 TB"), (None, "–")],
)
def test_bytes_have_a_unit(count, text):
    assert formatting.format_bytes(count) == text


def test_a_part_is_shown_beside_its_whole():
    assert formatting.format_share(0.5e9, 64e9) == "500 MB of 64.0 GB"
    assert formatting.format_share(None, 64e9) == "– of 64.0 GB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (45.4, "45 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3569, "59 min"),
        (3570, "1 h 00 min"),
        (7799, "2 h 10 min"),
        (86400 * 3 + 4 * 3600, "3 d 4 h"),
        (-3, "0 s"),
        (None, "–"),
    ],
)
def test_lengths_of_time_have_two_units(seconds, text):
    assert formatting.duration(seconds) == text


def test_a_time_of_another_day_has_its_date(monkeypatch):
    monkeypatch.setattr(time, "localtime", time.gmtime)
    evening = 1_700_000_000  # 2023-11-14 22:13:20
    assert formatting.clock(evening, evening + 60) == "22:13:20"
    assert formatting.clock(evening, evening + 86400) == "14 Nov 22:13:20"
    assert formatting.clock(evening, evening + 86400 * 90) == "14 Nov 2023 22:13:20"
    assert formatting.clock(None, evening) == "–"


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7, None, 0, float("nan"), 7], "█ ▁ █"),
        ([3, 3, 3], "▄▄▄"),
        ([0.1 + 0.2, 0.3], "▄▄"),  # rounding is no curve
        ([1000, 100, 10, 1], "█▆▃▁"),  # by logarithms
        ([5], "▄"),
        ([None], ""),
        ([], ""),
    ],
)
def test_a_sparkline_goes_from_the_lowest_value_to_the_highest(values, curve):
    assert formatting.sparkline(values, 8) == curve


def test_a_long_curve_is_one_of_means():
    assert formatting.sparkline([2, 4, 6, 8, 12, 14, 16, 18], 4) == "▁▃▆█"
