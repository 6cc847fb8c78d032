"""Parquet: the rows of one row group, where the schema has a column of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.curate.readers.streams import raise_if_disk
from danube_ray.curate.readers.values import ADDRESS_FIELDS, SAMPLE_CHARS, TEXT_FIELDS, TITLED, row_address, row_text
from danube_ray.curate.records import Document, Quarantined, Reading, Unusable

ROWS_AT_ONCE = 64
BUFFER_BYTES = 2**20


def read_parquet(
    file: BinaryIO, place: str, row_group: int | None, reading: Reading
) -> Iterator[Document | Quarantined]:
    """A document a row of a row group, or of all where None is named; offsets count the file's rows."""
    row = 0
    try:
        # Pages as they are needed: a row group may be many times what fits into memory.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES) as parquet:
            columns = _columns(parquet.schema_arrow)
            groups = range(parquet.num_row_groups) if row_group is None else [row_group]
            if row_group is not None:
                row = sum(parquet.metadata.row_group(index).num_rows for index in range(row_group))
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=list(groups), columns=columns):
                for values in zip(*batch.columns, strict=True):
                    yield _document(dict(zip(columns, values, strict=True)), place, row, reading)
                    row += 1
    except Unusable as error:
        yield Quarantined(place, row, error.reason)
    except (pa.ArrowException, OSError) as error:
        raise_if_disk(error)
        yield Quarantined(place, row, "damaged Parquet")


def row_groups(file: BinaryIO) -> list[tuple[int, int]]:
    """Number and bytes (unpacked) of each row group that has rows; none where the file can't be read."""
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise_if_disk(error)
        return []
    groups = [(index, metadata.row_group(index)) for index in range(metadata.num_row_groups)]
    return [(index, group.total_byte_size) for index, group in groups if group.num_rows]


def _columns(schema: pa.Schema) -> list[str]:
    def usable(name: str) -> bool:
        if schema.names.count(name) != 1:
            return False
        kind = schema.field(name).type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return name in TEXT_FIELDS and _is_string(kind.value_type)
        return _is_string(kind) and name != "source"

    named = [name for name in TEXT_FIELDS if name in schema.names and name != "source"]
    for name in TEXT_FIELDS:
        if usable(name):
            extras = ADDRESS_FIELDS + (("title",) if name in TITLED else ())
            return [name, *(extra for extra in extras if usable(extra))]
    raise Unusable("text column is not a string" if named else "no text column")


def _is_string(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _document(row: dict[str, pa.Scalar], place: str, index: int, reading: Reading) -> Document | Quarantined:
    try:
        values: dict[str, Any] = {name: scalar.as_py() for name, scalar in row.items()}
        text = row_text(values)
        if len(text.encode()) > reading.max_document_bytes:
            return Quarantined(place, index, "over-long document", text[:SAMPLE_CHARS])
        return Document(text, row_address(values, f"{place}#{index}"))
    except UnicodeDecodeError:
        return Quarantined(place, index, "invalid UTF-8")
    except Unusable as error:
        return Quarantined(place, index, error.reason)
