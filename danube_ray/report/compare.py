"""Two training runs side by side: settings that differ, losses at the same tokens, speed, and a page of both."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danube_ray.artifacts import ArtifactError, leaves
from danube_ray.report import units
from danube_ray.report.figures import INK, LINE_POINTS, RAW_BUCKETS, READOUT_POINTS, validation_by_source
from danube_ray.report.page import render
from danube_ray.report.plot import Chart, Line, Panel, Point, Readout, Scale, dots, envelope, path, sample, smooth
from danube_ray.report.run import Row, Training, read_run

COLORS = ("var(--c0)", "var(--c1)")
PLACES = 8  # token counts at which losses are compared
SETTLED = 0.03  # of the run: the fall of the first losses would take up the axis
IGNORED = ("name", "kind", "output_dir")


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common and what not. Pairs are (first run, second run); losses in nats a token.

    `averages` are the training losses' moving averages by tokens, `common` the stretch of tokens that both runs have,
    `validation` their last held-out losses by source within it, at `validated_tokens`. `speed` are medians over the
    logged steps, as text.
    """

    names: tuple[str, str]
    runs: tuple[Training, Training]
    settings: list[tuple[str, str, str]]
    averages: tuple[list[Point], list[Point]]
    common: tuple[float, float]
    validation: list[tuple[str, float | None, float | None]]
    validated_tokens: tuple[int | None, int | None]
    speed: list[tuple[str, str, str]]

    def losses(self, count: int = PLACES) -> list[tuple[float, float, float]]:
        """Tokens, and both runs' average losses there, at equal distances over the stretch that both have."""
        low, high = self.common
        places = [low + (high - low) * index / count for index in range(1, count + 1)]
        return [(place, at(self.averages[0], place), at(self.averages[1], place)) for place in places]


def compare(first: Path, second: Path) -> Comparison:
    """Compare the training runs in two folders; `ArtifactError` where one holds none, or both share no tokens."""
    runs = training_in(first), training_in(second)
    start, end = max(run.train[0]["tokens"] for run in runs), min(run.train[-1]["tokens"] for run in runs)
    if start > end:
        raise ArtifactError(f"{first} and {second} have no number of tokens in common: let them train further")
    last = last_validation(runs[0], end), last_validation(runs[1], end)
    losses = [{"all": row["loss"], **row.get("by_source", {})} if row else {} for row in last]
    return Comparison(
        names=names(first, second),
        runs=runs,
        settings=differing(runs[0].config, runs[1].config),
        averages=averages(runs, end),
        common=(start, end),
        validation=[(source, losses[0].get(source), losses[1].get(source)) for source in {**losses[0], **losses[1]}],
        validated_tokens=(last[0].get("tokens"), last[1].get("tokens")),
        speed=[row for row in (speed_row(runs, *fact) for fact in SPEED) if row is not None],
    )


def training_in(folder: Path) -> Training:
    """A folder's pretraining, or its only fine-tuning."""
    run = read_run(folder)
    found = [run.pretraining] if run.pretraining else list(run.posttraining.values())
    if len(found) != 1:
        raise ArtifactError(f"{folder} holds {len(found) or 'no'} training runs: name the folder of one")
    return found[0]


def names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' names, with those above them as far as it takes to tell them apart."""
    parts = first.resolve().parts, second.resolve().parts
    for length in range(1, max(map(len, parts)) + 1):
        shown = "/".join(parts[0][-length:]), "/".join(parts[1][-length:])
        if shown[0] != shown[1]:
            return shown
    return f"{first} (1)", f"{second} (2)"  # a run beside itself


def differing(first: Row, second: Row) -> list[tuple[str, str, str]]:
    """The settings with different values, by their dotted name; a dash where one of them has no such setting."""
    values = dict(leaves(first)), dict(leaves(second))
    every = dict.fromkeys([*values[0], *values[1]])
    pairs = ((name, values[0].get(name), values[1].get(name)) for name in every if name not in IGNORED)
    return [(name, setting(mine), setting(other)) for name, mine, other in pairs if mine != other]


def setting(value: Any) -> str:
    if value is None:
        return units.MISSING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def averages(runs: tuple[Training, Training], end: float) -> tuple[list[Point], list[Point]]:
    """Moving averages of both training losses by tokens, over equally many tokens and of what lies up to `end` alone.

    An average takes in what comes after, so the longer run is cut first; and where one run logs less often, its rows
    set how fine both averages can be.
    """
    rows = [[(row["tokens"], row["loss"]) for row in run.train if row["tokens"] <= end] for run in runs]
    spacings = [(points[-1][0] - points[0][0]) / max(1, len(points) - 1) or end for points in rows]
    width = max(end / 60, *(4 * spacing for spacing in spacings))
    first, second = (
        list(zip([x for x, _ in points], smooth([y for _, y in points], span=width / spacing), strict=True))
        for points, spacing in zip(rows, spacings, strict=True)
    )
    return first, second


def at(points: Sequence[Point], place: float) -> float:
    """The curve's value at `place`, on the straight line between its neighbours."""
    index = min(bisect.bisect_left(points, place, key=lambda point: point[0]), len(points) - 1)
    (left, before), (right, after) = points[max(0, index - 1)], points[index]
    return after if right == left else before + (after - before) * (place - left) / (right - left)


def last_validation(training: Training, end: float) -> Row:
    """The last validation up to `end` tokens; empty without one."""
    return next((row for row in reversed(training.validation) if row["tokens"] <= end), {})


SPEED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("tokens/s", "tokens_per_s", units.count),
    ("utilisation", "mfu", units.percent),
    ("memory", "memory_bytes", units.size),
    ("waiting for data", "data_wait_share", lambda share: units.percent(share, 2)),
    ("waiting for the network", "communication_share", lambda share: units.percent(share, 2)),
    ("a step", "step_s", lambda seconds: f"{units.significant(seconds)} s"),
)


def speed_row(
    runs: tuple[Training, Training], label: str, key: str, text: Callable[[float], str]
) -> tuple[str, str, str] | None:
    """The median of what the steps logged under `key`; None where neither run did."""
    values = [[row[key] for row in run.train if row.get(key) is not None] for run in runs]
    if not any(values):
        return None
    first, second = (text(statistics.median(of)) if of else units.MISSING for of in values)
    return label, first, second


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """Write the comparison's page, which opens from disk and asks nothing of the network; its path."""
    return render("compare.html", {"comparison": comparison, "colors": COLORS, "figure": chart_of(comparison)}, out)


def chart_of(comparison: Comparison) -> Chart:
    """Both runs' training loss by tokens, their difference, and each source's validation loss."""
    runs = comparison.runs
    x = Scale(0, max(run.train[-1]["tokens"] for run in runs))
    panels = [loss_panel(runs, x), difference_panel(comparison, x)]
    by_source = [validation_by_source(run, "tokens") for run in runs]
    for source in {**by_source[0], **by_source[1]}:
        panels.append(validation_panel(source, [series.get(source, []) for series in by_source], x))
    return Chart(
        summary=f"Training loss of {comparison.names[0]} and {comparison.names[1]} over {units.count(x.high)} tokens.",
        x_title="tokens trained",
        x_ticks=x.ticks(6, units.short_count),
        panels=panels,
        legend=[("smooth", color, name) for color, name in zip(COLORS, comparison.names, strict=True)],
        readout=readout(comparison, x),
    )


def loss_panel(runs: tuple[Training, Training], x: Scale) -> Panel:
    """Every logged loss faintly and the moving averages, on the axis that the averages after the first steps need."""
    curves = averages(runs, x.high)
    y = padded([value for curve in curves for place, value in curve if place >= SETTLED * x.high])
    lines = []
    for color, run, curve in zip(COLORS, runs, curves, strict=True):
        raw = [(row["tokens"], row["loss"]) for row in run.train]
        lines.append(Line("raw", color, path(envelope(raw, RAW_BUCKETS), x, y)))
        lines.append(Line("smooth", color, path([curve[i] for i in sample(len(curve), LINE_POINTS)], x, y)))
    return Panel("training loss", "17rem", lines, y.ticks(5, lambda loss: f"{loss:.3g}", downward=True))


def difference_panel(comparison: Comparison, x: Scale) -> Panel:
    """How far the second run's loss lies above the first's, over the stretch that both have."""
    points = [(place, second - first) for place, first, second in comparison.losses(LINE_POINTS)]
    y = padded([0.0, *(apart for place, apart in points if place >= SETTLED * x.high or place == points[-1][0])])
    zero = Line("reference", INK, path([(x.low, 0), (x.high, 0)], x, y))
    ticks = y.ticks(3, lambda loss: f"{loss:+.2g}" if loss else "0", downward=True)
    return Panel("second minus first", "5rem", [zero, Line("track", COLORS[1], path(points, x, y))], ticks)


def validation_panel(source: str, series: list[list[Point]], x: Scale) -> Panel:
    """One source's validation losses in both runs."""
    y = padded([loss for points in series for _, loss in points])
    lines = []
    for color, points in zip(COLORS, series, strict=True):
        lines += [Line("joined", color, path(points, x, y)), Line("dots", color, dots(points, x, y))]
    return Panel(f"validation: {source}", "5rem", lines, y.ticks(3, lambda loss: f"{loss:.3g}", downward=True))


def padded(values: list[float]) -> Scale:
    margin = 0.08 * (max(values) - min(values)) or 0.01
    return Scale(min(values) - margin, max(values) + margin)


def readout(comparison: Comparison, x: Scale) -> Readout:
    """Both moving averages and their difference, at some places of the stretch that both runs have."""
    places, first, second = zip(*comparison.losses(READOUT_POINTS), strict=True)
    pairs = zip(comparison.names, COLORS, (first, second), strict=True)
    rows: list[dict[str, Any]] = [
        {"label": name, "color": color, "values": [f"{loss:.4f}" for loss in losses]} for name, color, losses in pairs
    ]
    apart = [f"{theirs - mine:+.4f}" for mine, theirs in zip(first, second, strict=True)]
    rows.append({"label": "difference", "color": "", "values": apart})
    heads = [f"{units.count(place)} tokens" for place in places]
    return Readout([round(x.share(place), 4) for place in places], heads, rows)
