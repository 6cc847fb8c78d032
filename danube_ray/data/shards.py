"""Token shards: flat files of token ids that training maps into memory, and the folders that hold them.

    tokens/SOURCE/BUCKET/shard-00000.bin    little-endian uint16 (uint32 over 65,536 pieces), documents back to back
    tokens/SOURCE/BUCKET/shard-00000.idx    int64 end of each document in the shard, exclusive
    tokens/SOURCE/BUCKET/shard-00000.parquet    `id` and `url` of each document, in the same order
    tokens/SOURCE/BUCKET/manifest.json      the bucket's commit: shards in order, counts, hashes
    tokens/validation/SOURCE/               a source's held-out documents, in the same form
    tokens/manifest.json                    the whole folder's commit

A bucket is `unscored`, or `q0` to `q3`: the quarter of the quality scale its documents lie in.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.artifacts import (
    MANIFEST,
    ArtifactError,
    damage,
    file_hash,
    read_manifest,
    write_atomically,
    write_json,
)
from danube_ray.config import QUALITY_BOUNDS, ConfigError

VALIDATION = "validation"
UNSCORED = "unscored"
QUALITY_BUCKETS = ("q0", "q1", "q2", "q3")
NAMES = pa.schema([("id", pa.string()), ("url", pa.string())])
NAMES_AT_ONCE = 1024  # documents in a row group: what is read to name one of them


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest little-endian integer that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def quality_bucket(quality: float | None) -> str:
    """The bucket of a document's quality: quarters of [0, 1], the last one closed; `unscored` without a quality."""
    if quality is None:
        return UNSCORED
    if not 0 <= quality <= 1:
        raise ValueError(f"a quality lies between 0 and 1, not {quality}")
    return QUALITY_BUCKETS[bisect_right(QUALITY_BOUNDS, quality) - 1]


def lowest_quality(bucket: str) -> float | None:
    """The least quality that a bucket's documents can have; None where they have none."""
    return None if bucket == UNSCORED else QUALITY_BOUNDS[QUALITY_BUCKETS.index(bucket)]


@dataclass(frozen=True)
class Shard:
    """What a finished shard holds. `files` are the bytes and sha256 of its files by suffix: .bin, .idx, .parquet."""

    name: str
    tokens: int
    documents: int
    files: dict[str, dict[str, Any]]


class ShardWriter:
    """Writes one shard document by document. A crash leaves hidden leftovers, or files of a shard without its .bin."""

    def __init__(self, folder: Path, index: int, dtype: np.dtype) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._dtype = folder / f"shard-{index:05d}", dtype
        descriptor, self._temporary = tempfile.mkstemp(dir=folder, prefix=f".{self._path.name}.")
        self._file = os.fdopen(descriptor, "wb")
        self._hash = hashlib.sha256()
        self._ends: list[int] = []
        self._names: list[tuple[str, str]] = []
        self._tokens = 0

    def add(self, ids: np.ndarray | Sequence[int], document_id: str = "", url: str = "") -> None:
        """Append one document's token ids, with the document's own id and the URL it was read from."""
        data = np.asarray(ids).astype(self._dtype, casting="unsafe").tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._tokens += len(ids)
        self._ends.append(self._tokens)
        self._names.append((document_id, url))

    def finish(self) -> Shard:
        """Flush to disk and give the files their names, the tokens last."""
        files = {}
        ends = np.array(self._ends, "<i8").tobytes()
        for suffix, content in ((".parquet", _names_file(self._names)), (".idx", ends)):
            write_atomically(self._path.with_suffix(suffix), content)
            files[suffix] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files[".bin"] = {"bytes": self._tokens * self._dtype.itemsize, "sha256": self._hash.hexdigest()}
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        Path(self._temporary).chmod(0o644)
        Path(self._temporary).replace(self._path.with_suffix(".bin"))
        return Shard(self._path.name, self._tokens, len(self._ends), files)


def _names_file(names: Sequence[tuple[str, str]]) -> bytes:
    """A shard's names as Parquet. Ids are hashes, and hardly a URL comes twice: neither gains by a dictionary."""
    table = pa.Table.from_pylist([{"id": name, "url": url} for name, url in names], NAMES)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, NAMES_AT_ONCE, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False
    )
    return sink.getvalue().to_pybytes()


def commit_store(folder: Path, shards: Sequence[Shard], dtype: np.dtype, tokenizer_sha256: str) -> dict[str, Any]:
    """Write a bucket's manifest, last, and remove what an earlier crash left beside its shards."""
    for leftover in folder.glob(".shard-*"):
        leftover.unlink()
    manifest = {
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "dtype": dtype.str,
        "tokenizer_sha256": tokenizer_sha256,
        "shards": [{"name": shard.name, "tokens": shard.tokens, "documents": shard.documents} for shard in shards],
        "files": {f"{s.name}{suffix}": facts for s in shards for suffix, facts in sorted(s.files.items())},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def commit_tokens(tokens_dir: Path, **facts: Any) -> dict[str, Any]:
    """Write the manifest of a whole tokens folder, last. It names the buckets' manifests, which name the shards."""
    manifests = sorted(path for path in tokens_dir.glob(f"*/*/{MANIFEST}"))
    files = {
        str(path.relative_to(tokens_dir)): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in manifests
    }
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for path in manifests:
        store = read_manifest(path.parent)
        group = counts.setdefault(path.parent.parent.name, {})
        group[path.parent.name] = {"documents": store["documents"], "tokens": store["tokens"]}
    validation = counts.pop(VALIDATION, {})
    manifest = {"counts": counts, VALIDATION: validation, **facts, "files": files}
    write_json(tokens_dir / MANIFEST, manifest)
    return manifest


def write_tokens(
    tokens_dir: Path,
    sources: Mapping[str, Mapping[str, Iterable[Sequence[int] | np.ndarray]]],
    validation: Mapping[str, Iterable[Sequence[int] | np.ndarray]],
    vocab_size: int,
    tokenizer_sha256: str = "",
) -> dict[str, Any]:
    """Write a whole tokens folder from memory, one shard a bucket: `sources[source][bucket]` are documents of ids."""
    dtype = token_dtype(vocab_size)
    for group, buckets in {**sources, VALIDATION: validation}.items():
        for bucket, documents in buckets.items():
            writer = ShardWriter(tokens_dir / group / bucket, 0, dtype)
            for ids in documents:
                writer.add(ids)
            commit_store(tokens_dir / group / bucket, [writer.finish()], dtype, tokenizer_sha256)
    return commit_tokens(tokens_dir, tokenizer_sha256=tokenizer_sha256, vocab_size=vocab_size, dtype=dtype.str)


class Span(NamedTuple):
    """Where a document lies in a store: its number among all of them, and its tokens [start_token, end_token)."""

    number: int
    start_token: int
    end_token: int


class TokenStore:
    """One bucket's shards as one long array of token ids, mapped into memory where it is read.

    Pickles without its maps: each process opens its own. Raises `ArtifactError` when a shard is missing or has not the
    size that the manifest says; `damage` compares the hashes too.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        self.folder = folder
        self.dtype = np.dtype(manifest["dtype"])
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]
        self._names = [shard["name"] for shard in manifest["shards"]]
        self._starts = _starts(shard["tokens"] for shard in manifest["shards"])
        self._numbers = _starts(shard["documents"] for shard in manifest["shards"])  # of each shard's first document
        self._maps: dict[int, np.ndarray] = {}
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise ArtifactError(f"{path} is missing or torn: make the shards of {folder} again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def damage(self) -> str | None:
        """Why the bucket can't be trusted, after reading all of it; None when every hash matches."""
        return damage(self.folder)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), (count,) of `dtype`; a view of the file unless they span two shards."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.num_tokens} in {self.folder}")
        if count == 0:
            return np.empty(0, self.dtype)
        index = bisect_right(self._starts, start) - 1
        end = start + count
        if end <= self._starts[index + 1]:
            begin = self._starts[index]
            return self._map(index)[start - begin : end - begin]
        head = self._starts[index + 1] - start
        return np.concatenate([self.read(start, head), self.read(start + head, count - head)])

    def document_ends(self) -> np.ndarray:
        """Exclusive end of every document in the whole store, (num_documents,) int64."""
        ends = [np.fromfile(self.folder / f"{name}.idx", "<i8") for name in self._names]
        return np.concatenate([np.empty(0, "<i8"), *(e + start for e, start in zip(ends, self._starts, strict=False))])

    def documents(self, start: int, count: int) -> Iterator[Span]:
        """The documents that have tokens among [start, start + count), in order; a binary search, no more is read."""
        stop = min(start + count, self.num_tokens)
        for index in range(bisect_right(self._starts, start) - 1, len(self._names)):
            begin = self._starts[index]
            if begin >= stop:
                break
            ends = np.memmap(self.folder / f"{self._names[index]}.idx", "<i8", mode="r")
            first = int(np.searchsorted(ends, start - begin, side="right"))
            last = int(np.searchsorted(ends, stop - begin, side="left"))
            edges = [int(ends[first - 1]) if first else 0, *ends[first : last + 1].tolist()]
            for number, (left, right) in enumerate(pairwise(edges), self._numbers[index] + first):
                if left < right:
                    yield Span(number, begin + left, begin + right)

    def names(self, numbers: Iterable[int]) -> dict[int, tuple[str, str]]:
        """Id and URL by document number, from the row groups that hold them and no others."""
        names = {}
        for index, group in groupby(sorted(set(numbers)), key=lambda number: bisect_right(self._numbers, number) - 1):
            with self._names_file(index) as file:
                rows_at_once = file.metadata.row_group(0).num_rows
                places = [(number, *divmod(number - self._numbers[index], rows_at_once)) for number in group]
                for row_group, members in groupby(places, key=lambda place: place[1]):
                    ids, urls = file.read_row_group(row_group)
                    names |= {number: (ids[row].as_py(), urls[row].as_py()) for number, _, row in members}
        return names

    def find(self, document_id: str) -> Span | None:
        """Where the document of this id lies. Reads the ids of the store, 16 bytes a document, and nothing else."""
        for index, name in enumerate(self._names):
            with self._names_file(index) as file:
                row = file.read(["id"])["id"].index(document_id).as_py()
            if row >= 0:
                ends, begin = np.memmap(self.folder / f"{name}.idx", "<i8", mode="r"), self._starts[index]
                start = int(ends[row - 1]) if row else 0
                return Span(self._numbers[index] + row, begin + start, begin + int(ends[row]))
        return None

    def _names_file(self, index: int) -> pq.ParquetFile:
        path = self.folder / f"{self._names[index]}.parquet"
        if not path.is_file():
            made = "their tokens folder was made by an older version, make it again with `danube tokenize`"
            raise ArtifactError(f"{path} is missing: the shards of {self.folder} don't name their documents; {made}")
        return pq.ParquetFile(path)

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            path = self.folder / f"{self._names[index]}.bin"
            # np.memmap's own slices are slow to make; a plain view of the same pages isn't.
            self._maps[index] = np.memmap(path, self.dtype, mode="r").view(np.ndarray)
        return self._maps[index]


def _starts(lengths: Iterable[int]) -> list[int]:
    """Where each of several parts in a row begins, and where the last ends."""
    return [0, *accumulate(lengths)]


def open_sources(tokens_dir: Path) -> dict[str, dict[str, TokenStore]]:
    """Every source's buckets in a finished tokens folder, in a fixed order."""
    counts = _root_manifest(tokens_dir)["counts"]
    return {s: {b: TokenStore(tokens_dir / s / b) for b in sorted(buckets)} for s, buckets in sorted(counts.items())}


def open_validation(tokens_dir: Path) -> dict[str, TokenStore]:
    """Every source's held-out tokens."""
    return {s: TokenStore(tokens_dir / VALIDATION / s) for s in sorted(_root_manifest(tokens_dir)[VALIDATION])}


def held_out_tokens(tokens_dir: Path, at_most: int | None = None) -> np.ndarray:
    """The held-out ids of all sources, one after the other; `at_most` takes equally many from the start of each."""
    stores = open_validation(tokens_dir).values()
    each = at_most // len(stores) if at_most else None
    return np.concatenate([store.read(0, min(store.num_tokens, each or store.num_tokens)) for store in stores])


def store_sizes(sources: Mapping[str, Mapping[str, TokenStore]]) -> dict[str, dict[str, int]]:
    """Tokens by source and bucket: what a mixture plan is made from."""
    return {source: {b: store.num_tokens for b, store in buckets.items()} for source, buckets in sources.items()}


def _root_manifest(tokens_dir: Path) -> dict[str, Any]:
    manifest = read_manifest(tokens_dir) if (tokens_dir / MANIFEST).is_file() else {}
    if VALIDATION not in manifest:
        raise ConfigError("tokens_dir", str(tokens_dir), "a finished tokens folder", "make it with `danube tokenize`")
    return manifest
