"""Quantization on the page: the table of levels, size against divergence, scores, and what a long context costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from danube_ray.report.plot import Chart, Label, Line, Panel, Point, Readout, Scale, Tick, dots, path
from danube_ray.report.units import count, decimal, percent, size, superscript, trimmed

Row = dict[str, Any]

NUM_COLORS = 10
FLOOR = 1e-8  # nats: what two float32 computations of one model differ by anyway
PHONE_PX, HEIGHT_PX = 270, 300  # labels that don't overlap on the narrowest chart overlap nowhere
CHARACTER_PX, LINE_PX, DOT_PX = 6.6, 12, 9
SIDES = {  # of a dot, the first choice first
    "right": (1, 0), "left": (-1, 0), "above": (0, -1), "below": (0, 1),
    "above right": (1, -1), "below right": (1, 1), "above left": (-1, -1), "below left": (-1, 1),
}  # fmt: skip


def quantization(rows: Sequence[Row]) -> dict[str, Any]:
    """What the section shows; {} where no level was made. Rows are those of `quantization.json`."""
    if not rows:
        return {}
    quality = ("kld_mean", "kld_error", "kld_p99", "same_top", "perplexity", "perplexity_error", "reference_perplexity")
    missing = dict.fromkeys(quality)
    ranked = sorted(rows, key=lambda row: -row["bytes"])
    levels = [{**missing, **row, **speeds(row)} for row in ranked]
    judged = [row for row in levels if row["kld_mean"] is not None]
    far = [row for row in ranked if row.get("long_context")]
    return {
        "levels": levels,
        "judged": judged,
        "threads": sorted({row["speed_threads"] for row in rows if row.get("speed_threads")}),
        "fallbacks": [(row["level"], len(row["fallbacks"])) for row in ranked if row.get("fallbacks")],
        "spared": [row["level"] for row in ranked if row.get("imatrix")],
        "figure": size_against_divergence(judged) if len(judged) > 1 else None,
        "scores": [{"level": row["level"], **task} for row in ranked for task in row.get("tasks") or ()],
        "far": [{"level": row["level"], **row["long_context"]} for row in far],
        "far_figure": divergence_by_position(far) if far else None,
        "lengths": sorted({cell["length"] for row in far for cell in row["long_context"]["retrieval"]}),
    }


def speeds(row: Row) -> Row:
    """Whole tokens a second, where they were measured."""
    return {name: row.get(name) and round(row[name]) for name in ("tokens_per_s", "prompt_tokens_per_s")}


def found_at(check: Row, length: int, whose: str = "found") -> float:
    """The share of words found in prompts of one length, over all depths."""
    cells = [cell for cell in check["retrieval"] if cell["length"] == length]
    return sum(cell[whose] * cell["words"] for cell in cells) / sum(cell["words"] for cell in cells)


def size_against_divergence(levels: Sequence[Row]) -> Chart:
    """Each level at its size and mean KL divergence, both axes logarithmic, with the divergence's standard error."""
    same: dict[tuple[int, float], list[Row]] = {}
    for row in levels:
        same.setdefault((row["bytes"], row["kld_mean"]), []).append(row)  # levels of one content share a dot
    rows = [same[at][0] for at in sorted(same)]
    names = [", ".join(row["level"] for row in same[at]) for at in sorted(same)]
    places = [(math.log10(row["bytes"]), logarithm(row["kld_mean"])) for row in rows]
    x = padded(places[0][0], places[-1][0], 0.08)
    y = padded(min(kld for _, kld in places), max(kld for _, kld in places), 0.12)
    whiskers = "".join(
        path([(at, logarithm(row["kld_mean"] + sign * (row["kld_error"] or 0))) for sign in (-1, 1)], x, y)
        for (at, _), row in zip(places, rows, strict=True)
    )
    heads = [f"{name} · {size(row['bytes'])}" for name, row in zip(names, rows, strict=True)]
    lines = [Line("track", "var(--accent)", whiskers), Line("dots", "var(--accent)", dots(places, x, y))]
    title, labels = "mean KL divergence from the float model, nats a token", place_labels(places, names, x, y)
    series = {
        "KL divergence": [decimal(row["kld_mean"], 3) for row in rows],
        "99th percentile": [decimal(row["kld_p99"], 3) for row in rows],
        "same top token": [percent(row["same_top"], 2) for row in rows],
        "perplexity": [decimal(row["perplexity"]) for row in rows],
        "tokens/s": [count(row["tokens_per_s"]) for row in rows],
    }
    return Chart(
        summary=f"KL divergence by size: {'; '.join(heads)}, from {series['KL divergence'][0]} down.",
        x_title="size of the file",
        x_ticks=[x.tick(math.log10(value), trimmed_size(value)) for value in round_sizes(10**x.low, 10**x.high)],
        panels=[Panel(title, f"{HEIGHT_PX / 16:g}rem", lines, decades(y), labels=labels)],
        legend=[],
        readout=Readout(
            [round(x.share(at), 4) for at, _ in places],
            heads,
            [{"label": label, "color": "", "values": values} for label, values in series.items()],
        ),
    )


def divergence_by_position(levels: Sequence[Row]) -> Chart:
    """Mean KL divergence of each level over spans of positions that double in length; both axes logarithmic."""
    spans = levels[0]["long_context"]["by_position"]
    middles = [math.log2(max(1, span["start"] + span["end"]) / 2) for span in spans]
    values = {row["level"]: [span["kld_mean"] for span in row["long_context"]["by_position"]] for row in levels}
    every = [logarithm(kld) for klds in values.values() for kld in klds]
    x, y = padded(middles[0], middles[-1], 0.04), padded(min(every), max(every), 0.08)
    lines, legend = [], []
    for index, (level, klds) in enumerate(values.items()):
        color = f"var(--c{index % NUM_COLORS})"
        drawn = [(at, logarithm(kld)) for at, kld in zip(middles, klds, strict=True)]
        lines += [Line("joined", color, path(drawn, x, y)), Line("dots", color, dots(drawn, x, y))]
        legend.append(("dots", color, level))
    heads = [f"tokens {span['start']:,} to {span['end']:,}" for span in spans]
    return Chart(
        summary=f"KL divergence of {len(levels)} levels by position, up to {spans[-1]['end']:,} tokens.",
        x_title="position in the context",
        x_ticks=[x.tick(at, f"{span['start']:,}–{span['end']:,}") for at, span in zip(middles, spans, strict=True)],  # noqa: RUF001
        panels=[Panel("mean KL divergence, nats a token", "13rem", lines, decades(y))],
        legend=legend,
        readout=Readout(
            [round(x.share(at), 4) for at in middles],
            heads,
            [
                {"label": level, "color": color, "values": [decimal(kld, 3) for kld in klds]}
                for (level, klds), (_, color, _) in zip(values.items(), legend, strict=True)
            ],
        ),
    )


def logarithm(kld: float) -> float:
    """Of a divergence; rounding can leave that of a model from itself at or below zero."""
    return math.log10(max(kld, FLOOR))


def padded(low: float, high: float, share: float) -> Scale:
    margin = share * (high - low) or 0.5
    return Scale(low - margin, high + margin)


def decades(y: Scale) -> list[Tick]:
    """The powers of ten on a logarithmic axis, every other one where they are many; finer where there is hardly one."""
    powers = range(math.ceil(y.low), math.floor(y.high) + 1)
    if len(powers) < 2:
        values = [
            factor * 10.0**power for power in range(math.floor(y.low), math.ceil(y.high) + 1) for factor in (1, 2, 5)
        ]
        return [
            y.tick(math.log10(value), decimal(value, 1), downward=True)
            for value in values
            if y.low <= math.log10(value) <= y.high
        ]
    return [y.tick(power, f"10{superscript(power)}", downward=True) for power in powers[:: 1 + (len(powers) > 6)]]


def round_sizes(low: float, high: float) -> list[float]:
    """Round numbers of bytes from `low` to `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        values = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) >= 3:
            break
    return inside or [low]


def trimmed_size(value: float) -> str:
    number, unit = size(value).split(" ")
    return f"{trimmed(number)} {unit}"


def place_labels(places: Sequence[Point], names: Sequence[str], x: Scale, y: Scale) -> list[Label]:
    """A name beside each point, on the first side where it covers the least of dots and other names: mostly nothing."""
    at = [(PHONE_PX * x.share(place[0]), HEIGHT_PX * (1 - y.share(place[1]))) for place in places]
    taken = [(left - DOT_PX / 2, top - DOT_PX / 2, left + DOT_PX / 2, top + DOT_PX / 2) for left, top in at]
    labels = []
    for (left, top), name in zip(at, names, strict=True):
        boxes = {side: label_box(left, top, CHARACTER_PX * len(name), *way) for side, way in SIDES.items()}
        inside = {side: box for side, box in boxes.items() if box[0] >= 0 and box[2] <= PHONE_PX}
        side = min(inside or boxes, key=lambda side: sum(overlap(boxes[side], other) for other in taken))
        taken.append(boxes[side])
        labels.append(Label(round(100 * left / PHONE_PX, 2), round(100 * top / HEIGHT_PX, 2), name, side))
    return labels


def label_box(left: float, top: float, width: float, across: int, down: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a name beside a dot; `across` is -1 to its left, 1 to its right; `down` alike."""
    reach = DOT_PX if down == 0 else 0  # a name above or below may begin right over its dot
    start = left + (reach if across > 0 else -width - reach if across < 0 else -width / 2)
    upper = top + (DOT_PX if down > 0 else -LINE_PX - DOT_PX if down < 0 else -LINE_PX / 2)
    return start, upper, start + width, upper + LINE_PX


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The area that two boxes (left, top, right, bottom) share."""
    width, height = (min(one[end + 2], other[end + 2]) - max(one[end], other[end]) for end in (0, 1))
    return max(0, width) * max(0, height)
