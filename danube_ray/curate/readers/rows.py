"""Rows of text: JSON lines, and tables with a header, separated by commas or tabs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from danube_ray.curate.readers.streams import lines
from danube_ray.curate.readers.values import TEXT_FIELDS, decoded, row_address, row_text, sample
from danube_ray.curate.records import Document, Quarantined, Reading, Unusable


def read_json_lines(stream: io.BufferedReader, place: str, reading: Reading) -> Iterator[Document | Quarantined]:
    """A document a line: an object with one of `TEXT_FIELDS`; blank lines are passed over."""
    for offset, line in lines(stream, reading.max_document_bytes):
        if not line.strip():
            continue
        try:
            if len(line) > reading.max_document_bytes:
                raise Unusable("over-long document")
            row = _json_object(decoded(line))
            yield Document(row_text(row), row_address(row, f"{place}#{offset}"))
        except Unusable as error:
            yield Quarantined(place, offset + error.offset, error.reason, sample(line))


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise Unusable("malformed JSON") from None
    if not isinstance(row, dict):
        raise Unusable("not a JSON object")
    return row


def read_table(
    stream: io.BufferedReader, place: str, reading: Reading, delimiter: str
) -> Iterator[Document | Quarantined]:
    """A document a row, quoted as RFC 4180 says; the first row names the columns, one of them of `TEXT_FIELDS`.

    A table without such a column is one quarantined record; so is a row of more or fewer fields than columns.
    """
    texts = _RowTexts(stream, reading.max_document_bytes)
    # A limit of the process, not of the reader; the rows' own bound lies below it.
    csv.field_size_limit(max(csv.field_size_limit(), reading.max_document_bytes))
    rows = csv.reader(texts, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        texts.begin_row()
        try:
            if not (row := next(rows)):
                continue
            if columns is None:
                columns = row
                _check_columns(columns)
                continue
            if len(row) != len(columns):
                raise Unusable("another number of fields than the header")
            values = dict(zip(columns, row, strict=True))
            yield Document(row_text(values), row_address(values, f"{place}#{texts.offset}"))
        except StopIteration:
            return
        except (Unusable, csv.Error) as error:
            reason, offset = (error.reason, error.offset) if isinstance(error, Unusable) else ("malformed row", 0)
            yield Quarantined(place, texts.offset + offset, reason, sample(texts.last))
            if columns is None or reason == "no text column":
                return


def _check_columns(columns: list[str]) -> None:
    if not any(name in columns for name in TEXT_FIELDS if name != "source"):
        raise Unusable("no text column")


class _RowTexts:
    """Lines for the csv reader, which asks for as many as a row takes; it goes on after an error raised here."""

    def __init__(self, stream: io.BufferedReader, max_bytes: int) -> None:
        self._lines, self._max_bytes = lines(stream, max_bytes), max_bytes
        self.offset, self.last = 0, b""
        self._row_bytes = 0

    def begin_row(self) -> None:
        self._row_bytes = 0

    def __iter__(self) -> _RowTexts:
        return self

    def __next__(self) -> str:
        start, self.last = next(self._lines)
        if not self._row_bytes:
            self.offset = start
        self._row_bytes += len(self.last)
        if self._row_bytes > self._max_bytes:
            raise Unusable("over-long document")
        try:
            return decoded(self.last)
        except Unusable as error:
            error.offset += start - self.offset
            raise
