"""Real documents for the benchmarks of curation: 0.3 to 20 thousand characters each, of sources clean and raw.

From the test data where it is: arXiv abstracts, novels cut where paragraphs end, web pages extracted by trafilatura
(kept in the machine's folder for temporary files: that takes minutes) and the same pages with all their boilerplate,
sections of an encyclopedia. Else from what every machine with Python has: the documentation that `danube demo` uses.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import lzma
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from danube_ray.artifacts import write_atomically

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
MIN_CHARS, MAX_CHARS = 300, 20_000
ABSTRACTS_PER_CATEGORY, PIECES_PER_NOVEL = 400, 30
PYTHON_BYTES = 16 * 2**20


def load(folder: Path | None = None) -> list[str]:
    """Documents in a shuffled order that is always the same, so that any slice of them is like any other."""
    data = Path(os.environ.get("DANUBE_TEST_DATA", SHARED_DATA))
    texts = read_folder(folder) if folder else shared_texts(data) if data.is_dir() else python_texts()
    chosen = {text for text in texts if MIN_CHARS <= len(text) <= MAX_CHARS}
    return sorted(chosen, key=lambda text: hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest())


def read_folder(folder: Path) -> Iterator[str]:
    """The text files of a folder, and each `text` of its JSON lines (gzipped or not)."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        stem = file.with_suffix("") if file.suffix == ".gz" else file
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            if stem.suffix in {".jsonl", ".json"}:
                yield from (json.loads(line)["text"] for line in lines)
            else:
                yield lines.read()


def python_texts() -> Iterator[str]:
    from danube_ray.demo.corpus import collect

    with tempfile.TemporaryDirectory() as folder:
        collect(Path(folder), PYTHON_BYTES)
        yield from read_folder(Path(folder) / "sources")


def shared_texts(data: Path) -> Iterator[str]:
    yield from abstracts(data)
    yield from novel_pieces(data)
    yield from encyclopedia_sections(data)
    yield from web_pages(data)


def abstracts(data: Path) -> Iterator[str]:
    for file in sorted((data / "academic" / "arxiv").glob("*.tsv.xz")):
        with lzma.open(file, "rt") as lines:
            for row in islice(csv.DictReader(lines, delimiter="\t"), ABSTRACTS_PER_CATEGORY):
                yield f"{row['title']}\n\n{row['abstract']}"


def novel_pieces(data: Path) -> Iterator[str]:
    """Paragraphs of a novel until a length is reached that goes from 1,000 to 16,000 characters and back."""
    for text in tar_texts(data / "books" / "novels" / "books.tar.xz"):
        pieces, paragraphs, chars = 0, [], 0
        for paragraph in text.split("\n"):
            paragraphs.append(paragraph)
            chars += len(paragraph)
            if chars > 1_000 * (1 + pieces % 16):
                yield "\n".join(paragraphs)
                pieces, paragraphs, chars = pieces + 1, [], 0
                if pieces == PIECES_PER_NOVEL:
                    break


def encyclopedia_sections(data: Path) -> Iterator[str]:
    folder = data / "wiki" / "wikitext2" / "word_language_model" / "data" / "wikitext-2"
    for file in sorted(folder.glob("*.txt")):
        # Its language-model marks (`<unk>`, ` @-@ `) are no text.
        text = re.sub(r" @(.)@ ", r"\1", file.read_text().replace("<unk>", "unk"))
        yield from re.split(r"\n(?= = )", text)


def web_pages(data: Path) -> list[str]:
    """Each page twice: its main text, and all its text, as in Common Crawl's WET files."""
    cache = Path(tempfile.gettempdir()) / f"danube_ray-benchmarks-{os.getuid()}" / "web_pages.json"
    if not cache.is_file():
        pages = tar_texts(data / "web" / "html_trafilatura" / "html.tar.xz")
        with get_context("spawn").Pool(min(4, os.cpu_count() or 1)) as pool:
            texts = [text for both in pool.imap(main_and_all_text, pages, 8) for text in both]
        write_atomically(cache, json.dumps(texts).encode())
    return json.loads(cache.read_text())


def main_and_all_text(page: str) -> tuple[str, str]:
    from trafilatura import extract, html2txt

    return extract(page, favor_precision=True) or "", html2txt(page)


def tar_texts(path: Path) -> Iterator[str]:
    with tarfile.open(path) as members:
        for member in members:
            if member.isfile() and (file := members.extractfile(member)):
                yield file.read().decode(errors="replace").replace("\r\n", "\n")
