"""Geometry of line charts that fit any width: SVG paths in a unit box, labels as HTML beside them.

The box is stretched to the page (`preserveAspectRatio="none"`, strokes that don't scale), so one drawing serves a
desktop and a phone, text keeps its size, and colours come from the page's style sheet. Labels are placed in per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

BOX = 1000  # side of the SVG's view box
NICE_STEPS = (1, 2, 2.5, 5, 10)

Point = tuple[float, float]
Tick = tuple[float, str]


@dataclass(frozen=True)
class Line:
    """One drawn series: `kind` is a class of the style sheet (raw, smooth, joined, dots, track, area, reference)."""

    kind: str
    color: str
    path: str


@dataclass(frozen=True)
class Label:
    """A point's name, in per cent from the left and the top, on its right or left, above or below it."""

    left: float
    top: float
    text: str
    side: str


@dataclass(frozen=True)
class Panel:
    """One y axis over the shared x axis. Ticks are (per cent from the top, label)."""

    title: str
    height: str
    lines: list[Line]
    ticks: list[Tick]
    note: Tick | None = None
    labels: list[Label] = field(default_factory=list)


@dataclass(frozen=True)
class Band:
    """A shaded span of the x axis, in per cent of its width."""

    number: int
    name: str
    left: float
    width: float


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place of the x axis, in per cent of its width. `bad` marks stand out."""

    at: float
    bad: bool


@dataclass(frozen=True)
class Readout:
    """What the cursor says at each of some x positions (0 to 1): a head line, and a value for each series."""

    at: list[float]
    heads: list[str]
    rows: list[dict[str, str | list[str]]]


@dataclass(frozen=True)
class Chart:
    """Panels stacked over one x axis. Ticks of x are (per cent from the left, label)."""

    summary: str
    x_title: str
    x_ticks: list[Tick]
    panels: list[Panel]
    legend: list[tuple[str, str, str]]
    readout: Readout
    bands: list[Band] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """A range of values laid along an axis."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high one."""
        return (value - self.low) / ((self.high - self.low) or 1)

    def ticks(self, target: int, text: Callable[[float], str], downward: bool = False) -> list[Tick]:
        """About `target` round values and where they lie, in per cent (from the top for a y axis)."""
        return [self.tick(value, text(value), downward) for value in round_values(self.low, self.high, target)]

    def tick(self, value: float, label: str, downward: bool = False) -> Tick:
        share = self.share(value)
        return round(100 * (1 - share if downward else share), 2), label


def round_values(low: float, high: float, target: int) -> list[float]:
    """About `target` values from `low` to `high` that are 1, 2, 2.5 or 5 times a power of ten apart."""
    rough = (high - low) / target
    if rough <= 0:
        return [low]
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in NICE_STEPS if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Weighted mean around each value, weights falling off exponentially over about `span` values on both sides."""
    decay = 1 - 1 / max(1.0, span)
    before, after = _decayed_sums(values, decay), _decayed_sums(values[::-1], decay)[::-1]
    return [
        (ahead + behind - value) / (ahead_weight + behind_weight - 1)  # the value itself stands in both sums
        for value, (ahead, ahead_weight), (behind, behind_weight) in zip(values, before, after, strict=True)
    ]


def _decayed_sums(values: Sequence[float], decay: float) -> list[tuple[float, float]]:
    """At each value: the sum of it and of those before it, decayed by their distance, and the sum of those weights."""
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        sums.append((total, weight))
    return sums


def envelope(points: Sequence[Point], buckets: int) -> list[Point]:
    """At most two points a bucket, its lowest and its highest in order of x: thinned, with every spike kept."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = []
    for index in range(buckets):
        bucket = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def sample(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """The SVG path through points in data coordinates."""
    return "".join(f"{'L' if index else 'M'}{_place(point, x, y)}" for index, point in enumerate(points))


def box(left: float, right: float, low: float, high: float, x: Scale, y: Scale) -> str:
    """A closed rectangle in data coordinates."""
    return path([(left, low), (left, high), (right, high), (right, low)], x, y) + "Z"


def dots(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """A path of zero-length strokes: with round caps, dots that stay round however the box is stretched."""
    return "".join(f"M{_place(point, x, y)}h0" for point in points)


def _place(point: Point, x: Scale, y: Scale) -> str:
    return f"{BOX * x.share(point[0]):.1f} {BOX * (1 - y.share(point[1])):.1f}"
