"""Rows: of JSON lines, and of tables with a header, separated by commas or tabs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from danube_ray.curate.readers.streams import lines
from danube_ray.curate.readers.values import decoded, row_address, row_text, sample
from danube_ray.curate.records import Damaged, Document, Quarantined, Unusable


class Row(NamedTuple):
    """A row that begins `offset` bytes into its file, with these bytes; its value, or why it has none (`Unusable`)."""

    offset: int
    begins: bytes
    value: Any


def read_rows(rows: Iterator[Row], place: str) -> Iterator[Document | Quarantined]:
    """A document a row: an object with one of `TEXT_FIELDS`."""
    for offset, begins, value in rows:
        try:
            if isinstance(value, Unusable):
                raise value
            if not isinstance(value, dict):
                raise Unusable("not a JSON object")
            yield Document(row_text(value), row_address(value, f"{place}#{offset}"))
        except Unusable as error:
            yield Quarantined(place, offset + error.offset, error.reason, sample(begins))


def json_rows(stream: io.BufferedReader, max_bytes: int) -> Iterator[Row]:
    """A row a line, of any value; blank lines are passed over."""
    for offset, line in lines(stream, max_bytes):
        if line.strip():
            yield Row(offset, line, _json(line, max_bytes))


def _json(line: bytes, max_bytes: int) -> Any:
    if len(line) > max_bytes:
        return Unusable("over-long document")
    try:
        return json.loads(decoded(line))
    except Unusable as error:
        return error
    except (ValueError, RecursionError):
        return Unusable("malformed JSON")


def table_rows(
    stream: io.BufferedReader, max_bytes: int, delimiter: str, text_columns: Collection[str] = ()
) -> Iterator[Row]:
    """The rows of a table by column, quoted as RFC 4180 says; the first row names the columns.

    Raises Damaged for a header that can't be read, or (where some are given) has none of `text_columns`.
    """
    texts = _RowTexts(stream, max_bytes)
    # A limit of the process, not of the reader; the rows' own bound lies below it.
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
    rows = csv.reader(texts, delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        texts.begin_row()
        try:
            if not (value := next(rows)):
                continue  # a blank line
        except StopIteration:
            return
        except Damaged:
            raise
        except Unusable as error:
            value = error
        except csv.Error:
            value = Unusable("malformed row")
        if columns:
            if isinstance(value, list):
                named = dict(zip(columns, value, strict=False))
                value = named if len(value) == len(columns) else Unusable("another number of fields than the header")
            yield Row(texts.offset, texts.last, value)
        elif isinstance(value, Unusable):
            raise Damaged(value.reason, texts.offset + value.offset)
        elif text_columns and not any(name in value for name in text_columns):
            raise Damaged("no text column", texts.offset)
        else:
            columns = value


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
