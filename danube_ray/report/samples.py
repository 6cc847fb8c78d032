"""Documents to read on the page: of each reason, of each tenth of quality, and pairs side by side."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from itertools import accumulate, zip_longest
from typing import Any

from danube_ray.report.curated import (
    EXCERPT_CHARS,
    EXCERPT_LINES,
    Curated,
    Row,
    duplicate_pairs,
    excerpt,
    few,
    shown,
    visible,
)
from danube_ray.report.funnel import Loss
from danube_ray.report.plot import sample

Piece = tuple[str, bool]
SAMPLES, DECILE_SAMPLES, PAIRS = 4, 2, {"near_duplicate": 6, "duplicate": 2}
BARELY = 0.1  # of its bound: a document no further beyond it was just missed
COMPARED_CHARS, BEFORE_DIFFERENCE = 200_000, 140


def dropped(curated: Curated, lost: list[Loss]) -> list[dict[str, Any]]:
    """A few documents that each reason dropped, most frequent reason first; the one nearest its bound comes first."""
    by_source = [few(curated.files("dropped", source), "reason") for source in curated.counts]
    rows = []
    for loss in sorted(lost, key=lambda loss: -loss.count):
        pools = [pool.get(loss.reason, []) for pool in by_source]
        nearest = sorted((row for pool in pools for row in pool), key=curated.distance)[:1]
        barely = [row for row in nearest if curated.distance(row) <= BARELY]
        others = [row for row in in_turn(pools) if row not in barely]
        chosen = [*barely, *others][:SAMPLES]
        samples = [{**row, "why": curated.why(row), "barely": row in barely} for row in chosen]
        if samples:
            rows.append({"loss": loss, "samples": samples})
    return rows


def kept(curated: Curated) -> list[tuple[str, str, list[Row]]]:
    """Kept documents by decile of the quality score, best first, or by source where there are no scores.

    Each group is a title, what stands under it, and its rows.
    """

    def twentieth(score: float | None) -> int:
        return -1 if score is None or math.isnan(score) else min(int(score * 20), 19)

    by_source = {source: few(curated.files("kept", source), "quality", twentieth) for source in curated.counts}
    edges = deciles(curated.total("qualities"))
    if not edges:
        rows = {source: list(in_turn(list(pools.values())))[:SAMPLES] for source, pools in by_source.items()}
        return [(source, "", chosen) for source, chosen in rows.items() if chosen]
    groups = []
    for index in reversed(range(10)):
        low, high = edges[index], edges[index + 1] if index < 9 else float("inf")
        pools = [[row for bin, rows in pools.items() for row in rows if bin >= 0 and low <= row["quality"] < high]
                 for pools in by_source.values()]  # fmt: skip
        title = {9: "top 10 %", 0: "lowest 10 %"}.get(index, f"{90 - 10 * index} to {100 - 10 * index} %")
        if chosen := list(in_turn(pools))[:DECILE_SAMPLES]:
            groups.append((title, f"quality {low:.2f} to {edges[index + 1]:.2f}", chosen))
    return groups


def deciles(bins: dict[str, int]) -> list[float]:
    """The eleven edges of ten equal parts of the documents counted in twentieths; none where none are."""
    lows = sorted(bins, key=float)
    ends = list(accumulate(bins[low] for low in lows))
    if not ends or not ends[-1]:
        return []
    edges = []
    for part in range(11):
        wanted = ends[-1] * part / 10
        index = next(i for i, end in enumerate(ends) if end >= wanted and end)
        inside = (wanted - (ends[index] - bins[lows[index]])) / (bins[lows[index]] or 1)
        edges.append(float(lows[index]) + 0.05 * inside)
    return edges


def in_turn(pools: Iterable[list[Row]]) -> Iterable[Row]:
    """One of each pool after the other."""
    return (row for turn in zip_longest(*pools) for row in turn if row is not None)


def contamination(curated: Curated) -> dict[str, Any]:
    """Documents and items by benchmark, and some items beside the passages that hold them."""
    found = curated.manifest.get("contaminated") or {}
    path = curated.folder / "contamination.parquet"
    rows = few([path], "benchmark") if path.is_file() else {}
    pairs = []
    for row in (row for benchmark in rows.values() for row in (benchmark[i] for i in sample(len(benchmark), 3))):
        question, evidence = marked(row["question"] or "", row["evidence"] or "")
        pairs.append({**row, "question": question, "evidence": evidence})
    return {"benchmarks": found, "pairs": pairs} if found else {}


def quarantine(curated: Curated) -> list[dict[str, Any]]:
    """Reasons why records were unreadable, most frequent first, with the places and the bytes of a few."""
    total = curated.total("quarantined_by")
    by_source = [few(curated.files("quarantine", source), "reason") for source in curated.counts]
    rows = []
    for reason in sorted(total, key=lambda name: (-total[name], name)):
        chosen = list(in_turn([pool.get(reason, []) for pool in by_source]))[:SAMPLES]
        samples = [{**row, "sample": excerpt(row["sample"] or "", chars=160, lines=3)} for row in chosen]
        rows.append({"reason": reason, "count": total[reason], "samples": samples})
    return rows


def pairs(curated: Curated) -> list[dict[str, Any]]:
    """Duplicates beside what was kept in their place."""
    return [pair(*rows) for rows in duplicate_pairs(curated, PAIRS)]


def pair(dropped: Row, kept: Row) -> dict[str, Any]:
    """A dropped document beside the one kept in its place: both from just before their first difference on."""
    texts = [visible((row.get("text") or "")[:COMPARED_CHARS]) for row in (dropped, kept)]
    end = min(map(len, texts)) if texts[0] != texts[1] else 0  # equal ones are shown from their start
    same = next((place for place, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), end)
    start = texts[0].rfind(" ", 0, max(0, same - BEFORE_DIFFERENCE)) + 1
    parts = marked(*(("… " if start else "") + text[start:] for text in texts))
    sides = [{**shown(row), "parts": part} for row, part in zip((dropped, kept), parts, strict=True)]
    return {"dropped": sides[0], "kept": sides[1], "similarity": dropped.get("similarity")}


def marked(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """The starts of two texts in pieces, each with whether its words are missing from the other."""
    # More is compared than is shown, so that no difference comes from where the excerpts end.
    words = [re.findall(r"\s*\S+", excerpt(text, 2 * EXCERPT_CHARS, 2 * EXCERPT_LINES)) for text in (first, second)]
    bare = [[word.strip() for word in part] for part in words]
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, *ends in difflib.SequenceMatcher(None, *bare, autojunk=False).get_opcodes():
        for side, part, (low, high) in zip(sides, words, (ends[:2], ends[2:]), strict=True):
            text = "".join(part[low:high])
            space = len(text) - len(text.lstrip())
            side += [(text[:space], False), (text[space:], tag != "equal")]
    return cut(sides[0]), cut(sides[1])


def cut(pieces: list[Piece]) -> list[Piece]:
    """As many of the pieces as an excerpt holds."""
    text = "".join(text for text, _ in pieces)
    left = len(shortened := excerpt(text).removesuffix(" …"))
    kept = []
    for piece, apart in pieces:
        kept.append((piece[:left], apart))
        left -= len(kept[-1][0])
    return [*((piece, apart) for piece, apart in kept if piece), *([(" …", False)] if shortened != text else [])]
