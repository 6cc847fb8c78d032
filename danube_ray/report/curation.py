"""The page of a finished curation: what came in, what each rule took, what was left, and documents of each to read."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from danube_ray.artifacts import read_json
from danube_ray.report import samples, units
from danube_ray.report.curated import Curated, Row, read_curated
from danube_ray.report.distributions import languages, lengths, qualities
from danube_ray.report.funnel import findings, funnel, group_of, losses
from danube_ray.report.page import NUM_COLORS, render


def write_curation_report(folder: Path) -> Path:
    """Write `report.html` into a finished curation folder and return its path.

    The page is one file without any request, and what documents say is text in it, never markup. Its samples are the
    same whenever it is written, and read a bounded part of the folder, however large that is. Raises `ArtifactError`
    where the folder holds no finished curation.
    """
    curated = read_curated(folder)
    return render("curation.html", page(curated), curated.folder / "report.html")


def page(curated: Curated) -> dict[str, Any]:
    """Everything that the template shows; a section that is empty or None is left out."""
    colors = {source: f"var(--c{index % NUM_COLORS})" for index, source in enumerate(curated.counts)}
    throughput = read_throughput(curated.folder)
    lost = losses(curated)
    total = {name: sum(row.get(name, 0) for row in curated.counts.values())
             for name in ("read", "kept", "dropped", "quarantined", "kept_bytes")}  # fmt: skip
    return {
        "name": curated.folder.resolve().name,
        "colors": colors,
        "sources": [{"source": source, **row} for source, row in curated.counts.items()],
        "total": total,
        "headline": headline(curated, total, throughput),
        "findings": findings(lost),
        "funnel": funnel(curated, lost),
        "losses": lost,
        "groups": [(group, list(part)) for group, part in groupby(lost, key=group_of)],
        "dropped": samples.dropped(curated, lost),
        "kept": samples.kept(curated),
        "lengths": lengths(curated, colors),
        "qualities": qualities(curated, colors),
        "languages": languages(curated),
        "duplicates": duplicates(curated),
        "pairs": samples.pairs(curated),
        "contamination": samples.contamination(curated),
        "quarantine": samples.quarantine(curated),
        "skipped": curated.total("skipped_by"),
        "masked": masked(curated),
        "throughput": throughput,
        "settings": json.dumps(curated.manifest.get("settings") or {}, indent=2),
        "version": curated.manifest["curation_version"],
        "inputs": curated.manifest.get("inputs", ""),
    }


def headline(curated: Curated, total: dict[str, int], throughput: list[Row]) -> list[tuple[str, str, str]]:
    """The few numbers that a reader looks for first: label, value, and what stands under it."""
    read = total["read"] or 1
    tiles = [
        ("kept", units.percent(total["kept"] / read), f"{units.count(total['kept'])} of {units.count(total['read'])}"),
        ("text kept", units.size(total["kept_bytes"]), "UTF-8"),
    ]
    if found := curated.manifest.get("duplicates"):
        number = found.get("exact", 0) + found.get("near", 0)
        tiles.append(("duplicates", units.count(number), f"{units.count(found.get('near', 0))} of them near"))
    tiles.append(("quarantined", units.count(total["quarantined"]), f"{units.percent(total['quarantined'] / read, 2)}"))
    if found := curated.manifest.get("contaminated"):
        number = sum(row["documents"] for row in found.values())
        tiles.append(("evaluation items", units.count(number), "documents dropped"))
    if judged := [row for row in throughput if row["step"] == "judge" and row["bytes_per_s"]]:
        speed = sum(row["bytes"] for row in judged) / sum(row["seconds"] for row in judged)
        tiles.append(("speed", f"{units.size(speed)}/s", "a core, judging"))
    return tiles


def duplicates(curated: Curated) -> dict[str, Any]:
    """Exact and near-duplicates, and clusters by size, sizes over four put together by powers of two."""
    found = curated.manifest.get("duplicates") or {}
    sizes = {int(size): number for size, number in (found.get("clusters") or {}).items()}
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for size, number in sorted(sizes.items()):
        power = max(2, (size - 1).bit_length() - 1)
        span = (size, size) if size <= 4 else (2**power + 1, 2 ** (power + 1))
        groups.setdefault(span, []).append((size, number))
    most = max((sum(n for _, n in part) for part in groups.values()), default=1)
    rows = [
        {"size": f"{low}" if low == high else f"{low} to {high:,}", "clusters": sum(n for _, n in part),
         "dropped": sum(n * (size - 1) for size, n in part), "share": sum(n for _, n in part) / most}
        for (low, high), part in groups.items()
    ]  # fmt: skip
    return {**found, "sizes": rows, "largest": max(sizes, default=0)} if found else {}


def masked(curated: Curated) -> list[dict[str, Any]]:
    """What was masked, kind by kind, in all and by source."""
    total = curated.total("masked")
    return [
        {"kind": kind, "count": total[kind],
         "sources": {source: row.get("masked", {}).get(kind, 0) for source, row in curated.counts.items()}}
        for kind in sorted(total, key=lambda kind: -total[kind]) if total[kind]
    ]  # fmt: skip


def read_throughput(folder: Path) -> list[Row]:
    """The rows of `throughput.json`, with rates a core where they can be told."""
    path = folder / "throughput.json"
    rows = []
    for stated in read_json(path) if path.is_file() else []:
        row = {"source": None, "documents": None, "bytes": None, "seconds": None, "wall_s": None, **stated}
        for name in ("documents", "bytes"):
            row[f"{name}_per_s"] = row[name] / row["seconds"] if row[name] and row["seconds"] else None
        rows.append(row)
    return rows
