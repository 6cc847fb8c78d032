"""Geometry of the charts and the text of numbers."""

from __future__ import annotations

import math

import pytest

from danube_ray.report import units
from danube_ray.report.plot import Scale, envelope, round_values, sample, smooth


def test_many_steps_are_thinned_and_keep_their_spikes() -> None:
    points = [(float(x), 3.0 + 0.001 * (x % 7)) for x in range(60_000)]
    points[31_415] = (31_415.0, 9.0)
    thinned = envelope(points, 400)
    assert len(thinned) <= 800
    assert (31_415.0, 9.0) in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)


def test_smoothing_keeps_a_constant_and_a_slope_and_is_not_late() -> None:
    assert smooth([4.2] * 50, span=5) == pytest.approx([4.2] * 50)
    slope = smooth([float(x) for x in range(200)], span=5)
    assert slope[60:140] == pytest.approx(range(60, 140), abs=1e-3)
    assert smooth([1.0, 5.0, 3.0], span=0.5) == [1.0, 5.0, 3.0]


def test_smoothing_takes_out_noise() -> None:
    smoothed = smooth([3.0 + (-1) ** x for x in range(100)], span=10)
    assert max(smoothed[10:90]) - min(smoothed[10:90]) < 0.2


@pytest.mark.parametrize(("count", "most"), [(3, 10), (10, 10), (60_000, 160)])
def test_a_sample_has_both_ends(count: int, most: int) -> None:
    indices = sample(count, most)
    assert (indices[0], indices[-1], len(indices)) == (0, count - 1, min(count, most))
    assert sorted(set(indices)) == indices


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1_310_720, [0, 250_000, 500_000, 750_000, 1_000_000, 1_250_000]), (3.2, 7.9, [4, 5, 6, 7]), (5, 5, [5])],
)
def test_axis_values_are_round(low: float, high: float, expected: list[float]) -> None:
    assert round_values(low, high, 6) == pytest.approx(expected)


def test_an_axis_places_its_ticks() -> None:
    assert Scale(0, 10).ticks(2, lambda value: f"{value:.0f}") == [(0.0, "0"), (50.0, "5"), (100.0, "10")]
    assert Scale(0, 10).tick(2.5, "x", downward=True) == (75.0, "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.count(0), "0"),
        (units.count(9_999), "9,999"),
        (units.count(12_345), "12.3k"),
        (units.count(1_310_720), "1.31M"),
        (units.count(999_900), "1.00M"),
        (units.count(6e12), "6.00T"),
        (units.count(None), units.MISSING),
        (units.short_count(1_000_000), "1M"),
        (units.short_count(100), "100"),
        (units.size(5_800_000), "5.80 MB"),
        (units.size(812), "812 B"),
        (units.duration(0.44), "0.4 s"),
        (units.duration(59.7), "1 min"),
        (units.duration(192), "3 min 12 s"),
        (units.duration(3_600), "1 h"),
        (units.duration(90_000), "1 d 1 h"),
        (units.decimal(0.00103, 3), "0.00103"),
        (units.decimal(119.234), "119.2"),
        (units.decimal(2.2e-5, 3).split()[0], "2.20"),
        (units.decimal(math.nan), units.MISSING),
        (units.measured(29.142, 0.41), "29.14"),
        (units.measured(1_234.5, 12.0), "1,234"),
        (units.measured(0.43751, None), "0.4375"),
        (units.percent(0.4331), "43.3\N{NARROW NO-BREAK SPACE}%"),
        (units.percent(0.0), "0.0\N{NARROW NO-BREAK SPACE}%"),
        (units.percent(1 / 6087), "0.02\N{NARROW NO-BREAK SPACE}%"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("kept_bytes", 11_263_200, ("kept", "11.3 MB")),
        ("step_s", 0.4, ("step", "0.4 s")),
        ("tokens", 1_310_720, ("tokens", "1.31M")),
        ("tokens_per_s", 20_412.2, ("tokens", "20.4k/s")),
        ("skipped", True, ("skipped", "yes")),
        ("levels", ["F16", "Q8_0"], ("levels", "F16, Q8_0")),
        ("learning_rate", 0.003, ("learning rate", "0.003")),
        ("by", {"web": 3}, ("by", "web 3")),
        ("revision", None, ("revision", units.MISSING)),
    ],
)
def test_facts_take_their_unit_from_their_name(name: str, value: object, expected: tuple[str, str]) -> None:
    assert units.fact(name, value) == expected
