"""The two steps of curating one split: judge what is in it, then part its documents from their duplicates.

Each step writes whole files and, last, a record of their hashes. A step whose record verifies is not done again, and
one that was cut off anywhere is done again from its start, so that the bytes left are the same either way. Between the
two, documents may be scored again and duplicates are chosen; both leave tables about rows of the judged documents.

    work/judged/SOURCE/SPLIT.{documents,dropped,signatures,contamination}.parquet   what the judges said
    work/{scored,duplicates}/SOURCE/SPLIT.parquet                                   what was decided since
    work/final/{documents,dropped,quarantine}/SOURCE/SPLIT.parquet                  what curation leaves
    work/records/{judged,final}/SOURCE/SPLIT.json                                   the commits
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.artifacts import ArtifactError, file_hash, read_json, write_json
from danube_ray.curate.dedup import band_keys, fingerprint
from danube_ray.curate.judging import Judged, Judging, judge_for
from danube_ray.curate.readers import Reading, read_split
from danube_ray.curate.records import Document, Quarantined, Skipped, Split
from danube_ray.curate.tables import (
    CONTAMINATION,
    DOCUMENTS,
    DROPPED,
    DUPLICATES,
    QUARANTINE,
    SCORED,
    SIGNATURES,
    TableWriter,
)

DOCUMENTS_AT_ONCE = 256
CHARS_AT_ONCE = 2**24
QUALITY_BINS = 20


def document_id(source: str, url: str, text: str) -> bytes:
    """The 16 bytes that name a document wherever it goes; tables hold them as 32 hex digits."""
    return hashlib.blake2b("\0".join((source, url, text)).encode(), digest_size=16).digest()


def judge_split(split: Split, judging: Judging, work: Path) -> dict[str, Any]:
    """Read and judge a split; how much was `read`, and counts by reason, kind, language and mask."""
    if (done := verified(work, "judged", split)) is not None:
        return done
    started = time.perf_counter()
    judge, settings = judge_for(judging, split.source), judging.settings
    by = {name: Counter[str]() for name in ("dropped_by", "quarantined_by", "skipped_by", "languages", "masked")}
    num_read = num_bytes = 0
    paths = {name: judged_path(work, split, name) for name in ("documents", "dropped", "signatures", "contamination")}
    paths |= {"quarantine": _final(work, split, "quarantine")}
    with (
        TableWriter(paths["documents"], DOCUMENTS) as documents,
        TableWriter(paths["dropped"], DROPPED) as dropped,
        TableWriter(paths["signatures"], SIGNATURES) as signatures,
        TableWriter(paths["quarantine"], QUARANTINE) as quarantine,
        TableWriter(paths["contamination"], CONTAMINATION) as contamination,
    ):
        for item in _some_documents(read_split(split, Reading(settings.max_document_bytes, settings.extraction))):
            if isinstance(item, Skipped):
                by["skipped_by"][item.kind] += 1
                continue
            if isinstance(item, Quarantined):
                num_read += 1
                by["quarantined_by"][item.reason] += 1
                bad = {"offset": item.offset, "reason": item.reason, "sample": item.sample}
                quarantine.add({"source": split.source, "url": item.file, **bad}, len(item.sample))
                continue
            num_read += len(item)
            for document, judged in zip(item, judge(item), strict=True):
                num_bytes += len(document.text)
                row = _row(split.source, document, judged)
                by["languages"][judged.language or "none"] += 1
                by["masked"].update(judged.masked)
                if judged.reason is not None:
                    by["dropped_by"][judged.reason] += 1
                    dropped.add({**row, "reason": judged.reason}, len(judged.text))
                    for match in _matches(row, judged):
                        contamination.add(match)
                    continue
                documents.add(row, len(judged.text))
                bands = band_keys(judged.words) if settings.near_duplicates and judged.words is not None else None
                packed = None if bands is None else bands.astype("<u8").tobytes()
                signatures.add({"fingerprint": fingerprint(judged.text), "bands": packed})
    counts: dict[str, Any] = {name: dict(counter.most_common()) for name, counter in by.items()}
    spent = {"documents": num_read, "bytes": num_bytes, "seconds": time.perf_counter() - started}
    return commit_files(work, "judged", split, list(paths.values()), {**counts, "read": num_read, "spent": spent})


def finish_split(split: Split, min_quality: float, work: Path) -> dict[str, Any]:
    """Write a judged split's final tables; counts of their rows, and histograms of what was kept and dropped."""
    if (counts := verified(work, "final", split)) is not None:
        return counts
    started = time.perf_counter()
    qualities, duplicates = read_qualities(split, work), _read(decided_path(work, split, "duplicates"), DUPLICATES)
    late: dict[int, dict[str, Any]] = {row["row"]: row for row in duplicates.to_pylist()}
    # Of equal documents the best is kept: where that one is not good enough, the others weren't either.
    late |= {row: {"reason": "min_quality"} for row in np.flatnonzero(qualities < min_quality).tolist()}
    paths = {name: _final(work, split, name) for name in ("documents", "dropped")}
    kept_counts, dropped_counts = Counter[str](), Counter[str]()
    histogram = Counter[str]()
    kept_bytes = row = 0
    with (
        TableWriter(paths["documents"], DOCUMENTS) as documents,
        TableWriter(paths["dropped"], DROPPED) as dropped,
    ):
        for table in _row_groups(judged_path(work, split, "dropped")):
            dropped_counts.update(_length_bins(table))
            dropped.write(table)
        for table in _row_groups(judged_path(work, split, "documents")):
            here = range(row, row + table.num_rows)
            row += table.num_rows
            table = _with_column(table, "quality", pa.array(qualities[here.start : here.stop], from_pandas=True))
            reasons = [late.get(number, {}) for number in here]
            columns = {name: pa.array([why.get(name) for why in reasons], DROPPED.field(name).type)
                       for name in ("reason", "duplicate_of", "similarity")}  # fmt: skip
            kept = table.filter(columns["reason"].is_null())
            kept_bytes += sum(len(text.encode()) for text in kept["text"].to_pylist())
            kept_counts.update(_length_bins(kept))
            histogram.update(_quality_bins(kept))
            documents.write(kept)
            for name, column in columns.items():
                table = table.append_column(DROPPED.field(name), column)
            gone = table.filter(columns["reason"].is_valid())
            dropped_counts.update(_length_bins(gone))
            dropped.write(gone)
    quarantine = _final(work, split, "quarantine")
    counts = {
        "kept": documents.num_rows,
        "dropped": dropped.num_rows,
        "dropped_late_by": dict(Counter(why["reason"] for why in late.values()).most_common()),
        "quarantined": pq.read_metadata(quarantine).num_rows if quarantine.is_file() else 0,
        "kept_bytes": kept_bytes,
        "lengths": dict(sorted(kept_counts.items())),
        "lengths_dropped": dict(sorted(dropped_counts.items())),
        "qualities": dict(sorted(histogram.items())),
        "spent": {"documents": row, "bytes": kept_bytes, "seconds": time.perf_counter() - started},
    }
    return commit_files(work, "final", split, list(paths.values()), counts)


def read_qualities(split: Split, work: Path) -> np.ndarray:
    """(N,) float64, the quality of each of a judged split's documents, as scored last; NaN where unscored."""
    judged = judged_path(work, split, "documents")
    if not judged.is_file():
        return np.empty(0)
    column = pq.read_table(judged, columns=["quality"])["quality"]
    qualities = column.to_numpy(zero_copy_only=False).astype(np.float64)
    scored = _read(decided_path(work, split, "scored"), SCORED)
    qualities[scored["row"].to_numpy()] = scored["quality"].to_numpy()
    return qualities


def judged_path(work: Path, split: Split, table: str) -> Path:
    """Where `documents`, `dropped`, `signatures` or `contamination` of a judged split lie."""
    return work / "judged" / split.source / f"{split.name}.{table}.parquet"


def decided_path(work: Path, split: Split, table: str) -> Path:
    """Where `scored` or `duplicates` of a split lie: not there when they'd be empty."""
    return work / table / split.source / f"{split.name}.parquet"


def commit_files(work: Path, step: str, split: Split, files: Iterable[Path], counts: dict[str, Any]) -> dict[str, Any]:
    """Record that a step of a split is done: its counts and, by hash, the files that are there. Returns the counts."""
    hashes = {str(file.relative_to(work)): file_hash(file) for file in files if file.is_file()}
    write_json(_record(work, step, split), {"counts": counts, "files": hashes})
    return counts


def final_hashes(work: Path, splits: Iterable[Split]) -> dict[str, str]:
    """SHA-256 of finished splits' tables in `work/final`, by their path there, as the splits' tasks recorded it."""
    records = [read_json(_record(work, step, split)) for split in splits for step in ("judged", "final")]
    files = ((Path(name), sha256) for record in records for name, sha256 in record["files"].items())
    return {str(name.relative_to("final")): sha256 for name, sha256 in files if name.parts[0] == "final"}


def verified(work: Path, step: str, split: Split) -> dict[str, Any] | None:
    """The counts of a step that is recorded, and whose files are as recorded; None otherwise."""
    try:
        record = read_json(_record(work, step, split))
    except ArtifactError:
        return None
    sound = all((work / name).is_file() and file_hash(work / name) == hash for name, hash in record["files"].items())
    return record["counts"] if sound else None


def _some_documents(
    items: Iterable[Document | Quarantined | Skipped],
) -> Iterator[list[Document] | Quarantined | Skipped]:
    """Documents in lists, some hundred at once or 16 million characters; what isn't a document by itself."""
    some: list[Document] = []
    num_chars = 0
    for item in items:
        if not isinstance(item, Document):
            yield item
            continue
        some.append(item)
        num_chars += len(item.text)
        if len(some) >= DOCUMENTS_AT_ONCE or num_chars >= CHARS_AT_ONCE:
            yield some
            some, num_chars = [], 0
    if some:
        yield some


def _row(source: str, document: Document, judged: Judged) -> dict[str, Any]:
    """A document as a row of the tables; its id is of the text as stored."""
    key = document_id(source, document.url, judged.text).hex()
    row = {"id": key, "text": judged.text, "source": source, "url": document.url, "language": judged.language}
    row |= {f"signal_{name}": float(value) for name, value in judged.signals.items()}
    return {**row, "quality": judged.quality}


def _matches(row: Mapping[str, Any], judged: Judged) -> Iterator[dict[str, Any]]:
    place = {name: row[name] for name in ("id", "source", "url")}
    for found in judged.found:
        match = {name: getattr(found.match, name) for name in ("benchmark", "item", "coverage")}
        yield {**place, **match, "question": found.question, "evidence": found.evidence}


def _final(work: Path, split: Split, table: str) -> Path:
    return work / "final" / table / split.source / f"{split.name}.parquet"


def _record(work: Path, step: str, split: Split) -> Path:
    return work / "records" / step / split.source / f"{split.name}.json"


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    return pq.read_table(path) if path.is_file() else schema.empty_table()


def _row_groups(path: Path) -> Iterator[pa.Table]:
    if path.is_file():
        with pq.ParquetFile(path) as parquet:
            yield from (parquet.read_row_group(index) for index in range(parquet.num_row_groups))


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)


def _length_bins(table: pa.Table) -> dict[str, int]:
    """Documents by the power of two that their characters reach: "10" from 1,024 to 2,047."""
    return Counter(f"{max(len(text), 1).bit_length() - 1:02}" for text in table["text"].to_pylist())


def _quality_bins(table: pa.Table) -> dict[str, int]:
    """Documents by the twentieth of the quality scale: "0.95" from 0.95 to 1."""
    scored = table["quality"].drop_null().to_numpy()
    twentieths = np.minimum((scored * QUALITY_BINS).astype(int), QUALITY_BINS - 1)
    bins, counts = np.unique(twentieths, return_counts=True)
    return {f"{step / QUALITY_BINS:.2f}": int(count) for step, count in zip(bins, counts, strict=True)}
