"""Curate sources on Ray Data, one task a split: this file only spreads the splits and adds up what they counted.

A run killed anywhere and started again leaves the bytes of a run that was not killed.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from danube_ray.artifacts import (
    ArtifactError,
    commit,
    content_hash,
    file_hash,
    intact,
    publish,
    read_json,
    read_manifest,
    require_replaceable,
    work_folder,
    write_json,
)
from danube_ray.config import CurationConfig, require, to_dict
from danube_ray.curate.benchmarks import question_files
from danube_ray.curate.decontaminate import BenchmarkIndex
from danube_ray.curate.judging import Judging
from danube_ray.curate.quality import QualityModel
from danube_ray.curate.records import Split
from danube_ray.curate.sources import plan_splits
from danube_ray.curate.splits import final_hashes, finish_split, judge_split, judged_path
from danube_ray.curate.tables import CONTAMINATION, TableWriter
from danube_ray.report.curation import write_curation_report
from danube_ray.runtime.deduplication import deduplicate
from danube_ray.runtime.session import session
from danube_ray.runtime.splits import Progress, StepProgress, run_splits

# A part of every result's inputs: raise it when the judges, or what is written, change.
VERSION = 3
THROUGHPUT = "throughput.json"

Counts = dict[str, dict[str, Any]]


def curate(
    sources: Mapping[str, str | Path],
    out: Path,
    settings: CurationConfig | None = None,
    on_progress: StepProgress | None = None,
) -> dict[str, Any]:
    """Judge every record of `sources`, drop duplicates, and leave the folder `out`; returns its manifest.

    Of equally good duplicates the first source of `sources` keeps its copy. `out` appears complete, holding
    `documents`, `dropped` and `quarantine`, each `SOURCE/SPLIT.parquet`, and the manifest; beside what it names stand
    the report page and the throughput. One that is complete from the same input is verified and left as it is.

    Raises ConfigError before any work, and ArtifactError when more than `max_quarantine_share` of a source can't be
    read.
    """
    settings, out = settings or CurationConfig(), out.resolve()
    require(bool(sources), "sources", dict(sources), "at least one")
    for source in settings.rule_sets:
        require(source in sources, "rule_sets", source, f"one of the sources {', '.join(sources)}")
    _check_place(out, sources)

    model = QualityModel.load(settings.quality_model) if settings.quality_model else None
    splits = [
        split for source, path in sources.items() for split in plan_splits(source, str(path), settings.split_bytes)
    ]
    inputs = {
        "version": VERSION,
        "splits": [asdict(split) for split in splits],
        **_what_decides(settings, model),
    }
    work = work_folder(out, "curating", content_hash(inputs))
    if not intact(out, inputs):
        judging, left_out = Judging(content_hash(inputs), settings), {}
        if settings.benchmarks:
            index = BenchmarkIndex.build(settings.benchmarks)
            judging, left_out = replace(judging, benchmark_index=work / "benchmarks.safetensors"), index.left_out
            index.save(work / "benchmarks.safetensors")
        priorities = {source: rank for rank, source in enumerate(sources)}
        run = _Run(splits, judging, work, priorities, model is not None and model.has_encoder, on_progress)
        facts = run.curate()
        for name, number in left_out.items():
            facts["contaminated"].setdefault(name, {"documents": 0, "items": 0})["left_out"] = number
        _publish(work, out, splits, inputs=content_hash(inputs), curation_version=VERSION, **facts)
        write_json(out / THROUGHPUT, run.throughput)
    shutil.rmtree(work, ignore_errors=True)
    if not (out / "report.html").is_file():
        write_curation_report(out)
    return read_manifest(out)


@dataclass
class _Run:
    """One pass over the splits: judge, score, deduplicate, finish."""

    splits: list[Split]
    judging: Judging
    work: Path
    priorities: dict[str, int]
    has_encoder: bool
    on_progress: StepProgress | None

    def __post_init__(self) -> None:
        self.throughput: list[dict[str, Any]] = []

    def curate(self) -> dict[str, Any]:
        """All steps; the manifest's facts."""
        settings = self.judging.settings
        with session():
            judged = self._each_split("judge", partial(_judge, judging=self.judging, work=self.work))
            self._check_quarantine(judged)
            if settings.quality_model and self.has_encoder:
                # It brings torch, which the judging workers, who import this file, start seconds sooner without.
                from danube_ray.runtime.quality import score_splits

                folder = settings.quality_model
                self._timed("score", lambda report: score_splits(self.splits, self.work, folder, on_progress=report))
            self._timed("deduplicate", self._deduplicate)
            final = self._each_split("finish", partial(_finish, min_quality=settings.min_quality, work=self.work))
        return {
            "counts": self._counts(judged, final),
            "duplicates": read_json(self.work / "duplicates" / "summary.json"),
            "contaminated": self._gather_contamination(),
            "settings": _plain(settings, self.priorities),
        }

    def _deduplicate(self, report: Progress) -> None:
        settings = self.judging.settings
        near, least = settings.near_duplicates, settings.min_jaccard
        deduplicate(
            self.splits, self.work, priorities=self.priorities, near=near, min_jaccard=least, on_progress=report
        )

    def _each_split(self, step: str, task: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
        packed = [asdict(split) for split in self.splits]
        started = time.perf_counter()
        counts = run_splits(task, packed, lambda done: self._report(step)(done, len(packed)))
        wall_s = time.perf_counter() - started
        for source in self.priorities:
            spent = [row["spent"] for split, row in zip(self.splits, counts, strict=True) if split.source == source]
            sums = {name: sum(row[name] for row in spent) for name in ("documents", "bytes", "seconds")}
            self.throughput.append({"step": step, "source": source, **sums, "wall_s": wall_s})
        return counts

    def _timed(self, step: str, run: Callable[[Progress], Any]) -> None:
        started = time.perf_counter()
        run(self._report(step))
        self.throughput.append({"step": step, "source": None, "wall_s": time.perf_counter() - started})

    def _report(self, step: str) -> Progress:
        return partial(self.on_progress, step) if self.on_progress else lambda done, total: None

    def _check_quarantine(self, judged: Sequence[dict[str, Any]]) -> None:
        max_share = self.judging.settings.max_quarantine_share
        for source, counts in self._by_source(judged).items():
            quarantined = sum(counts["quarantined_by"].values())
            if quarantined > max_share * counts["read"]:
                reasons = ", ".join(f"{number} {reason}" for reason, number in counts["quarantined_by"].items())
                raise ArtifactError(
                    f"{quarantined} of {counts['read']} records of source {source!r} can't be read ({reasons}): over "
                    f"max_quarantine_share={max_share}; {self.work / 'final' / 'quarantine' / source} names them; mend "
                    f"or remove their files, or allow a larger share"
                )

    def _counts(self, judged: Sequence[dict[str, Any]], final: Sequence[dict[str, Any]]) -> Counts:
        """The manifest's counts, after checking that every record read lies in one of the three tables."""
        read, written = self._by_source(judged), self._by_source(final)
        counts = {}
        for source, found in written.items():
            dropped_by = Counter(read[source].pop("dropped_by")) + Counter(found.pop("dropped_late_by"))
            counts[source] = {"read": read[source].pop("read"), **found, "dropped_by": dict(dropped_by.most_common())}
            counts[source] |= read[source]
            total = found["kept"] + found["dropped"] + found["quarantined"]
            if total != counts[source]["read"] or dropped_by.total() != found["dropped"]:
                read_all = counts[source]["read"]
                raise ArtifactError(
                    f"source {source!r}: {read_all} records read, but {total} written: {counts[source]}"
                )
        return counts

    def _by_source(self, counts: Sequence[dict[str, Any]]) -> Counts:
        """Add up counts, and counts by reason or bin, over each source's splits; what was spent is left out."""
        by_source: Counts = {}
        for split, row in zip(self.splits, counts, strict=True):
            total = by_source.setdefault(split.source, {})
            for name, value in row.items():
                if name == "spent":
                    continue
                if isinstance(value, dict):
                    summed = Counter(total.get(name, {})) + Counter(value)
                    total[name] = dict(sorted(summed.items(), key=lambda item: (-item[1], item[0])))
                else:
                    total[name] = total.get(name, 0) + value
        return by_source

    def _gather_contamination(self) -> dict[str, dict[str, int]]:
        """Put the splits' tables of evaluation items into one; by benchmark, how many documents held how many items."""
        seen: dict[str, tuple[set[str], set[int]]] = {}
        with TableWriter(self.work / "final" / "contamination.parquet", CONTAMINATION) as gathered:
            for path in (judged_path(self.work, split, "contamination") for split in self.splits):
                table = pq.read_table(path) if path.is_file() else CONTAMINATION.empty_table()
                gathered.write(table)
                for row in table.select(["id", "benchmark", "item"]).to_pylist():
                    documents, items = seen.setdefault(row["benchmark"], (set(), set()))
                    documents.add(row["id"])
                    items.add(row["item"])
        return {name: {"documents": len(ids), "items": len(items)} for name, (ids, items) in sorted(seen.items())}


def _judge(packed: dict[str, Any], judging: Judging, work: Path) -> dict[str, Any]:
    return judge_split(Split.unpack(packed), judging, work)


def _finish(packed: dict[str, Any], min_quality: float, work: Path) -> dict[str, Any]:
    return finish_split(Split.unpack(packed), min_quality, work)


def _what_decides(settings: CurationConfig, model: QualityModel | None) -> dict[str, Any]:
    """All that the result depends on beside the splits: settings, and the contents of the files they name."""
    benchmarks = [(name, question_files(path)) for name, path in settings.benchmarks.items()]
    free = ("split_bytes", "max_quarantine_share", "blocked_urls", "blocked_words", "quality_model", "benchmarks")
    return {
        "settings": {name: value for name, value in to_dict(settings).items() if name not in free},
        "blocked_urls": [file_hash(path) for path in settings.blocked_urls],
        "blocked_words": [file_hash(path) for path in settings.blocked_words],
        "benchmarks": [(name, [file_hash(file) for file in files]) for name, files in benchmarks],
        "quality_model": model.sha256 if model else None,
    }


def _plain(settings: CurationConfig, sources: Iterable[str]) -> dict[str, Any]:
    """Settings for the manifest: the rules by source, and paths as text."""
    plain = to_dict(settings)
    plain["rules"] = {source: to_dict(settings.rules_of(source)) for source in sources}
    plain["quality_model"] = str(settings.quality_model) if settings.quality_model else None
    plain["benchmarks"] = {name: str(path) for name, path in settings.benchmarks.items()}
    for name in ("blocked_urls", "blocked_words"):
        plain[name] = [str(path) for path in plain[name]]
    return plain


def _publish(work: Path, out: Path, splits: Sequence[Split], **facts: Any) -> None:
    """Commit the finished tables and put them in the place of `out`."""
    final = work / "final"
    final.mkdir(parents=True, exist_ok=True)
    for torn in final.rglob(".*"):
        torn.unlink()  # what a killed task was writing
    commit(final, final_hashes(work, splits), **facts)
    publish(final, out)


def _check_place(out: Path, sources: Mapping[str, str | Path]) -> None:
    """Refuse an `out` whose replacement would remove something else, or that would be read as a source next time."""
    for source, path in sources.items():
        if "://" not in str(path):
            place = Path(path).resolve()
            apart = not out.is_relative_to(place) and not place.is_relative_to(out)
            require(apart, "out", str(out), f"a folder apart from source {source!r} in {path}")
    require_replaceable(out, "curation_version")
