"""From files to documents: which splits a source is read in, and what each record of a split is.

A source is a file or a folder of plain text (a document a file), JSON lines and Parquet (`text`, and a `url` or `id`
where there is one); text and JSON lines may be gzipped. What can't be read becomes a `Quarantined` record with file,
offset and reason: a reader skips nothing but blank lines and hidden files.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.config import require, valid_name
from danube_ray.curate.records import Document, Part, Quarantined, Split, Unusable

TEXT_SUFFIXES = {"", ".txt", ".text", ".md", ".rst"}
JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
SAMPLE_CHARS = 200
SKIP_BYTES = 2**20
ROWS_AT_ONCE = 256

# What the standard library raises for a gzip stream that is cut off, corrupt, or no gzip at all.
DAMAGED_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


def plan_splits(source: str, path: Path, split_bytes: int) -> list[Split]:
    """Cut a source into splits of at least `split_bytes` where files and row groups are smaller, in name order.

    Raises ConfigError for a path that does not exist or holds no file.
    """
    require(valid_name(source), "source", source, "letters, digits, '.', '_' and '-'")
    require(path.exists(), f"path of source {source!r}", str(path), "an existing file or folder")
    root = path if path.is_dir() else path.parent
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    files = [file for file in files if not any(name.startswith(".") for name in file.relative_to(root).parts)]
    require(bool(files), f"path of source {source!r}", str(path), "a folder with at least one file")

    splits, parts, total_bytes = [], [], 0
    for part in (part for file in files for part in _parts(root, file)):
        parts.append(part)
        total_bytes += part.bytes
        if total_bytes >= split_bytes:
            splits.append(Split(source, str(root.resolve()), tuple(parts)))
            parts, total_bytes = [], 0
    if parts:
        splits.append(Split(source, str(root.resolve()), tuple(parts)))
    return splits


def read_split(split: Split, max_document_bytes: int) -> Iterator[Document | Quarantined]:
    """Every record of a split, in file order; documents over `max_document_bytes` are quarantined unread."""
    for part in split.parts:
        path = Path(split.root) / part.file
        match _format(part.file):
            case "text":
                yield _read_text(path, part.file, max_document_bytes)
            case "json":
                yield from _read_json_lines(path, part.file, max_document_bytes)
            case "parquet":
                yield from _read_parquet(path, part, max_document_bytes)
            case None:
                yield Quarantined(part.file, 0, f"unsupported format {Path(part.file).suffix}")


def _format(file: str) -> Literal["text", "json", "parquet"] | None:
    name = PurePosixPath(file.lower())
    packed = name.suffix == ".gz"
    suffix = name.with_suffix("").suffix if packed else name.suffix
    if suffix == ".parquet" and not packed:
        return "parquet"
    return "text" if suffix in TEXT_SUFFIXES else "json" if suffix in JSON_SUFFIXES else None


def _parts(root: Path, file: Path) -> list[Part]:
    name, facts = file.relative_to(root).as_posix(), file.stat()
    whole = [Part(name, facts.st_size, facts.st_mtime_ns)]
    if _format(name) != "parquet":
        return whole
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        _raise_if_disk(error)
        return whole  # reading it says what is wrong
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [
        Part(name, group.total_byte_size, facts.st_mtime_ns, index)
        for index, group in enumerate(groups)
        if group.num_rows
    ] or whole


def _open(path: Path) -> BinaryIO:
    packed = path.suffix.lower() == ".gz"
    return cast(BinaryIO, gzip.open(path, "rb") if packed else path.open("rb"))


def _read_text(path: Path, file: str, max_bytes: int) -> Document | Quarantined:
    data = b""
    try:
        with _open(path) as stream:
            data = stream.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise Unusable("over-long document")
        text = _decode(data)
        if not text.strip():
            raise Unusable("empty file")
        return Document(text, file)
    except DAMAGED_GZIP:
        return Quarantined(file, 0, "damaged gzip")
    except Unusable as error:
        return Quarantined(file, error.offset, error.reason, _sample(data))


def _read_json_lines(path: Path, file: str, max_bytes: int) -> Iterator[Document | Quarantined]:
    records = end = 0
    with _open(path) as stream:
        try:
            while line := stream.readline(max_bytes + 1):
                start, end = end, end + len(line)
                if not line.strip():
                    continue
                records += 1
                sample = line
                try:
                    if len(line) > max_bytes:
                        while not line.endswith(b"\n") and (line := stream.readline(SKIP_BYTES)):
                            end += len(line)
                        raise Unusable("over-long document")
                    yield _json_document(_decode(line), f"{file}#{start}")
                except Unusable as error:
                    yield Quarantined(file, start + error.offset, error.reason, _sample(sample))
        except DAMAGED_GZIP:
            records += 1
            yield Quarantined(file, end, "damaged gzip")
    if not records:
        yield Quarantined(file, 0, "empty file")


def _json_document(line: str, place: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise Unusable("malformed JSON") from None
    if not isinstance(row, dict):
        raise Unusable("not a JSON object")
    return Document(_checked(row.get("text")), _url(row, place))


def _read_parquet(path: Path, part: Part, max_bytes: int) -> Iterator[Document | Quarantined]:
    row = 0
    try:
        with pq.ParquetFile(path) as parquet:
            columns = _text_columns(parquet.schema_arrow)
            if part.row_group is None:
                raise Unusable("empty file")
            row = sum(parquet.metadata.row_group(index).num_rows for index in range(part.row_group))
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[part.row_group], columns=columns):
                for values in zip(*batch.columns, strict=True):
                    yield _parquet_document(dict(zip(columns, values, strict=True)), part.file, row, max_bytes)
                    row += 1
    except Unusable as error:
        yield Quarantined(part.file, row, error.reason)
    except (pa.ArrowException, OSError) as error:
        _raise_if_disk(error)
        yield Quarantined(part.file, row, "damaged Parquet")


def _text_columns(schema: pa.Schema) -> list[str]:
    def is_text(name: str) -> bool:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    if schema.names.count("text") != 1:
        raise Unusable("no text column")
    if not is_text("text"):
        raise Unusable("text column is not a string")
    return ["text"] + [name for name in ("url", "id") if schema.names.count(name) == 1 and is_text(name)]


def _parquet_document(row: dict[str, pa.Scalar], file: str, index: int, max_bytes: int) -> Document | Quarantined:
    try:
        values = {name: scalar.as_py() for name, scalar in row.items()}
        text = _checked(values["text"])
        if len(text.encode()) > max_bytes:
            return Quarantined(file, index, "over-long document", text[:SAMPLE_CHARS])
        return Document(text, _url(values, f"{file}#{index}"))
    except UnicodeDecodeError:
        return Quarantined(file, index, "invalid UTF-8")
    except Unusable as error:
        return Quarantined(file, index, error.reason)


def _decode(data: bytes) -> str:
    """UTF-8 text without NULs (nor its byte order mark)."""
    nul = data.find(0)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("binary data" if nul >= 0 else "invalid UTF-8", error.start) from None
    if nul >= 0:
        raise Unusable("NUL byte", nul)
    return text


def _checked(text: Any) -> str:
    """A value that some format calls text, if it is: JSON can hold NULs and half characters that UTF-8 can't."""
    if text is None:
        raise Unusable("no text")
    if not isinstance(text, str):
        raise Unusable("text is not a string")
    if "\0" in text:
        raise Unusable("NUL byte")
    if not _is_unicode(text):
        raise Unusable("lone surrogate")
    return text


def _url(row: dict[str, Any], place: str) -> str:
    for value in (row.get("url"), row.get("id")):
        if isinstance(value, str) and value and "\0" not in value and _is_unicode(value):
            return value
    return place


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sample(data: bytes) -> str:
    return data[:SAMPLE_CHARS].decode(errors="replace").replace("\0", "\ufffd")


def _raise_if_disk(error: Exception) -> None:
    """Arrow raises OSError for bad bytes too; one with an errno is the disk's, and no fault of the data."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
