"""Real documents of several kinds, from the shared test data."""

from __future__ import annotations

import csv
import io
import lzma
import tarfile
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from resiliparse.extract.html2text import extract_plain_text


@cache
def web_pages(data: Path) -> list[tuple[str, str]]:
    """Name and main content of 1,034 web pages in several languages."""
    pages = _members(data / "web/html_trafilatura/html.tar.xz")
    return [(name, extract_plain_text(html, main_content=True)) for name, html in pages]


@cache
def abstracts(data: Path, number: int) -> list[str]:
    """Abstracts of `number` papers, mathematics first."""
    found: list[str] = []
    for name in ("math.FA", "stat.ME", "cs.CR"):
        packed = (data / f"academic/arxiv/{name}.tsv.xz").read_bytes()
        rows = csv.DictReader(io.StringIO(lzma.decompress(packed).decode()), delimiter="\t")
        found += [row["abstract"] for row in islice(rows, number - len(found))]
    return found


@cache
def novel_pages(data: Path, page_chars: int = 5000) -> list[str]:
    """40 novels in pieces of `page_chars`, without regard to their chapters."""
    novels = (text for _, text in _members(data / "books/novels/books.tar.xz"))
    return [novel[start : start + page_chars] for novel in novels for start in range(0, len(novel), page_chars)]


@cache
def articles(data: Path) -> list[str]:
    """Encyclopedic sections of WikiText-2."""
    folder = data / "wiki/wikitext2/word_language_model/data/wikitext-2"
    return [section for name in ("test", "valid") for section in (folder / f"{name}.txt").read_text().split("\n = ")]


def _members(archive: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)) is not None:
                yield member.name, file.read().decode(errors="replace")
