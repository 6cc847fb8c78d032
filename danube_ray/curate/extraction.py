"""From a page's bytes to the text of its article.

`trafilatura` runs with the settings of FineWeb's recipe (Penedo et al. 2024, section 3.2, and datatrove's script):
precision before recall, and no comments. Its `deduplicate` is left out: it counts paragraphs over whatever pages a
process saw before, and a text must depend on its page alone; the rules judge repetition. `resiliparse` takes a page's
main content as DataComp-LM did (Li et al. 2024, section 4.2), many times faster.
"""

from __future__ import annotations

import logging
import re

from danube_ray.config import Extraction
from danube_ray.curate.records import Unusable

# Both libraries take quadratic time over some pages: tens of seconds, and more, above these counts. They are counted,
# and no clock is asked, so that a page has the same fate on every machine. Of 1,032 real pages the largest has 19,629
# brackets, and the longest tag 3,719 words.
MAX_TAGS = 50_000
MAX_TAG_WORDS = 10_000
LONG_TAG = re.compile(rb"<[a-zA-Z][^<>]{20000,}")


def extract(html: bytes, how: Extraction, charset: str | None = None) -> str | None:
    """The main text of a page, its lines and paragraphs kept apart; None where there is none.

    `charset` is what an HTTP header declared. Raises Unusable for what is no page, or more of one than `MAX_TAGS`.
    """
    if html.count(b"<") > MAX_TAGS:
        raise Unusable("too many tags in a page")
    if any(len(tag.split()) > MAX_TAG_WORDS for tag in LONG_TAG.findall(html)):
        raise Unusable("too many attributes in a tag")
    page = decode_page(html, charset)
    try:
        text = _trafilatura(page) if how == "trafilatura" else _resiliparse(page)
    except MemoryError:
        raise
    except Exception as error:
        raise Unusable("extraction failed") from error
    except BaseException as error:
        raise_unless_panic(error)
        raise Unusable("extraction failed") from error
    return text if text and text.strip() else None


def decode_page(data: bytes, charset: str | None = None) -> str:
    """A page's characters: valid UTF-8 is taken as such, then counts what is declared, then what it looks like.

    Raises Unusable for bytes that are no text.
    """
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    declared = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    names = [declared, detect_encoding(data, from_html_meta=True)]
    # ISO-2022-JP is valid UTF-8 too: bytes below 128 with escapes.
    names.insert(1 if b"\x1b$" in data else 0, "utf-8")
    for name in filter(None, names):
        try:
            page = data.decode(name)
            break
        except (UnicodeError, LookupError):
            continue
    else:
        page = data.decode("utf-8", errors="replace")
    if (nul := page.find("\0")) >= 0:
        raise Unusable("NUL byte in a page", nul)
    return page.removeprefix("\ufeff")


def raise_unless_panic(error: BaseException) -> None:
    """Libraries written in Rust tell a broken assumption by a BaseException of their own; all others are raised."""
    if type(error).__name__ != "PanicException":
        raise error


def _trafilatura(page: str) -> str | None:
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # quarantine says which pages are bad
    return trafilatura.extract(page, favor_precision=True, include_comments=False)


def _resiliparse(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(page, main_content=True, alt_texts=False, comments=False)
