"""Files that are one document each: plain text, and HTML pages."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from danube_ray.curate.extraction import extract
from danube_ray.curate.readers.values import checked, decoded, sample
from danube_ray.curate.records import Damaged, Document, Quarantined, Reading, Unusable

HTML_BEGINS = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)


def read_document(
    stream: io.BufferedReader, place: str, reading: Reading, *, html: bool
) -> Iterator[Document | Quarantined]:
    """The one document of a file. A text file that begins as HTML does is a page too, whatever its name."""
    data = b""
    try:
        data = stream.read(reading.max_document_bytes + 1)
        if len(data) > reading.max_document_bytes:
            raise Unusable("over-long document")
        if not data.strip():
            raise Unusable("empty file")
        html = html or HTML_BEGINS.match(data) is not None
        yield Document(page_text(data, reading) if html else decoded(data), place)
    except Damaged:
        raise
    except Unusable as error:
        yield Quarantined(place, error.offset, error.reason, sample(data))


def page_text(html: bytes, reading: Reading, charset: str | None = None) -> str:
    """The text extracted from a page. Raises Unusable where there is none."""
    text = extract(html, reading.extraction, charset)
    if text is None:
        raise Unusable("nothing extracted")
    return checked(text)
