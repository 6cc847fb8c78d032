"""What a value must be to count as text, and which of a row's values is its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from danube_ray.curate.records import Unusable

# The first of these that a row has is its text. `source` counts only as a list of sentences: as a string it commonly
# names where a row comes from.
TEXT_FIELDS = ("text", "raw_content", "content", "abstract", "source")
TEXT_COLUMNS = tuple(name for name in TEXT_FIELDS if name != "source")  # a table has no lists
TITLED = ("abstract", "source")  # what a title stands before, as its own paragraph
ADDRESS_FIELDS = ("url", "id")
SAMPLE_CHARS = 200


def decoded(data: bytes) -> str:
    """UTF-8 text without NULs (nor its byte order mark). Raises Unusable."""
    nul = data.find(0)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("binary data" if nul >= 0 else "invalid UTF-8", error.start) from None
    if nul >= 0:
        raise Unusable("NUL byte", nul)
    return text


def checked(text: Any) -> str:
    """A value that some format calls text, if it is: JSON can hold NULs and half characters that UTF-8 can't."""
    if text is None:
        raise Unusable("no text")
    if isinstance(text, list):
        text = " ".join(checked(sentence) for sentence in text)
    if not isinstance(text, str):
        raise Unusable("text is not a string")
    if "\0" in text:
        raise Unusable("NUL byte")
    if not _is_unicode(text):
        raise Unusable("lone surrogate")
    return text


def row_text(row: Mapping[str, Any]) -> str:
    """The text of a row: its first of `TEXT_FIELDS`, a list's sentences joined. Raises Unusable where it has none."""
    for name in TEXT_FIELDS:
        value = row.get(name)
        if value is None or (name == "source" and not isinstance(value, list)):
            continue
        text, title = checked(value), row.get("title")
        return f"{checked(title)}\n\n{text}" if name in TITLED and isinstance(title, str) and title else text
    raise Unusable("no text")


def row_address(row: Mapping[str, Any], place: str) -> str:
    """A row's `url`, or its `id`, or where it lies."""
    for name in ADDRESS_FIELDS:
        value = row.get(name)
        if isinstance(value, str) and value and "\0" not in value and _is_unicode(value):
            return value
    return place


def sample(data: bytes) -> str:
    """The beginning of bad bytes, as something to look at."""
    return data[:SAMPLE_CHARS].decode(errors="replace").replace("\0", "\ufffd")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
