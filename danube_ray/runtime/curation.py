"""Curate sources on Ray Data, one task a split: this file only spreads the splits and adds up what they counted.

A run killed anywhere and started again leaves the bytes of a run that was not killed.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from danube_ray.artifacts import (
    ArtifactError,
    commit,
    content_hash,
    damage,
    finished,
    read_manifest,
    require_replaceable,
    work_folder,
)
from danube_ray.config import require
from danube_ray.curate.dedup import as_bytes, keepers
from danube_ray.curate.extract import plan_splits
from danube_ray.curate.heuristics import WEB_RULES, HeuristicRules
from danube_ray.curate.records import Part, Split
from danube_ray.curate.splits import DUPLICATE, finish_split, judge_split, read_fingerprints
from danube_ray.runtime.session import session
from danube_ray.runtime.splits import Progress, run_splits

# A part of every result's inputs: raise it when the rules, or what is written, change.
VERSION = 1


@dataclass(frozen=True)
class _Settings:
    """What every task of a curation shares. `rules` holds the sources in order of priority."""

    rules: dict[str, HeuristicRules]
    max_document_bytes: int
    work: Path


def curate(
    sources: Mapping[str, Path],
    out: Path,
    *,
    rules: HeuristicRules | Mapping[str, HeuristicRules] = WEB_RULES,
    split_bytes: int = 8 * 2**20,
    max_document_bytes: int = 10 * 2**20,
    max_quarantine_share: float = 0.05,
    on_progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Judge every record of `sources`, drop exact duplicates, and leave the folder `out`; returns its counts.

    Of a duplicate the first source of `sources` keeps its copy. `rules` may differ by source. `on_progress(done,
    total)` counts steps, two a split. `out` appears complete, holding `documents`, `dropped` and `quarantine`, each
    `SOURCE/SPLIT.parquet`, and the manifest; one that is complete from the same input is verified and left as it is.

    Raises ConfigError before any work, and ArtifactError when more than `max_quarantine_share` of a source can't be
    read.
    """
    require(bool(sources), "sources", dict(sources), "at least one")
    require(0 <= max_quarantine_share <= 1, "max_quarantine_share", max_quarantine_share, "between 0 and 1")
    for name, value in (("split_bytes", split_bytes), ("max_document_bytes", max_document_bytes)):
        require(value > 0, name, value, "greater than 0")
    if not isinstance(rules, HeuristicRules):
        require(set(rules) == set(sources), "rules", sorted(rules), f"one for each of {', '.join(sources)}")
    rules_by_source = {name: rules if isinstance(rules, HeuristicRules) else rules[name] for name in sources}
    out = out.resolve()
    _check_place(out, sources)

    splits = [split for source, path in sources.items() for split in plan_splits(source, path, split_bytes)]
    inputs = {
        "version": VERSION,
        "splits": [asdict(split) for split in splits],
        "rules": [[name, asdict(chosen)] for name, chosen in rules_by_source.items()],
        "max_document_bytes": max_document_bytes,
    }
    work = work_folder(out, "curating", content_hash(inputs))
    if not (finished(out, inputs) and damage(out) is None):
        settings = _Settings(rules_by_source, max_document_bytes, work)
        counts = _curate_splits(splits, settings, max_quarantine_share, on_progress)
        _publish(work / "final", out, inputs=content_hash(inputs), curation_version=VERSION, counts=counts)
    shutil.rmtree(work, ignore_errors=True)
    return read_manifest(out)["counts"]


def _curate_splits(
    splits: list[Split], settings: _Settings, max_quarantine_share: float, on_progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Both steps over all splits, with the choice among duplicates between them; counts by source."""
    report, total = on_progress or (lambda done, total: None), 2 * len(splits)
    packed = [asdict(split) for split in splits]
    with session():
        judged = run_splits(partial(_judge, settings=settings), packed, lambda done: report(done, total))
        _check_quarantine(_sum_by_source(splits, judged), max_quarantine_share, settings.work)
        duplicates = zip(packed, _duplicates(splits, settings), strict=True)
        final = run_splits(
            partial(_finish, settings=settings), list(duplicates), lambda done: report(len(splits) + done, total)
        )
    return _counts_by_source(splits, judged, final)


def _judge(packed: dict[str, Any], settings: _Settings) -> dict[str, Any]:
    split = _unpacked(packed)
    return judge_split(split, settings.rules[split.source], settings.max_document_bytes, settings.work)


def _finish(packed: tuple[dict[str, Any], dict[str, str]], settings: _Settings) -> dict[str, Any]:
    split, duplicates = packed
    return finish_split(_unpacked(split), {int(row): kept_id for row, kept_id in duplicates.items()}, settings.work)


def _unpacked(fields: dict[str, Any]) -> Split:
    return Split(fields["source"], fields["root"], tuple(Part(**part) for part in fields["parts"]))


def _duplicates(splits: list[Split], settings: _Settings) -> list[dict[int, str]]:
    """For each split: the rows of its documents that repeat another one, with the (hex) id that is kept."""
    order = {source: priority for priority, source in enumerate(settings.rules)}
    pairs = [read_fingerprints(split, settings.work) for split in splits]
    fingerprints, ids = (np.concatenate(column) for column in zip(*pairs, strict=True))
    sizes = [len(prints) for prints, _ in pairs]
    kept = keepers(fingerprints, np.repeat([order[split.source] for split in splits], sizes), ids)
    ends = np.cumsum(sizes)
    duplicates: list[dict[int, str]] = [{} for _ in splits]
    for row in np.flatnonzero(kept != np.arange(len(kept))).tolist():
        index = int(np.searchsorted(ends, row, side="right"))
        duplicates[index][row - int(ends[index]) + sizes[index]] = as_bytes(ids[kept[row]]).hex()
    return duplicates


def _check_quarantine(judged: dict[str, dict[str, Any]], max_share: float, work: Path) -> None:
    for source, counts in judged.items():
        quarantined = sum(counts["quarantined_by"].values())
        if quarantined > max_share * counts["read"]:
            reasons = ", ".join(f"{number} {reason}" for reason, number in counts["quarantined_by"].items())
            raise ArtifactError(
                f"{quarantined} of {counts['read']} records of source {source!r} can't be read ({reasons}): over "
                f"max_quarantine_share={max_share}; they are named in {work / 'final' / 'quarantine' / source}; "
                f"mend or remove their files, or allow a larger share"
            )


def _counts_by_source(
    splits: list[Split], judged: list[dict[str, Any]], final: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The manifest's counts, after checking that every record read lies in one of the three tables."""
    read, written = _sum_by_source(splits, judged), _sum_by_source(splits, final)
    counts = {}
    for source, found in written.items():
        duplicates = found.pop("duplicates")
        dropped_by = read[source]["dropped_by"] | ({DUPLICATE: duplicates} if duplicates else {})
        counts[source] = {"read": read[source]["read"], **found, "dropped_by": dropped_by}
        counts[source]["quarantined_by"] = read[source]["quarantined_by"]
        total = found["kept"] + found["dropped"] + found["quarantined"]
        if total != read[source]["read"]:
            raise ArtifactError(f"source {source!r}: {read[source]['read']} records read, but {total} written: {found}")
    return counts


def _sum_by_source(splits: list[Split], counts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add up counts, and counts by reason (most frequent reason first), over each source's splits."""
    by_source: dict[str, dict[str, Any]] = {}
    for split, row in zip(splits, counts, strict=True):
        total = by_source.setdefault(split.source, {})
        for name, value in row.items():
            if isinstance(value, dict):
                total[name] = dict((Counter(total.get(name, {})) + Counter(value)).most_common())
            else:
                total[name] = total.get(name, 0) + value
    return by_source


def _publish(final: Path, out: Path, **facts: Any) -> None:
    """Commit the finished tables and put them in the place of `out`."""
    final.mkdir(parents=True, exist_ok=True)
    for torn in final.rglob(".*"):
        torn.unlink()  # what a killed task was writing
    commit(final, **facts)
    shutil.rmtree(out, ignore_errors=True)
    final.replace(out)


def _check_place(out: Path, sources: Mapping[str, Path]) -> None:
    """Refuse an `out` whose replacement would remove something else, or that would be read as a source next time."""
    for source, path in sources.items():
        apart = not out.is_relative_to(path.resolve()) and not path.resolve().is_relative_to(out)
        require(apart, "out", str(out), f"a folder apart from source {source!r} in {path}")
    require_replaceable(out, "curation_version")
