"""Which reader a file is for: by its name, or as a page by how it begins, whatever folder or archive it lies in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Literal

from danube_ray.curate.readers.pages import HTML_BEGINS, read_document
from danube_ray.curate.readers.parquet import read_parquet
from danube_ray.curate.readers.rows import json_rows, read_rows, table_rows
from danube_ray.curate.readers.streams import PACKINGS, Packing, Source, open_file, unpacked
from danube_ray.curate.readers.tars import ReadMember, read_tar
from danube_ray.curate.readers.values import TEXT_COLUMNS
from danube_ray.curate.readers.warc import read_warc
from danube_ray.curate.records import Damaged, Document, Quarantined, Reading, Record, Split

Format = Literal["text", "html", "json", "csv", "tsv", "warc", "tar", "parquet"]

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "text": ("", ".txt", ".text", ".md", ".rst"),
    "html": (".html", ".htm", ".xhtml"),
    "json": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "warc": (".warc", ".wet", ".wat"),
    "tar": (".tar",),
    "parquet": (".parquet",),
}
FORMATS: dict[str, Format] = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}
SHORT_FOR = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tzst": ".tar.zst", ".tbz2": ".tar.bz2"}


def format_of(file: str) -> tuple[Format | None, Packing | None]:
    """What a file's name says about it."""
    name = PurePosixPath(file.lower())
    name = name.with_suffix(SHORT_FOR.get(name.suffix, name.suffix))
    packing = PACKINGS.get(name.suffix)
    return FORMATS.get((name.with_suffix("") if packing else name).suffix), packing


def read_split(split: Split, reading: Reading) -> Iterator[Record]:
    """Every record of a split, in the order of its files; a file without any is one that is quarantined.

    Raises OSError where the disk or the network fails, and for nothing that a file may hold.
    """
    for part in split.parts:
        with open_file(split.root, part.file) as file:
            place = _shown(part.file)
            if format_of(part.file) == ("parquet", None):
                records = read_parquet(file, place, part.row_group, reading)
            else:
                read_member = partial(_read_member, archive=place, reading=reading)
                records = _read_stream(file, part.file, place, reading, read_member)
            yield from map(_with_plain_line_ends, _or_empty(records, place))


def _with_plain_line_ends(record: Record) -> Record:
    r"""Rules count lines, and a model learns them: \n ends each, whatever system wrote them."""
    if isinstance(record, Document) and "\r" in record.text:
        return replace(record, text=record.text.replace("\r\n", "\n").replace("\r", "\n"))
    return record


def _or_empty(records: Iterator[Record], place: str) -> Iterator[Record]:
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        yield Quarantined(place, 0, "empty file")


def _read_stream(
    file: Source, name: str, place: str, reading: Reading, read_member: ReadMember | None = None
) -> Iterator[Record]:
    """The records of a file that need not be sought in; of an archive where `read_member` reads what is in it."""
    kind, packing = format_of(name)
    stream = unpacked(file, packing)
    try:
        match kind:
            case "text" | "html":
                yield from read_document(stream, place, reading, html=kind == "html")
            case "json":
                yield from read_rows(json_rows(stream, reading.max_document_bytes), place)
            case "csv" | "tsv":
                rows = table_rows(stream, reading.max_document_bytes, "," if kind == "csv" else "\t", TEXT_COLUMNS)
                yield from read_rows(rows, place)
            case "warc":
                yield from read_warc(stream, place, reading)
            case "tar" if read_member is not None:
                yield from read_tar(stream, read_member)
            case _ if HTML_BEGINS.match(stream.peek()):
                yield from read_document(stream, place, reading, html=True)
            case _:
                yield Quarantined(place, 0, f"unsupported format {PurePosixPath(name).suffix}")
    except Damaged as error:
        yield Quarantined(place, error.offset, error.reason)


def _read_member(file: Source, name: str, archive: str, reading: Reading) -> Iterator[Record]:
    place = f"{archive}!{_shown(name)}"
    yield from _or_empty(_read_stream(file, name, place, reading), place)


def _shown(name: str) -> str:
    """A file's name as tables can hold it: on a disk it may be any bytes."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
