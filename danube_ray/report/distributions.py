"""How a curation's documents are spread: by length, by quality and by language, the sources stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from danube_ray.report import units
from danube_ray.report.curated import Curated
from danube_ray.report.plot import Chart, Line, Panel, Readout, Scale, box

GAP = 0.04  # on either side of a bar, in bars
LANGUAGES = 12
TWENTIETH = 0.05
Bins = dict[str, dict[int, int]]  # by source: documents by the number of their bin


def lengths(curated: Curated, colors: dict[str, str]) -> Chart | None:
    """Documents by the power of two that their characters reach, kept above and dropped below."""
    panels = {"kept": bins(curated, "lengths", 1), "dropped": bins(curated, "lengths_dropped", 1)}
    return histogram(
        {name: part for name, part in panels.items() if part},
        colors,
        x_title="characters of a document",
        tick=power_of_two,
        head=lambda power: f"{2**power:,} to {2 ** (power + 1) - 1:,} characters",
    )


def qualities(curated: Curated, colors: dict[str, str]) -> Chart | None:
    """Kept documents by twentieths of the quality score."""
    return histogram(
        {"kept": bins(curated, "qualities", TWENTIETH)},
        colors,
        x_title="quality: the probability that a text is good",
        tick=lambda number: f"{number * TWENTIETH:.2f}",
        head=lambda number: f"quality {number * TWENTIETH:.2f} to {(number + 1) * TWENTIETH:.2f}",
    )


def bins(curated: Curated, key: str, width: float) -> Bins:
    by_source = {source: row.get(key) or {} for source, row in curated.counts.items()}
    return {
        source: {round(float(low) / width): n for low, n in row.items()} for source, row in by_source.items() if row
    }


def histogram(
    panels: dict[str, Bins], colors: dict[str, str], *, x_title: str, tick: Callable[[int], str],
    head: Callable[[int], str],
) -> Chart | None:  # fmt: skip
    """Bars over one axis, a panel each set of bins; None where there is nothing to show."""
    numbers = [number for part in panels.values() for row in part.values() for number in row]
    if not numbers:
        return None
    bars = range(min(numbers), max(numbers) + 1)
    x = Scale(bars.start, bars.stop)
    sources = [source for source in colors if any(source in part for part in panels.values())]
    rows: list[dict[str, Any]] = [
        {"label": name, "color": "", "values": column(list(part.values()), bars)} for name, part in panels.items()
    ]
    if len(sources) > 1:
        kept = next(iter(panels.values()))
        rows[1:1] = [{"label": source, "color": colors[source], "values": column([kept[source]], bars)}
                     for source in sources if source in kept]  # fmt: skip
    return Chart(
        summary=f"{x_title.capitalize()}, {' and '.join(panels)}: from {head(bars[0])} to {head(bars[-1])}.",
        x_title=x_title,
        x_ticks=[x.tick(number, tick(number)) for number in range(bars.start, bars.stop + 1, max(1, len(bars) // 6))],
        panels=[panel(f"documents {name}", part, bars, x, colors) for name, part in panels.items()],
        legend=[("block", colors[source], source) for source in sources],
        readout=Readout([x.share(number + 0.5) for number in bars], [head(number) for number in bars], rows),
    )


def panel(title: str, part: Bins, bars: range, x: Scale, colors: dict[str, str]) -> Panel:
    """Each bar's sources stacked, the first at the bottom."""
    y = Scale(0, max(sum(row.get(number, 0) for row in part.values()) for number in bars))
    below = dict.fromkeys(bars, 0)
    lines = []
    for source in (source for source in colors if source in part):
        drawn = ""
        for number, documents in sorted(part[source].items()):
            top = below[number] + documents
            drawn += box(number + GAP, number + 1 - GAP, below[number], top, x, y)
            below[number] = top
        lines.append(Line("area", colors[source], drawn))
    return Panel(title, "9rem", lines, y.ticks(3, units.short_count, downward=True))


def column(rows: list[dict[int, int]], bars: range) -> list[str]:
    """What the cursor says at each bar."""
    sums = [sum(row.get(number, 0) for row in rows) for number in bars]
    return [f"{documents:,}" if documents else "" for documents in sums]


def power_of_two(power: int) -> str:
    """Two to this power, as lengths are written: 512, 1k, 64k, 1M."""
    scale, letter = next(((scale, letter) for scale, letter in ((20, "M"), (10, "k")) if power >= scale), (0, ""))
    return f"{2 ** (power - scale)}{letter}"


def languages(curated: Curated) -> list[dict[str, Any]]:
    """The most frequent languages: documents judged by source, and whether the settings keep them."""
    total = curated.total("languages")
    ranked = sorted(total, key=lambda code: (-total[code], code))
    wanted = (curated.manifest.get("settings") or {}).get("languages") or ranked
    groups = [(code, [code]) for code in ranked[:LANGUAGES]]
    if others := ranked[LANGUAGES:]:
        groups.append((f"{len(others)} others", others))
    most, everything = max(total.values(), default=1), sum(total.values())
    rows = []
    for name, codes in groups:
        by_source = {source: sum(row.get("languages", {}).get(code, 0) for code in codes)
                     for source, row in curated.counts.items()}  # fmt: skip
        number = sum(by_source.values())
        parts = [(source, n, n / most) for source, n in by_source.items() if n]
        kept = any(code in wanted for code in codes)
        rows.append({"name": name, "kept": kept, "count": number, "share": number / everything, "parts": parts})
    return rows
