"""Numbers as people read them: 1.31M tokens, 3 min 12 s, 5.8 MB."""

from __future__ import annotations

import math
from typing import Any

MISSING = "\N{EN DASH}"
SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
DURATIONS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))


def count(value: float | None) -> str:
    """Three significant digits with k, M, B (1e9) or T (1e12): `1_310_720` is 1.31M. Below 10,000 it is exact."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 10_000:
        return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
    scale, letter = next(pair for pair in SCALES if abs(value) * 1.0005 >= pair[0])
    return f"{significant(value / scale)}{letter}"


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent: 0.0210, 4.02, 128."""
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(0, decimals)}f}"


def trimmed(number: str) -> str:
    """A number's text without zeros after the point that say nothing, its letter kept: 1.50M is 1.5M, 2.00 is 2."""
    digits = number.rstrip("kMBT")
    short = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return short + number[len(digits) :]


def short_count(value: float | None) -> str:
    """A count without zeros that say nothing, for round numbers: 500k, 1M, 1.25M."""
    return trimmed(count(value))


def size(value_bytes: float | None) -> str:
    """Decimal bytes: `5_800_000` is 5.80 MB."""
    if value_bytes is None:
        return MISSING
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value_bytes >= scale:
            return f"{significant(value_bytes / scale)} {unit}"
    return f"{value_bytes:.0f} B"


def duration(value_s: float | None) -> str:
    """Seconds as the two largest units: 0.4 s, 12 s, 3 min 12 s, 5 h 2 min, 3 d 4 h."""
    if value_s is None:
        return MISSING
    if value_s < 59.5:
        return f"{value_s:.1f} s" if value_s < 10 else f"{value_s:.0f} s"
    whole_s = round(value_s)
    unit_s, unit, part_s, part = next(row for row in DURATIONS if whole_s >= row[0])
    parts = whole_s % unit_s // part_s
    return f"{whole_s // unit_s} {unit}" + (f" {parts} {part}" if parts else "")


def decimal(value: float | None, digits: int = 4) -> str:
    """A measurement to `digits` significant digits, in scientific form where it is tiny."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value != 0 and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa} \N{MULTIPLICATION SIGN} 10{superscript(int(exponent))}"
    return significant(value, digits)


def measured(value: float | None, error: float | None) -> str:
    """A value to the digits that its error leaves it: 29.142 with an error of 0.41 is 29.14."""
    if value is None or not error or not math.isfinite(error):
        return decimal(value)
    return f"{value:,.{max(0, 1 - math.floor(math.log10(error)))}f}"


def superscript(value: int) -> str:
    return str(value).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(share: float | None, decimals: int = 1) -> str:
    """A share as 12.3 %; one that would round to nothing, though it is something, keeps a digit: 0.02 %."""
    if share is None:
        return MISSING
    rounded = f"{100 * share:.{decimals}f}"
    number = rounded if float(rounded) or not share else significant(100 * share, 1)
    return f"{number}\N{NARROW NO-BREAK SPACE}%"


def fact(name: str, value: Any) -> tuple[str, str]:
    """Label and text of a named value; the name's ending tells its unit (`_bytes`, `_s`), as everywhere in the code."""
    words = name.replace("_", " ") if name.islower() else name  # Q4_K_M is a name, not words
    if isinstance(value, bool):
        return words, "yes" if value else "no"
    if isinstance(value, int | float):
        if name.endswith("bytes"):
            return words.removesuffix("bytes").strip() or "size", size(value)
        if name.endswith("_per_s"):
            return words.removesuffix(" per s"), f"{count(value)}/s"
        if name == "seconds" or name.endswith("_s"):
            return words.removesuffix(" s"), duration(value)
        whole = isinstance(value, int) or abs(value) >= 10_000
        return words, count(value) if whole else trimmed(decimal(value))
    if isinstance(value, dict):
        return words, ", ".join(" ".join(fact(str(key), item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return words, ", ".join(fact("", item)[1] for item in value)
    return words, MISSING if value is None else str(value)
