"""The Parquet tables that curation leaves: their columns, and writing one so that it is whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.config import SIGNALS

# Signals of a document beside those of the rules; `quality` is a column of its own.
OTHER_SIGNALS = ("language_score", "code_share")

DOCUMENTS = pa.schema(
    [(name, pa.string()) for name in ("id", "text", "source", "url", "language")]
    + [("quality", pa.float64())]
    + [(f"signal_{name}", pa.float64()) for name in (*SIGNALS, *OTHER_SIGNALS)]
)
# `duplicate_of` is the id of the document that was kept in its place, `similarity` the Jaccard index with it.
DROPPED = pa.schema([*DOCUMENTS, ("reason", pa.string()), ("duplicate_of", pa.string()), ("similarity", pa.float64())])
QUARANTINE = pa.schema(
    [
        ("source", pa.string()),
        ("url", pa.string()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("sample", pa.string()),
    ]
)
# The items of evaluation sets that were found, and where in the (dropped) document.
CONTAMINATION = pa.schema(
    [(name, pa.string()) for name in ("id", "source", "url", "benchmark")]
    + [("item", pa.int64()), ("coverage", pa.float64()), ("question", pa.string()), ("evidence", pa.string())]
)
# One row for each row of a split's documents, in their order; `bands` are 14 little-endian uint64, null where there
# are none.
SIGNATURES = pa.schema([("fingerprint", pa.binary(16)), ("bands", pa.binary(14 * 8))])
# What is decided after judging, about rows of a split's judged documents, in their order.
SCORED = pa.schema([("row", pa.int64()), ("quality", pa.float64())])
DUPLICATES = pa.schema(
    [("row", pa.int64()), ("duplicate_of", pa.string()), ("reason", pa.string()), ("similarity", pa.float64())]
)

BUFFER_BYTES = 16 * 2**20
BUFFER_ROWS = 8192


class TableWriter:
    """Write rows or tables to one Parquet file, in row groups of about 16 MB; the same rows give the same bytes.

    The file appears under its name, complete and flushed to disk, when the `with` block ends well, and only if there
    was a row: no table is empty. `num_rows` counts what was written.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.num_rows = 0
        self._buffer: list[dict[str, Any]] = []
        self._buffer_bytes = 0
        self._temporary: Path | None = None
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any], num_bytes: int = 0) -> None:
        """Add one row, about `num_bytes` big; columns left out are null."""
        self._buffer.append(row)
        self._buffer_bytes += num_bytes
        if self._buffer_bytes >= BUFFER_BYTES or len(self._buffer) >= BUFFER_ROWS:
            self._flush()

    def write(self, table: pa.Table) -> None:
        """Write a table of the schema's columns as a row group."""
        if not table.num_rows:
            return
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            os.close(descriptor)
            self._temporary = Path(temporary)
            self._writer = pq.ParquetWriter(temporary, self.schema, compression="zstd")
        assert self._writer is not None
        self._writer.write_table(table)
        self.num_rows += table.num_rows

    def _flush(self) -> None:
        self.write(pa.Table.from_pylist(self._buffer, self.schema))
        self._buffer, self._buffer_bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            if self._writer is not None:
                self._writer.close()
            if self._temporary is not None and kind is None:
                with self._temporary.open("rb") as file:
                    os.fsync(file.fileno())
                self._temporary.chmod(0o644)
                self._temporary.replace(self.path)
        finally:
            if self._temporary is not None:
                self._temporary.unlink(missing_ok=True)
