"""The second chart of a pretraining run: how fast it went, what it waited for, and how steady it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

from danube_ray.report.figures import (
    INK,
    LINE_POINTS,
    RAW_BUCKETS,
    READOUT_POINTS,
    event_marks,
    short_scientific,
    stage_bands,
)
from danube_ray.report.plot import Chart, Line, Panel, Point, Readout, Scale, dots, envelope, path, sample, smooth
from danube_ray.report.run import Row, Training
from danube_ray.report.units import count, percent, short_count, significant, size, trimmed

DATA, NETWORK = "var(--c1)", "var(--c3)"


def machine_by_tokens(training: Training) -> Chart | None:
    """Speed, utilisation, waiting, memory and gradient norm by tokens, of which only what the run logged."""
    rows = training.train
    x = Scale(0, rows[-1]["tokens"])
    guard = [(training.tokens_at(row["step"]), row["gap"]) for row in training.guard if math.isfinite(row["gap"])]
    kinds = [("data", DATA, "data_wait_share"), ("the network", NETWORK, "communication_share")]
    waits = [(what, color, series(rows, key)) for what, color, key in kinds if series(rows, key)]
    waiting = "waiting, share of time" if len(waits) > 1 else "waiting for data, share of time"
    panels = [
        from_zero("speed, tokens/s", x, [(INK, series(rows, "tokens_per_s"))], short_count, "6rem"),
        from_zero("model-FLOPs utilisation", x, [(INK, series(rows, "mfu"))], whole_percent, "4rem"),
        from_zero(waiting, x, [(color, points) for _, color, points in waits], short_percent),
        from_zero("memory", x, [(INK, series(rows, "memory_bytes"))], short_size),
        norm_panel(series(rows, "grad_norm"), x),
        guard_panel(guard, x),
    ]
    drawn = [panel for panel in panels if panel is not None]
    if not drawn:
        return None
    ends = list(accumulate(stage["tokens"] for stage in training.stages))
    return Chart(
        summary=f"Speed, waiting, memory and gradient norm over {count(x.high)} tokens.",
        x_title="tokens trained",
        x_ticks=x.ticks(6, short_count),
        panels=drawn,
        legend=[("smooth", color, f"waiting for {what}") for what, color, _ in waits],
        readout=readout(rows, x),
        bands=stage_bands(training.stages, ends, x),
        marks=event_marks(training, x),
    )


def series(rows: list[Row], key: str) -> list[Point]:
    """The places and values of the rows that have a number under `key`."""
    found = ((row["tokens"], row.get(key)) for row in rows)
    return [(at, value) for at, value in found if value is not None and math.isfinite(value)]


def from_zero(
    title: str, x: Scale, lines: list[tuple[str, list[Point]]], text: Callable[[float], str], height: str = "3.6rem"
) -> Panel | None:
    """Curves on an axis that begins at zero, smoothed over their every value; None where there is nothing to draw."""
    present = [(color, points) for color, points in lines if points]
    if not present:
        return None
    y = Scale(0, 1.12 * max(value for _, points in present for _, value in points) or 1.0)
    drawn = [line for color, points in present for line in smoothed(points, color, x, y)]
    return Panel(title, height, drawn, y.ticks(2, text, downward=True))


def smoothed(points: list[Point], color: str, x: Scale, y: Scale) -> list[Line]:
    """Every value faintly, and the moving average."""
    average = smooth([value for _, value in points], span=max(1.5, len(points) / 100))
    kept = [(points[index][0], average[index]) for index in sample(len(points), LINE_POINTS)]
    raw = Line("raw", color, path(envelope(points, RAW_BUCKETS), x, y))
    return [raw, Line("track", color, path(kept, x, y))]


def norm_panel(points: list[Point], x: Scale) -> Panel | None:
    """The gradient's norm before clipping; its peaks are many times its mean, so the axis is logarithmic."""
    positive = [(at, math.log10(value)) for at, value in points if value > 0]
    if not positive:
        return None
    low, high = min(value for _, value in positive), max(value for _, value in positive)
    y = Scale(low - 0.1, high + 0.1)
    powers = range(math.floor(low), math.ceil(high) + 1)
    digits = (1,) if high - low > 2 else (1, 3) if high - low > 0.8 else (1, 1.5, 2, 3, 5, 7)
    values = [digit * 10**power for power in powers for digit in digits]
    ticks = [y.tick(math.log10(value), f"{value:g}", downward=True) for value in values]
    inside = [(at, label) for at, label in ticks if 0 <= at <= 100]
    return Panel("gradient norm", "4.4rem", smoothed(positive, INK, x, y), inside[:: -(-len(inside) // 4) or 1])


def guard_panel(points: list[Point], x: Scale) -> Panel | None:
    """How far FP8's loss lies above bf16's on the same batches, relative, around zero."""
    if not points:
        return None
    gaps = [0.0, *(gap for _, gap in points)]
    margin = 0.15 * (max(gaps) - min(gaps)) or 0.01
    y = Scale(min(gaps) - margin, max(gaps) + margin)
    zero = Line("reference", INK, path([(x.low, 0), (x.high, 0)], x, y))
    lines = [zero, Line("joined", INK, path(points, x, y)), Line("dots", INK, dots(points, x, y))]
    return Panel("loss in FP8 above bf16", "4rem", lines, y.ticks(3, short_percent, downward=True))


def readout(rows: list[Row], x: Scale) -> Readout:
    """The values at some of the logged rows."""
    shown = [rows[index] for index in sample(len(rows), READOUT_POINTS)]
    heads = [f"{count(row['tokens'])} tokens · step {row['step']:,}" for row in shown]
    columns: list[tuple[str, str, str, Callable[[float], str]]] = [
        ("speed", "", "tokens_per_s", lambda value: f"{count(value)} tokens/s"),
        ("utilisation", "", "mfu", percent),
        ("waiting for data", DATA, "data_wait_share", short_percent),
        ("waiting for the network", NETWORK, "communication_share", short_percent),
        ("memory", "", "memory_bytes", size),
        ("gradient norm", "", "grad_norm", significant),
        ("learning rate", "", "learning_rate", short_scientific),
    ]
    table = [
        {"label": label, "color": color, "values": ["" if row.get(key) is None else text(row[key]) for row in shown]}
        for label, color, key, text in columns
        if series(rows, key)
    ]
    return Readout([round(x.share(row["tokens"]), 4) for row in shown], heads, table)


def whole_percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NARROW NO-BREAK SPACE}%" if share else "0"


def short_percent(share: float) -> str:
    """A share that may be small, without zeros that say nothing: 0, 0.4 %, 12 %."""
    return f"{trimmed(significant(100 * share, 2))}\N{NARROW NO-BREAK SPACE}%" if share else "0"


def short_size(value_bytes: float) -> str:
    """A round size as an axis has it: 50 GB."""
    number, _, unit = size(value_bytes).partition(" ")
    return f"{trimmed(number)} {unit}" if value_bytes else "0"
