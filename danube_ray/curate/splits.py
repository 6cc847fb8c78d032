"""The two steps of curating one split: judge what is in it, then part its documents from their duplicates.

Each step writes whole files and, last, a record of their hashes. A step whose record verifies is not done again, and
one that was cut off anywhere is done again from its start, so that the bytes left are the same either way.

    work/judged/SOURCE/SPLIT.{documents,dropped,fingerprints}.parquet     what the rules said
    work/final/{documents,dropped,quarantine}/SOURCE/SPLIT.parquet        what curation leaves
    work/records/{judged,final}/SOURCE/SPLIT.json                         the commits
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.artifacts import ArtifactError, file_hash, read_json, write_json
from danube_ray.curate.dedup import as_numbers, fingerprint
from danube_ray.curate.extract import read_split
from danube_ray.curate.heuristics import HeuristicRules, judge
from danube_ray.curate.records import Quarantined, Split
from danube_ray.curate.tables import DOCUMENTS, DROPPED, FINGERPRINTS, QUARANTINE, TableWriter

DUPLICATE = "duplicate"


def document_id(source: str, url: str, text: str) -> bytes:
    """The 16 bytes that name a document wherever it goes; tables hold them as 32 hex digits."""
    return hashlib.blake2b("\0".join((source, url, text)).encode(), digest_size=16).digest()


def judge_split(split: Split, rules: HeuristicRules, max_document_bytes: int, work: Path) -> dict[str, Any]:
    """Read and judge a split; counts of what was `read`, and `dropped_by` and `quarantined_by` reason."""
    place = Path(split.source) / split.name
    if (counts := _verified(work, "judged", place)) is not None:
        return counts
    dropped_by: Counter[str] = Counter()
    quarantined_by: Counter[str] = Counter()
    read = 0
    paths = _judged(work, split) | {"quarantine": _final(work, split, "quarantine")}
    with (
        TableWriter(paths["documents"], DOCUMENTS) as documents,
        TableWriter(paths["dropped"], DROPPED) as dropped,
        TableWriter(paths["fingerprints"], FINGERPRINTS) as fingerprints,
        TableWriter(paths["quarantine"], QUARANTINE) as quarantine,
    ):
        for item in read_split(split, max_document_bytes):
            read += 1
            if isinstance(item, Quarantined):
                quarantined_by[item.reason] += 1
                bad = {"offset": item.offset, "reason": item.reason, "sample": item.sample}
                quarantine.add({"source": split.source, "url": item.file, **bad}, len(item.sample))
                continue
            verdict = judge(item.text, rules)
            key = document_id(split.source, item.url, item.text)
            row = {"id": key.hex(), "text": item.text, "source": split.source, "url": item.url}
            row |= {f"signal_{name}": float(value) for name, value in verdict.signals.items()}
            if verdict.reason is None:
                documents.add(row, len(item.text))
                fingerprints.add({"fingerprint": fingerprint(item.text), "id": key})
            else:
                dropped_by[verdict.reason] += 1
                dropped.add({**row, "reason": verdict.reason}, len(item.text))
    counts = {"read": read, "dropped_by": dict(dropped_by), "quarantined_by": dict(quarantined_by)}
    return _commit(work, "judged", place, list(paths.values()), counts)


def read_fingerprints(split: Split, work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints and ids of a judged split's documents, in order: (N, 2) uint64 each, as `dedup.keepers` takes."""
    path = _judged(work, split)["fingerprints"]
    table = pq.read_table(path) if path.is_file() else FINGERPRINTS.empty_table()
    return as_numbers(table["fingerprint"].to_pylist()), as_numbers(table["id"].to_pylist())


def finish_split(split: Split, duplicates: Mapping[int, str], work: Path) -> dict[str, Any]:
    """Write a judged split's final tables; counts of their rows, and `kept_bytes` of text.

    `duplicates` maps rows of the split's documents to the (hex) id of the document kept in their place.
    """
    place = Path(split.source) / split.name
    if (counts := _verified(work, "final", place)) is not None:
        return counts
    judged, quarantine = _judged(work, split), _final(work, split, "quarantine")
    paths = {name: _final(work, split, name) for name in ("documents", "dropped")}
    kept_bytes = row = 0
    with (
        TableWriter(paths["documents"], DOCUMENTS) as documents,
        TableWriter(paths["dropped"], DROPPED) as dropped,
    ):
        for table in _row_groups(judged["dropped"]):
            dropped.write(table)
        for table in _row_groups(judged["documents"]):
            kept_ids = pa.array([duplicates.get(row + index) for index in range(table.num_rows)], pa.string())
            row += table.num_rows
            kept = table.filter(kept_ids.is_null())
            kept_bytes += sum(len(text.encode()) for text in kept["text"].to_pylist())
            documents.write(kept)
            reasons = pa.array([DUPLICATE] * table.num_rows)
            judged_again = table.append_column("reason", reasons).append_column("duplicate_of", kept_ids)
            dropped.write(judged_again.filter(kept_ids.is_valid()))
    counts = {
        "kept": documents.num_rows,
        "dropped": dropped.num_rows,
        "duplicates": len(duplicates),
        "quarantined": pq.read_metadata(quarantine).num_rows if quarantine.is_file() else 0,
        "kept_bytes": kept_bytes,
    }
    return _commit(work, "final", place, list(paths.values()), counts)


def _judged(work: Path, split: Split) -> dict[str, Path]:
    folder = work / "judged" / split.source
    return {name: folder / f"{split.name}.{name}.parquet" for name in ("documents", "dropped", "fingerprints")}


def _final(work: Path, split: Split, table: str) -> Path:
    return work / "final" / table / split.source / f"{split.name}.parquet"


def _row_groups(path: Path) -> Iterator[pa.Table]:
    if path.is_file():
        with pq.ParquetFile(path) as parquet:
            yield from (parquet.read_row_group(index) for index in range(parquet.num_row_groups))


def _commit(work: Path, step: str, place: Path, files: list[Path], counts: dict[str, Any]) -> dict[str, Any]:
    hashes = {str(file.relative_to(work)): file_hash(file) for file in files if file.is_file()}
    write_json(work / "records" / step / place.with_suffix(".json"), {"counts": counts, "files": hashes})
    return counts


def _verified(work: Path, step: str, place: Path) -> dict[str, Any] | None:
    try:
        record = read_json(work / "records" / step / place.with_suffix(".json"))
    except ArtifactError:
        return None
    sound = all((work / name).is_file() and file_hash(work / name) == hash for name, hash in record["files"].items())
    return record["counts"] if sound else None
