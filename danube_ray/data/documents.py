"""From curated documents to token shards, one split at a time, and which documents are held out for validation.

A documents folder holds `documents/SOURCE/SPLIT.parquet` and a manifest. Each split becomes shards of the same number
in its source's buckets, so that the bytes written depend on the split alone, whoever writes them and when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from danube_ray.artifacts import MANIFEST, ArtifactError, damage, file_hash, read_json, read_manifest, write_json
from danube_ray.config import require
from danube_ray.data.shards import (
    VALIDATION,
    Shard,
    ShardWriter,
    commit_store,
    commit_tokens,
    quality_bucket,
    token_dtype,
)
from danube_ray.data.tokenizer import Tokenizer

VALIDATION_SHARE = 1 / 50
# Past this many documents chance alone holds some out: none of them with a probability of (1 - 1/50)^2000 = 3e-18.
SMALL_SOURCE_DOCUMENTS = 2_000
RECORDS = ".records"
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class DocumentSplit:
    """A Parquet file of a source's documents; `index` numbers the source's files, and the shards made of them."""

    source: str
    index: int
    path: Path


def document_splits(documents: Path) -> list[DocumentSplit]:
    """Every file of a finished documents folder, in a fixed order; `ConfigError` when there is none.

    The manifest says which they are. Raises `ArtifactError` where one was changed since it was written.
    """
    remedy = "make it with `danube curate`"
    require((documents / MANIFEST).is_file(), "documents", str(documents), "a finished documents folder", remedy)
    if (wrong := damage(documents, touched_only=True)) is not None:
        raise ArtifactError(f"{wrong}: run `danube curate` again, which mends it")
    names = sorted(PurePosixPath(name) for name in read_manifest(documents)["files"])
    by_source = groupby((name for name in names if name.parts[0] == "documents"), key=lambda name: name.parent)
    splits = [
        DocumentSplit(folder.name, index, documents / name)
        for folder, members in by_source
        for index, name in enumerate(members)
    ]
    require(
        bool(splits), "documents", str(documents), "a folder with documents", "curation dropped all: see its reasons"
    )
    require(all(split.source != VALIDATION for split in splits), "source", VALIDATION, "any other name", "rename it")
    return splits


def document_hash(document_id: str) -> int:
    """A number in [0, 2^64) that only the id decides."""
    return int.from_bytes(blake2b(document_id.encode(), digest_size=8).digest(), "big")


def validation_bounds(splits: Sequence[DocumentSplit]) -> dict[str, int]:
    """By source the bound below which a document's hash holds it out: about 1 in 50, at least one, never all.

    Raises `ConfigError` for a source of a single document: nothing would be left to train on, or to validate with.
    """
    bounds = {}
    for source in {split.source: None for split in splits}:
        paths = [split.path for split in splits if split.source == source]
        bounds[source] = int(VALIDATION_SHARE * 2**64)
        total = sum(pq.read_metadata(path).num_rows for path in paths)
        need, remedy = "at least 2: one is held out for validation", "split its text into several files or rows"
        require(total >= 2, f"documents of source {source!r}", total, need, remedy)
        if total < SMALL_SOURCE_DOCUMENTS:
            ids = (name for path in paths for name in pq.read_table(path, columns=["id"])["id"].to_pylist())
            hashes = sorted(map(document_hash, ids))
            bounds[source] = hashes[min(max(round(VALIDATION_SHARE * total), 1), total - 1)]
    return bounds


def read_documents(split: DocumentSplit) -> Iterator[list[dict[str, Any]]]:
    """A split's documents in order, some hundred at a time: `id`, `url`, `text`, `quality` (None where not scored).

    Never more than a row group, which curation cuts by its bytes: some hundred books have ids of gigabytes.
    """
    with pq.ParquetFile(split.path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["id", "url", "text", "quality"])
            for start in range(0, len(table), ROWS_AT_ONCE):
                yield table.slice(start, ROWS_AT_ONCE).to_pylist()


def sample_texts(documents: Path, max_bytes: int) -> Iterator[str]:
    """About `max_bytes` of text, the sources in proportion to their size, none of it held out; always the same.

    Reads a source's splits in the order of a hash of their names, and only as many as it takes.
    """
    splits = document_splits(documents)
    bounds = validation_bounds(splits)
    kept_bytes = {source: counts["kept_bytes"] for source, counts in read_manifest(documents)["counts"].items()}
    for source, bound in bounds.items():
        budget = max_bytes * kept_bytes[source] / sum(kept_bytes[name] for name in bounds)
        own = sorted((s for s in splits if s.source == source), key=lambda split: document_hash(split.path.stem))
        rows = (row for split in own for batch in read_documents(split) for row in batch)
        for row in rows:
            if budget <= 0:
                break
            if document_hash(row["id"]) >= bound:
                budget -= len(row["text"].encode())
                yield row["text"]


def tokenize_split(split: DocumentSplit, tokenizer: Tokenizer, bound: int, folder: Path) -> dict[str, Shard]:
    """Write the split's shards under `folder`, then a record of them, last; returns them by store.

    A document goes to the bucket of its quality, or to its source's validation store when its hash is below `bound`.
    Where an earlier record still holds, nothing is written.
    """
    recorded = _recorded_shards(split, folder)
    if recorded is not None:
        return recorded
    dtype, writers = token_dtype(tokenizer.vocab_size), dict[str, ShardWriter]()
    for rows in read_documents(split):
        for row, ids in zip(rows, tokenizer.encode_documents([row["text"] for row in rows]), strict=True):
            held_out = document_hash(row["id"]) < bound
            store = f"{VALIDATION}/{split.source}" if held_out else f"{split.source}/{quality_bucket(row['quality'])}"
            if store not in writers:
                writers[store] = ShardWriter(folder / store, split.index, dtype)
            writers[store].add(ids, row["id"], row["url"])
    shards = {store: writer.finish() for store, writer in sorted(writers.items())}
    write_json(_record(split, folder), {store: asdict(shard) for store, shard in shards.items()})
    return shards


def _recorded_shards(split: DocumentSplit, folder: Path) -> dict[str, Shard] | None:
    """The split's finished shards by store, or None where the record is missing or a file isn't what it says."""
    try:
        record = read_json(_record(split, folder))
    except ArtifactError:
        return None
    shards = {store: Shard(**facts) for store, facts in record.items()}
    for store, shard in shards.items():
        for suffix, facts in shard.files.items():
            path = folder / store / f"{shard.name}{suffix}"
            if not path.is_file() or file_hash(path) != facts["sha256"]:
                return None
    return shards


def commit_splits(
    shards: Sequence[dict[str, Shard]], tokenizer: Tokenizer, folder: Path, **facts: Any
) -> dict[str, Any]:
    """Write the stores' manifests from every split's shards, in order, and the folder's last; returns that one."""
    by_store: dict[str, list[Shard]] = {}
    for shards_by_store in shards:
        for store, shard in shards_by_store.items():
            by_store.setdefault(store, []).append(shard)
    dtype = token_dtype(tokenizer.vocab_size)
    for store, finished in by_store.items():
        commit_store(folder / store, finished, dtype, tokenizer.sha256)
    return commit_tokens(
        folder, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, dtype=dtype.str, **facts
    )


def _record(split: DocumentSplit, folder: Path) -> Path:
    return folder / RECORDS / split.source / f"{split.path.stem}.json"
