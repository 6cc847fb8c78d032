"""Curate sources on Ray Data: one task a split, each leaving its own files; this file only spreads and adds up.

Ray Data carries the splits and nothing else. What a task has finished is known by the record it wrote last, so a run
killed anywhere starts again, verifies what is there, does the rest, and leaves the bytes of a run that was not killed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from danube_ray.artifacts import MANIFEST, ArtifactError, commit, content_hash, damage, finished, read_manifest
from danube_ray.config import require
from danube_ray.curate.dedup import as_bytes, keepers
from danube_ray.curate.extract import Part, Split, plan_splits
from danube_ray.curate.heuristics import WEB_RULES, HeuristicRules
from danube_ray.curate.splits import DUPLICATE, finish_split, judge_split, read_fingerprints
from danube_ray.runtime.session import session

# A part of every result's inputs: raise it when the rules, or what is written, change.
VERSION = 1

Progress = Callable[[int, int], None]
Row = dict[str, Any]


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
    work = out.parent / f".{out.name}.curating-{content_hash(inputs)[:16]}"
    _remove_work(out, keep=work)
    if not (finished(out, inputs) and damage(out) is None):
        settings = _Settings(rules_by_source, max_document_bytes, work)
        counts = _curate_splits(splits, settings, max_quarantine_share, on_progress)
        _publish(work / "final", out, inputs=content_hash(inputs), curation_version=VERSION, counts=counts)
    _remove_work(out)
    return read_manifest(out)["counts"]


def _curate_splits(
    splits: list[Split], settings: _Settings, max_quarantine_share: float, on_progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Both steps over all splits, with the choice among duplicates between them; counts by source."""
    rows = [{"index": index, "split": json.dumps(asdict(split))} for index, split in enumerate(splits)]
    report = on_progress or (lambda done, total: None)
    with session():
        judge = partial(_run_step, step=_judge, settings=settings)
        judged = _map_splits(judge, rows, lambda done: report(done, 2 * len(rows)))
        _check_quarantine(_sum_by_source(splits, judged), max_quarantine_share, settings.work)
        for row, duplicates in zip(rows, _duplicates(splits, settings), strict=True):
            row["duplicates"] = json.dumps(duplicates)
        finish = partial(_run_step, step=_finish, settings=settings)
        final = _map_splits(finish, rows, lambda done: report(len(rows) + done, 2 * len(rows)))
    return _counts_by_source(splits, judged, final)


def _map_splits(
    run_step: Callable[[Row], Row], rows: list[Row], on_done: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Run a step on every row, each as a Ray Data task of its own; the counts they return, in the rows' order."""
    counts: list[dict[str, Any]] = [{}] * len(rows)
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run_step)
    for done, row in enumerate(dataset.iter_rows(), start=1):
        outcome = json.loads(row["outcome"])
        if "error" in outcome:
            raise OSError(*outcome["error"])
        counts[row["index"]] = outcome["counts"]
        on_done(done)
    return counts


def _run_step(row: Row, step: Callable[[Row, _Settings], dict[str, Any]], settings: _Settings) -> Row:
    """One task. A disk that is full or gone comes back as a value: Ray would rewrite the exception's words."""
    try:
        outcome = {"counts": step(row, settings)}
    except OSError as error:
        outcome = {"error": [error.errno, error.strerror, error.filename]}
    return {"index": row["index"], "outcome": json.dumps(outcome, default=str)}


def _judge(row: Row, settings: _Settings) -> dict[str, Any]:
    split = _unpacked(row["split"])
    return judge_split(split, settings.rules[split.source], settings.max_document_bytes, settings.work)


def _finish(row: Row, settings: _Settings) -> dict[str, Any]:
    duplicates = {int(index): kept_id for index, kept_id in json.loads(row["duplicates"]).items()}
    return finish_split(_unpacked(row["split"]), duplicates, settings.work)


def _unpacked(split: str) -> Split:
    fields = json.loads(split)
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


def _remove_work(out: Path, keep: Path | None = None) -> None:
    """Remove the hidden folders beside `out` where curations of it worked, but for the one from the same inputs."""
    for work in out.parent.glob(f".{out.name}.curating-*"):
        if work != keep:
            shutil.rmtree(work)


def _check_place(out: Path, sources: Mapping[str, Path]) -> None:
    """Refuse an `out` whose replacement would remove something else, or that would be read as a source next time."""
    for source, path in sources.items():
        apart = not out.is_relative_to(path.resolve()) and not path.resolve().is_relative_to(out)
        require(apart, "out", str(out), f"a folder apart from source {source!r} in {path}")
    ours = (out / MANIFEST).is_file() and "curation_version" in read_manifest(out)
    require(
        ours or not out.exists() or (out.is_dir() and not any(out.iterdir())),
        "out",
        str(out),
        "a new or empty folder, or one that an earlier curation wrote",
        "choose another folder, or remove this one",
    )
