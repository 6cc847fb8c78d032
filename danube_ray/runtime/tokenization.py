"""Tokenize curated documents on Ray Data: one task a split, each leaving its own shards; this file only spreads them.

A run killed anywhere and started again leaves the bytes of a run that was not killed.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from danube_ray.artifacts import (
    MANIFEST,
    content_hash,
    damage,
    file_hash,
    finished,
    publish,
    read_manifest,
    require_replaceable,
    work_folder,
)
from danube_ray.data.documents import (
    DocumentSplit,
    commit_splits,
    document_splits,
    sample_texts,
    tokenize_split,
    validation_bounds,
)
from danube_ray.data.shards import Shard
from danube_ray.data.tokenizer import Tokenizer, train_tokenizer
from danube_ray.runtime.splits import Progress, run_splits

VERSION = 2  # part of every result's inputs: raise it when the same documents would give other shards
TOKENIZER_SAMPLE_BYTES = 8 * 2**20


def train_tokenizer_on(
    documents: Path, folder: Path, vocab_size: int, max_bytes: int = TOKENIZER_SAMPLE_BYTES
) -> Tokenizer:
    """Train a tokenizer on a fixed sample of about `max_bytes` of a documents folder's text; see `train_tokenizer`."""
    return train_tokenizer(sample_texts(documents, max_bytes), folder, vocab_size)


def tokenize(
    documents: Path, tokenizer_folder: Path, out: Path, *, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Turn a documents folder into the tokens folder `out`; returns its manifest, with `counts` and `validation`.

    `on_progress(done, total)` counts splits. `out` appears complete; one that is complete from the same input is
    checked and left as it is, and where a shard is damaged only its split is done again. Raises `ConfigError` before
    any work.
    """
    documents, out = documents.resolve(), out.resolve()
    splits, tokenizer = document_splits(documents), Tokenizer.load(tokenizer_folder.resolve())
    bounds = validation_bounds(splits)
    inputs = {
        "version": VERSION,
        "documents": file_hash(documents / MANIFEST),
        "tokenizer": tokenizer.sha256,
        "validation_bounds": bounds,
    }
    require_replaceable(out, "tokens_version")
    is_made = finished(out, inputs)
    if is_made and _sound(out):
        return read_manifest(out)
    work = work_folder(out, "tokenizing", content_hash(inputs))
    if is_made:
        shutil.rmtree(work, ignore_errors=True)
        out.rename(work)  # what is sound of it counts as done
    work.mkdir(parents=True, exist_ok=True)
    shards = _tokenize_splits(splits, tokenizer, bounds, work, on_progress or (lambda done, total: None))
    manifest = commit_splits(shards, tokenizer, work, inputs=content_hash(inputs), tokens_version=VERSION)
    publish(work, out)
    return manifest


def _tokenize_splits(
    splits: list[DocumentSplit], tokenizer: Tokenizer, bounds: dict[str, int], work: Path, on_progress: Progress
) -> list[dict[str, Shard]]:
    """Tokenize every split, each as a Ray Data task of its own; their shards by store, in the splits' order."""

    def step(packed: dict[str, Any]) -> dict[str, Any]:
        split = DocumentSplit(packed["source"], packed["index"], Path(packed["path"]))
        shards = tokenize_split(split, tokenizer, bounds[split.source], work)
        return {store: asdict(shard) for store, shard in shards.items()}

    packed = [{"source": split.source, "index": split.index, "path": str(split.path)} for split in splits]
    shards = run_splits(step, packed, lambda done: on_progress(done, len(splits)))
    return [{store: Shard(**facts) for store, facts in named.items()} for named in shards]


def _sound(out: Path) -> bool:
    """Whether nothing was touched since: neither the buckets' manifests, which the folder's names, nor their shards."""
    buckets = [(out / name).parent for name in read_manifest(out)["files"]]
    return all(damage(folder, touched_only=True) is None for folder in (out, *buckets))
