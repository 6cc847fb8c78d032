"""The line charts: pretraining's loss with its tracks (the Danube reports' Figure 1) and post-training's losses."""

from __future__ import annotations

import bisect
import math
from itertools import accumulate

from danube_ray.report.plot import (
    Band,
    Chart,
    Line,
    Mark,
    Panel,
    Point,
    Readout,
    Scale,
    box,
    dots,
    envelope,
    path,
    sample,
    smooth,
)
from danube_ray.report.run import Row, Training
from danube_ray.report.units import count, short_count, significant, trimmed

INK = "var(--ink)"
BAD_EVENTS = ("skip", "rollback", "diverged", "hang", "refused")
MOST_MARKS = 200
RAW_BUCKETS, LINE_POINTS, READOUT_POINTS = 300, 500, 160


def loss_by_tokens(training: Training, colors: dict[str, str], unigram_entropy: float | None) -> Chart:
    """Training and validation loss by tokens over shaded stages; below, what the stages and the schedule set."""
    rows = training.train
    ends = list(accumulate(stage["tokens"] for stage in training.stages))
    x = Scale(0, rows[-1]["tokens"])
    panel, legend = loss_panel(training, "tokens", x, colors, unigram_entropy, "19rem")
    mixture = [mixture_panel(training, ends, x, colors)] if len(training.sources) > 1 else []
    return Chart(
        summary=f"Training loss over {count(x.high)} tokens, from {rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f}.",
        x_title="tokens trained",
        x_ticks=x.ticks(6, short_count),
        panels=[panel, *mixture, sequence_length_panel(training.stages, ends, x), learning_rate_panel(rows, x)],
        legend=legend,
        readout=readout(training, "tokens", x, colors),
        bands=stage_bands(training.stages, ends, x),
        marks=event_marks(training, x),
    )


def loss_by_step(training: Training, title: str, colors: dict[str, str]) -> Chart:
    """Loss by step of one fine-tuning run."""
    rows = training.train
    x = Scale(rows[0]["step"], rows[-1]["step"])
    panel, legend = loss_panel(training, "step", x, colors, None, "10rem")
    return Chart(
        summary=f"{title} loss over {rows[-1]['step']} steps, from {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}.",
        x_title="step",
        x_ticks=x.ticks(4, short_count),
        panels=[panel],
        legend=legend,
        readout=readout(training, "step", x, colors),
    )


def loss_panel(
    training: Training, key: str, x: Scale, colors: dict[str, str], unigram_entropy: float | None, height: str
) -> tuple[Panel, list[tuple[str, str, str]]]:
    """The loss axis and its legend: every logged loss faintly, their moving average, and validation by source."""
    points = [(row[key], row["loss"]) for row in training.train]
    average = smooth([loss for _, loss in points], span=max(4, len(points) / 60))
    smoothed = [(at, loss) for (at, _), loss in zip(points, average, strict=True)]
    by_source = validation_by_source(training, key)
    y = loss_scale(points, smoothed, by_source, unigram_entropy)

    lines = [Line("raw", INK, path(envelope(points, RAW_BUCKETS), x, y))]
    lines.append(Line("smooth", INK, path([smoothed[i] for i in sample(len(smoothed), LINE_POINTS)], x, y)))
    legend = [("smooth", INK, "training")]
    for source, series in by_source.items():
        color = colors.get(source, INK)
        lines += [Line("joined", color, path(series, x, y)), Line("dots", color, dots(series, x, y))]
        legend.append(("dots", color, f"validation: {source}"))
    note = None
    if unigram_entropy is not None and y.low <= unigram_entropy <= y.high:
        lines.append(Line("reference", INK, path([(x.low, unigram_entropy), (x.high, unigram_entropy)], x, y)))
        note = y.tick(unigram_entropy, f"unigram entropy {unigram_entropy:.2f}", downward=True)
    ticks = y.ticks(5, lambda loss: f"{loss:.3g}", downward=True)
    return Panel("loss, nats a token" if key == "tokens" else "training loss", height, lines, ticks, note), legend


def loss_scale(
    points: list[Point], smoothed: list[Point], by_source: dict[str, list[Point]], entropy: float | None
) -> Scale:
    """The range of the losses. Where the first 6 % of a run would take a third of the axis, they leave it at the top.

    The unigram entropy is in the range when that costs less than a third of it.
    """
    validation = [point for series in by_source.values() for point in series]
    early = points[0][0] + 0.06 * (points[-1][0] - points[0][0])
    low = min(loss for _, loss in points + validation)
    full = max(loss for _, loss in points + validation)
    high = max((loss for at, loss in smoothed + validation if at >= early), default=full)
    if entropy is not None and high < entropy < min(full, low + 1.5 * (high - low)):
        high = entropy
    if full - low < 1.5 * (high - low) or high == low:
        high = full
    margin = 0.04 * (high - low) or 0.5
    return Scale(low - margin, high + margin)


def validation_by_source(training: Training, key: str) -> dict[str, list[Point]]:
    """The validation points of each source, in order; a run that validates without sources has one called all."""
    series: dict[str, list[Point]] = {}
    for row in training.validation:
        for source, loss in (row.get("by_source") or {"all": row["loss"]}).items():
            if math.isfinite(loss):
                series.setdefault(source, []).append((row[key], loss))
    return series


def learning_rate_panel(rows: list[Row], x: Scale) -> Panel:
    """The learning rate in force, on an axis from zero to its peak."""
    points = [(row["tokens"], row["learning_rate"]) for row in rows]
    peak = max(rate for _, rate in points) or 1.0
    y = Scale(0, peak * 1.12)
    drawn = [points[i] for i in sample(len(points), LINE_POINTS)]
    ticks = [y.tick(0, "0", downward=True), y.tick(peak, short_scientific(peak), downward=True)]
    return Panel("learning rate", "3.6rem", [Line("track", INK, path(drawn, x, y))], ticks)


def sequence_length_panel(stages: list[Row], ends: list[int], x: Scale) -> Panel:
    """The sequence length of each stage; stages double it, so the axis is logarithmic."""
    lengths = [stage["sequence_length"] for stage in stages]
    y = Scale(math.log2(min(lengths)) - 0.6, math.log2(max(lengths)) + 0.6)
    corners = [
        (min(at, x.high), math.log2(length))
        for start, end, length in zip([0, *ends], ends, lengths, strict=False)
        for at in (start, end)
        if start < x.high
    ]
    ticks = [y.tick(math.log2(length), f"{length:,}", downward=True) for length in sorted(set(lengths))]
    height = f"{max(3.0, 1.15 * len(ticks) + 0.6):.2f}rem"
    return Panel("sequence length", height, [Line("track", INK, path(corners, x, y))], ticks)


def mixture_panel(training: Training, ends: list[int], x: Scale, colors: dict[str, str]) -> Panel:
    """Each source's share of the tokens, stacked, as far as the run has come."""
    y = Scale(0, 1)
    boxes: dict[str, str] = {}
    for stage, start, end in zip(training.stages, [0, *ends], ends, strict=False):
        total, below = sum(stage["shares"].values()), 0.0
        for source in training.sources if start < x.high else ():
            share = stage["shares"].get(source, 0) / total
            drawn = box(start, min(end, x.high), below, below + share, x, y)
            boxes[source] = boxes.get(source, "") + (drawn if share else "")
            below += share
    lines = [Line("area", colors.get(source, INK), drawn) for source, drawn in boxes.items()]
    return Panel("mixture", "2.4rem", lines, [])


def event_marks(training: Training, x: Scale) -> list[Mark]:
    """Where something happened to the run; the newest of them where they are many."""
    placed = [(training.tokens_at(row["step"]), row["event"] in BAD_EVENTS) for row in training.events[-MOST_MARKS:]]
    return [Mark(round(100 * x.share(at), 2), bad) for at, bad in placed if x.low <= at <= x.high]


def stage_bands(stages: list[Row], ends: list[int], x: Scale) -> list[Band]:
    """Where each stage lies on the x axis, as far as the run has come."""
    bands = []
    for number, (stage, start, end) in enumerate(zip(stages, [0, *ends], ends, strict=False), start=1):
        if start < x.high:
            left, right = x.share(start), x.share(min(end, x.high))
            bands.append(Band(number, stage["name"], round(100 * left, 2), round(100 * (right - left), 2)))
    return bands


def readout(training: Training, key: str, x: Scale, colors: dict[str, str]) -> Readout:
    """The values at some of the logged rows; validation is the last one known there."""
    rows = [training.train[i] for i in sample(len(training.train), READOUT_POINTS)]
    heads = [f"{count(row['tokens'])} tokens · step {row['step']:,}" for row in rows]
    if training.stages:
        heads = [f"{head} · {row['stage']}" for head, row in zip(heads, rows, strict=True)]
    series = [{"label": "training", "color": INK, "values": [f"{row['loss']:.3f}" for row in rows]}]
    for source, points in validation_by_source(training, key).items():
        places = [at for at, _ in points]
        known = [bisect.bisect_right(places, row[key]) for row in rows]
        values = [f"{points[index - 1][1]:.3f}" if index else "" for index in known]
        series.append({"label": source, "color": colors.get(source, INK), "values": values})
    happened: dict[int, str] = {}
    for event in training.events[-MOST_MARKS:]:
        nearest = min(range(len(rows)), key=lambda index: abs(rows[index]["step"] - event["step"]))
        happened[nearest] = event["event"]
    if happened:
        events = [happened.get(index, "") for index in range(len(rows))]
        series.append({"label": "event", "color": "var(--bad)", "values": events})
    rates = [short_scientific(row["learning_rate"]) for row in rows]
    series.append({"label": "learning rate", "color": "", "values": rates})
    if training.stages:
        speeds = [f"{count(row.get('tokens_per_s'))} tokens/s" for row in rows]
        series.append({"label": "speed", "color": "", "values": speeds})
    return Readout([round(x.share(row[key]), 4) for row in rows], heads, series)


def short_scientific(value: float) -> str:
    """A learning rate as people write it: 2e-4, 1.5e-3."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{trimmed(mantissa)}e{int(exponent)}" if value < 0.1 else trimmed(significant(value))
