"""The steps of deduplication between judged splits, over their tables: keys, pairs, members of clusters, verdicts.

A document is a number: splits in order, rows in order. What a step reads of one split, and what it makes of one
partition of such rows, are here; how rows come together is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.curate.dedup import FINGERPRINT_BYTES, by_preference, choose, shingles, star_pairs
from danube_ray.curate.records import Split
from danube_ray.curate.splits import judged_path, read_qualities
from danube_ray.curate.tables import DUPLICATES, TableWriter
from danube_ray.curate.words import tokenize

Kind = Literal["exact", "near"]
Share = tuple[int, int]  # which of how many equal parts of the keys or clusters

KEYS = pa.schema([("key", pa.uint64()), ("document", pa.int64())])
PAIRS = pa.schema([("document", pa.int64()), ("first", pa.int64())])
MEMBERS = pa.schema(
    [
        ("cluster", pa.int64()),
        ("document", pa.int64()),
        ("id", pa.string()),
        ("fingerprint", pa.binary(FINGERPRINT_BYTES)),
        ("quality", pa.float64()),
        ("priority", pa.int64()),
        ("shingles", pa.large_list(pa.uint64())),
    ]
)
VERDICTS = pa.schema(
    [("document", pa.int64()), ("kept", pa.string()), ("exact", pa.bool_()), ("similarity", pa.float64())]
)
VERDICT = np.dtype([("document", "<i8"), ("kept", "S32"), ("exact", "?"), ("similarity", "<f8")])


@dataclass(frozen=True)
class Placed:
    """A judged split and the numbers of its documents. `copies` and `members` are its slices of arrays over all."""

    split: Split
    priority: int
    first: int
    num_documents: int
    text_bytes: int
    copies: tuple[int, int] = (0, 0)
    members: tuple[int, int] = (0, 0)

    @property
    def end(self) -> int:
        return self.first + self.num_documents

    @classmethod
    def unpack(cls, fields: dict[str, Any]) -> Self:
        """From what `dataclasses.asdict` gave, through JSON."""
        return cls(**{**fields, "split": Split.unpack(fields["split"])})


def place(splits: Sequence[Split], work: Path, priorities: Mapping[str, int]) -> list[Placed]:
    """Number the documents of judged splits."""
    placed, first = [], 0
    for split in splits:
        path = judged_path(work, split, "documents")
        num_documents = text_bytes = 0
        if path.is_file():
            metadata = pq.read_metadata(path)
            column = metadata.schema.names.index("text")
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            num_documents = metadata.num_rows
            text_bytes = sum(group.column(column).total_uncompressed_size for group in groups)
        placed.append(Placed(split, priorities[split.source], first, num_documents, text_bytes))
        first += num_documents
    return placed


def read_keys(placed: Placed, kind: Kind, share: Share, work: Path, exact: Path | None) -> Iterator[pa.Table]:
    """KEYS of a split: halves of fingerprints, or bands of documents that `exact` doesn't link to an earlier one."""
    path = judged_path(work, placed.split, "signatures")
    if not path.is_file():
        return
    name = "fingerprint" if kind == "exact" else "bands"
    copies = np.empty(0, np.int64) if exact is None else _slice(exact, placed.copies)[:, 0]
    first = placed.first
    with pq.ParquetFile(path) as parquet:
        for group in range(parquet.num_row_groups):
            column = parquet.read_row_group(group, columns=[name])[name]
            documents = first + np.flatnonzero(column.is_valid().to_numpy())
            first += len(column)
            keys = np.frombuffer(b"".join(column.drop_null().to_pylist()), "<u8").reshape(
                -1, column.type.byte_width // 8
            )
            if kind == "exact":
                keys = keys[:, :1]  # half of a fingerprint finds the candidates; choosing looks at all of it
            fresh = np.isin(documents, copies, invert=True)
            keys, documents = keys[fresh].ravel(), np.repeat(documents[fresh], keys.shape[1])
            mine = keys % np.uint64(share[1]) == share[0]
            yield pa.table([keys[mine], documents[mine]], KEYS)


def pair(keys: pa.Table) -> pa.Table:
    """PAIRS of documents and the first with an equal key. Rows of equal keys must all be there, in any order."""
    pairs = star_pairs(keys["key"].to_numpy(), keys["document"].to_numpy())
    return pa.table([pairs[:, 0], pairs[:, 1]], PAIRS)


def read_members(
    placed: Placed, near: bool, share: Share, work: Path, exact: Path, members: Path
) -> Iterator[pa.Table]:
    """MEMBERS of a split; with `near` they have shingles, but for those that `exact` links to an earlier document."""
    found = _slice(members, placed.members)
    found = found[found[:, 1] % share[1] == share[0]]
    if not len(found):
        return
    rows, is_copy = found[:, 0] - placed.first, np.isin(found[:, 0], _slice(exact, placed.copies)[:, 0])
    qualities = read_qualities(placed.split, work)
    path = judged_path(work, placed.split, "signatures")
    fingerprints = pq.read_table(path, columns=["fingerprint"])["fingerprint"]
    start = 0
    with pq.ParquetFile(judged_path(work, placed.split, "documents")) as parquet:
        for group in range(parquet.num_row_groups):
            end = start + parquet.metadata.row_group(group).num_rows
            here = np.flatnonzero((start <= rows) & (rows < end))
            if len(here):
                table = parquet.read_row_group(group, columns=["id", "text"]).take(rows[here] - start)
                texts = zip(table["text"], is_copy[here], strict=True)
                sets = [shingles(tokenize(text.as_py())) if near and not copy else _NONE for text, copy in texts]
                yield pa.table(
                    {
                        "cluster": found[here, 1],
                        "document": found[here, 0],
                        "id": table["id"],
                        "fingerprint": fingerprints.take(rows[here]),
                        "quality": qualities[rows[here]],
                        "priority": np.full(len(here), placed.priority),
                        "shingles": _lists(sets),
                    },
                    MEMBERS,
                )
            start = end


def decide(members: pa.Table, min_jaccard: float) -> pa.Table:
    """VERDICTS on what is dropped of MEMBERS. Those of a cluster must all be there, in any order."""
    clusters, documents = members["cluster"].to_numpy(), members["document"].to_numpy()
    ids = np.array(members["id"].to_pylist(), np.str_)
    order = by_preference(members["quality"].to_numpy(), members["priority"].to_numpy(), ids, documents)
    order = order[np.argsort(clusters[order], kind="stable")]
    fingerprints, sets = members["fingerprint"].to_pylist(), _arrays(members["shingles"])
    tables = [VERDICTS.empty_table()]
    for cluster in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
        choice = choose([fingerprints[index] for index in cluster], [sets[index] for index in cluster], min_jaccard)
        gone = choice.kept != np.arange(len(cluster))
        kept = ids[cluster[choice.kept[gone]]]
        tables.append(pa.table([documents[cluster[gone]], kept, choice.exact[gone], choice.similarity[gone]], VERDICTS))
    return pa.concat_tables(tables)


def as_verdicts(tables: Iterable[pa.Table]) -> np.ndarray:
    """(D,) VERDICT of all `tables`, by document."""
    parts = [np.empty(0, VERDICT)]
    for table in tables:
        part = np.empty(table.num_rows, VERDICT)
        for name in table.column_names:
            part[name] = table[name].to_numpy()
        parts.append(part)
    verdicts = np.concatenate(parts)
    return verdicts[np.argsort(verdicts["document"])]


def write_duplicates(placed: Placed, verdicts: np.ndarray, path: Path) -> None:
    """A split's table of duplicates, from `verdicts` (D,) VERDICT on its documents."""
    verdicts = verdicts[np.argsort(verdicts["document"])]
    reasons = np.where(verdicts["exact"], "duplicate", "near_duplicate")
    columns = [verdicts["document"] - placed.first, verdicts["kept"].astype(np.str_), reasons, verdicts["similarity"]]
    with TableWriter(path, DUPLICATES) as table:
        table.write(pa.table(columns, DUPLICATES))


_NONE = np.empty(0, np.uint64)


def _slice(path: Path, bounds: tuple[int, int]) -> np.ndarray:
    return np.load(path, mmap_mode="r")[slice(*bounds)]


def _lists(sets: list[np.ndarray]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in sets])])
    return pa.LargeListArray.from_arrays(offsets, np.concatenate(sets))


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a column of lists as arrays, without copying them."""
    found = []
    for chunk in column.chunks:
        values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        found += [values[start:end] for start, end in pairwise(offsets)]
    return found
