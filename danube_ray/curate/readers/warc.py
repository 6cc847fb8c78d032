"""WARC, and the WET and WAT made of it (ISO 28500): pages and plain text are records, all else is skipped by its kind.

Records are told apart here, since damage must cost one of them and no more. FastWARC, which ends with the first and can
take the process along, is given the HTTP message in one alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from fastwarc.warc import WarcRecord

from danube_ray.curate.extraction import decode_page, raise_unless_panic
from danube_ray.curate.readers.pages import page_text
from danube_ray.curate.readers.streams import BUFFER_BYTES
from danube_ray.curate.readers.values import SAMPLE_CHARS, decoded, row_address, sample
from danube_ray.curate.records import Damaged, Document, Quarantined, Reading, Record, Skipped, Unusable

HEAD_BYTES = 2**16  # the most that a record's own headers take, and those of HTTP
HEAD_ENDS, RECORD_ENDS, NEXT_BEGINS = b"\r\n\r\n", b"\r\n\r\n", b"WARC/1."
NO_DOCUMENTS = ("warcinfo", "request", "metadata", "revisit", "resource", "continuation")
PAGES = ("text/html", "application/xhtml+xml", "text/plain")
MEDIA = ("application", "audio", "font", "image", "message", "model", "multipart", "text", "video")

Headers = dict[str, str]  # by name in lower case


def read_warc(stream: io.BufferedReader, place: str, reading: Reading) -> Iterator[Record]:
    """Every record of a file. One that is damaged is quarantined, and reading goes on at the next that begins."""
    window = _Window(stream)
    while True:
        try:
            if not window.begin():
                return
            yield _next_record(window, place, reading)
        except Damaged as error:
            yield Quarantined(place, window.offset, error.reason, sample(bytes(window.data[:SAMPLE_CHARS])))
            window.restart()


def _next_record(window: _Window, place: str, reading: Reading) -> Record:
    """The record that begins the window, which is moved behind it."""
    offset, begins = window.offset, bytes(window.data[:SAMPLE_CHARS])
    head_bytes = window.find(HEAD_ENDS, HEAD_BYTES) + len(HEAD_ENDS)
    headers = _headers(bytes(window.data[:head_bytes]))
    body_bytes = _content_length(headers)
    if body_bytes is None:
        window.seek_next()
        return Quarantined(place, offset, "damaged record", sample(begins))
    end, whole = head_bytes + body_bytes, body_bytes <= reading.max_document_bytes
    window.fill(end + len(RECORD_ENDS) if whole else head_bytes + HEAD_BYTES)
    # The file's last record may lack what ends it, but no other: then its length is wrong, and so its content.
    if whole and not (len(window.data) >= end and RECORD_ENDS.startswith(window.data[end : end + len(RECORD_ENDS)])):
        window.seek_next()
        return Quarantined(place, offset, "damaged record", sample(begins))
    body = bytes(window.data[head_bytes : end if whole else head_bytes + HEAD_BYTES])
    if whole:
        window.drop(end + len(RECORD_ENDS))
    else:
        window.seek_next()
    try:
        return _document_or_kind(headers, body, place, offset, reading, whole)
    except Unusable as error:
        return Quarantined(place, offset, error.reason, sample(body))


def _headers(head: bytes) -> Headers:
    """A record's headers; none for what is no record."""
    first, *others = head.decode(errors="replace").split("\r\n")
    if not first.startswith("WARC/"):
        return {}
    pairs = (line.partition(":") for line in others)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _content_length(headers: Headers) -> int | None:
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdecimal() and len(length) < 16 else None


def _document_or_kind(
    headers: Headers, body: bytes, place: str, offset: int, reading: Reading, whole: bool
) -> Document | Skipped:
    """What a record is. Only one that is `whole` is unpacked; of an over-long one the headers say whether it counts."""
    kind, media, charset = headers.get("warc-type", ""), "", None
    if kind == "response":
        if "http" not in headers.get("content-type", "").lower():
            return Skipped(place, offset, "response without HTTP")
        status, media, charset, body = _http(body, reading.max_document_bytes, unpack=whole)
        media = (headers.get("warc-identified-payload-type") or media).lower()
        if not 200 <= status < 300:
            return Skipped(place, offset, f"status {status // 100}xx")
        if media not in PAGES:
            main = media.partition("/")[0]
            return Skipped(place, offset, main if main in MEDIA else "payload of an unknown type")
    elif kind != "conversion":
        return Skipped(place, offset, kind if kind in NO_DOCUMENTS else "record of an unknown type")
    if not whole or len(body) > reading.max_document_bytes:
        raise Unusable("over-long document")
    if not body.strip():
        raise Unusable("empty record")
    url = row_address({"url": headers.get("warc-target-uri", "").strip("<>")}, f"{place}#{offset}")
    if kind == "conversion":
        return Document(decoded(body), url)
    return Document(decode_page(body, charset) if media == "text/plain" else page_text(body, reading, charset), url)


def _http(message: bytes, max_bytes: int, *, unpack: bool) -> tuple[int, str, str | None, bytes]:
    """Status (0 where there is none), media type, charset and payload of a response, not much beyond `max_bytes`."""
    # The length a record states is the memory FastWARC takes: it gets to see the true one.
    head = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: %d\r\n\r\n"
    try:
        record = WarcRecord.from_bytes(head % len(message) + message)
        record.parse_http(auto_decode="all" if unpack else "none", strict_mode=False)
        payload = record.reader.read(max_bytes + 1)
        return record.http_headers.status_code or 0, record.http_content_type or "", record.http_charset, payload
    except (OSError, ValueError) as error:
        raise Unusable("damaged HTTP payload") from error
    except BaseException as error:
        raise_unless_panic(error)
        raise Unusable("damaged HTTP message") from error


class _Window:
    """The part of a stream that is being looked at; `offset` is where it begins."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.restart()

    def restart(self) -> None:
        self.data, self.offset = bytearray(), self._stream.tell()

    def begin(self) -> bool:
        """Move behind blank lines; whether something follows."""
        while self.fill(1) and self.data[0] in b"\r\n":
            self.drop(1)
        return bool(self.data)

    def fill(self, size: int) -> bool:
        """Whether there are `size` bytes, read as far as is needed."""
        while len(self.data) < size:
            if not (more := self._stream.read1(BUFFER_BYTES)):
                return False
            self.data += more
        return True

    def find(self, wanted: bytes, within_bytes: int) -> int:
        """Where `wanted` is first, or a number below 0."""
        start = 0
        while (place := self.data.find(wanted, start, within_bytes)) < 0:
            start = max(0, len(self.data) - len(wanted))
            if len(self.data) >= within_bytes or not self.fill(len(self.data) + 1):
                return -len(wanted)
        return place

    def drop(self, size: int) -> None:
        dropped = max(0, min(size, len(self.data)))
        del self.data[:dropped]
        self.offset += dropped

    def seek_next(self) -> None:
        """Move to the next place where a record may begin, or to the end."""
        self.drop(1)
        while (place := self.data.find(NEXT_BEGINS)) < 0:
            self.drop(len(self.data) - len(NEXT_BEGINS) + 1)
            if not self.fill(len(self.data) + 1):
                self.drop(len(self.data))
                return
        self.drop(place)
