"""Files to read, and reading them: shared by the tests of readers and sources."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import zstandard

from danube_ray.config import Extraction
from danube_ray.curate.readers import Reading, read_split
from danube_ray.curate.records import Document, Quarantined, Record, Skipped
from danube_ray.curate.sources import plan_splits

LIMIT = 1_000
PACK = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
}


def read(path: Path, limit: int = LIMIT, extraction: Extraction = "resiliparse") -> list[Record]:
    return [
        record
        for split in plan_splits("web", path, split_bytes=2**20)
        for record in read_split(split, Reading(limit, extraction))
    ]


def documents(records: list[Record]) -> list[Document]:
    return [record for record in records if isinstance(record, Document)]


def quarantined(records: list[Record]) -> list[tuple[str, int, str]]:
    return [(record.file, record.offset, record.reason) for record in records if isinstance(record, Quarantined)]


def skipped(records: list[Record]) -> list[str]:
    return [record.kind for record in records if isinstance(record, Skipped)]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def json_lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def page(text: str, charset: str = "utf-8") -> bytes:
    """An HTML page, between a menu and a footer, of one paragraph and its repetition in other words."""
    menu = "".join(f'<li><a href="/{name}">{name}</a></li>' for name in ("home", "about", "contact"))
    return (
        f'<!DOCTYPE html><html><head><meta charset="{charset}"><title>A page</title></head><body><nav><ul>{menu}</ul>'
        f"</nav><main><article><h1>What it says</h1><p>{text}</p><p>Somebody wrote this page, and what it says is "
        f"this: {text}</p></article></main><footer>All rights reserved</footer></body></html>"
    ).encode(charset)


def warc_record(kind: str, body: bytes, url: str = "http://example.org/", media: str = "") -> bytes:
    media = media or ("application/http; msgtype=response" if kind == "response" else "text/plain")
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {media}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n"


def response(body: bytes, media: str = "text/html", status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\n{extra}\r\n".encode() + body


def tar(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()
