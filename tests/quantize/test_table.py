from __future__ import annotations

import math

import numpy as np
import pytest

from danube_ray.config import ConfigError
from danube_ray.quantize.estimate import LevelSize
from danube_ray.quantize.table import by_size, fitting, parse_size, with_drop, within, without_nan

ROWS = [
    {"level": "Q4_0", "bytes": 560, "kld_mean": 0.002},
    {"level": "BF16", "bytes": 1600, "kld_mean": 1e-5},
    {"level": "F16", "bytes": 1600, "kld_mean": 1e-7},
    {"level": "Q4_K_M", "bytes": 580, "kld_mean": 0.001},
]
SIZES = [LevelSize(level=row["level"], bytes=row["bytes"], bits_per_weight=1, num_fallbacks=0, cache_bytes=0)
         for row in ROWS]  # fmt: skip


def test_rows_are_ordered_by_size_and_then_as_levels_are():
    assert [row["level"] for row in by_size(ROWS)] == ["F16", "BF16", "Q4_K_M", "Q4_0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.5GB", 2_500_000_000), ("700 MB", 700_000_000), ("2GiB", 2 * 2**30), ("1.5k", 1_500), ("123", 123), ("9b", 9)],
)
def test_sizes_are_decimal_unless_they_have_an_i(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "2.5XB", "-1GB", "2,5GB", "nan"])
def test_a_size_that_is_none_is_named(text):
    with pytest.raises(ConfigError, match=r"such as 2\.5GB"):
        parse_size(text)


def test_levels_that_fit_come_with_the_most_bits_first():
    assert fitting(SIZES, 1_599) == ["Q4_K_M", "Q4_0"]
    assert fitting(SIZES, 1_600)[0] in ("BF16", "F16")
    with pytest.raises(ConfigError, match="--target-size is '100 B', allowed is at least 560 B, this model at Q4_0"):
        fitting(SIZES, 100)


def test_the_smallest_file_within_a_divergence():
    assert within(ROWS, 0.01)["level"] == "Q4_0"
    assert within(ROWS, 0.001)["level"] == "Q4_K_M"
    assert within(ROWS, 1e-6)["level"] == "F16"
    with pytest.raises(ConfigError, match="allowed is at least 1e-07, what F16 has"):
        within(ROWS, 1e-9)
    with pytest.raises(ConfigError, match="levels is .*at least one that was measured"):
        within([], 0.01)


def test_a_drop_has_the_error_of_the_differences():
    facts = {"task": "arc", "metric": "acc", "stderr": 0.1, "n": 5, "prompts_sha256": "p"}
    theirs, mine = np.array([1.0, 1, 0, 1, 0]), np.array([1.0, 0, 0, 1, 0])
    (row,) = with_drop(
        [{**facts, "value": mine.mean(), "values": mine.tolist()}],
        [{**facts, "value": theirs.mean(), "values": theirs.tolist()}],
    )
    assert row["drop"] == pytest.approx(0.2) and row["reference"] == pytest.approx(0.6)
    assert row["drop_error"] == pytest.approx((theirs - mine).std(ddof=1) / math.sqrt(5))
    assert "values" not in row


def test_an_error_that_is_not_known_is_null():
    assert without_nan({"a": math.nan, "b": [{"c": math.nan, "d": 1.5}], "e": "nan"}) == {
        "a": None, "b": [{"c": None, "d": 1.5}], "e": "nan",
    }  # fmt: skip
