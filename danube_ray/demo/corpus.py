"""Text that every machine with Python has, as three sources of rising cleanliness; or the user's own.

- `web`: read-me files, metadata and licences of the installed packages and docstrings as they stand in their files,
  with all that makes raw text raw: boilerplate, tables, near-empty pages, and the same licence in a hundred packages;
- `docs`: the documentation of other modules of those packages, cleaned, as pages;
- `stdlib`: the same of the standard library, and the language reference that `pydoc` holds.

Files are read with `ast`, never imported. Order and cuts follow stable hashes of names, so the same environment gives
the same bytes however many processes read it.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from danube_ray.artifacts import write_atomically
from danube_ray.config import CurationConfig, HeuristicRules, LineRules, require
from danube_ray.demo.docstrings import Documentation, read_module
from danube_ray.demo.instructions import instruction_sets, stable_number

SHARD_BYTES = 2**20
MAX_FILE_BYTES = 200_000
DOCUMENT_CHARS = 4_000
MIN_MODULE_BYTES = 1_000
MODULES_AT_ONCE = 16
WEB_FILE_SHARE = 0.6
WEB_NAMES = re.compile(
    r"(README|LICENSE|LICENCE|COPYING|NOTICE|AUTHORS|CHANGES|HISTORY|METADATA|.*\.(md|rst|txt))", re.I
)
LEFT_OUT_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo"}
RENAMED_MODULES = {"posixpath": "os.path"}

# The rules for web pages, as far as they suit documentation: it has more symbols, short lines, code and set phrases.
DOCUMENTATION_RULES = HeuristicRules(
    max_duplicate_lines=0.50,
    max_duplicate_line_chars=0.30,
    max_duplicate_5gram_chars=0.45,
    max_duplicate_6gram_chars=0.42,
    max_duplicate_7gram_chars=0.39,
    max_duplicate_8gram_chars=0.36,
    max_duplicate_9gram_chars=0.33,
    max_duplicate_10gram_chars=0.30,
    min_words=30,
    min_alphabetic_words=0.55,
    max_curly_brackets=0.02,
    min_sentences=2,
    max_short_lines=0.80,
    max_repeated_line_chars=0.20,
    max_newlines_per_word=0.50,
    lines=LineRules(rewrite=False),
)
# Documentation is full of code, and of module texts that resemble each other.
DOCUMENTATION_SETTINGS = CurationConfig(rules=DOCUMENTATION_RULES, languages=(), max_code_share=1, min_jaccard=0.9)

Text = tuple[str, str]


@dataclass(frozen=True)
class CorpusFacts:
    """What was collected: bytes of text by source, and rows of the instruction sets."""

    source_bytes: dict[str, int]
    instructions: int
    preferences: int
    questions: int


def collect(out: Path, max_bytes_per_source: int, text: Path | None = None) -> CorpusFacts:
    """Fill `out` with `sources/NAME/` for curation, `instructions.jsonl`, `preferences.jsonl` and `questions.jsonl`.

    `web` has at most `max_bytes_per_source` of text, `docs` and `stdlib` half of that. With `text`, a file or a folder
    of text, JSON lines or Parquet, the sources are made of it: one for each subfolder, and one for the files beside
    them. Raises ConfigError when `text` does not exist or is empty.
    """
    require(max_bytes_per_source > 0, "max_bytes_per_source", max_bytes_per_source, "greater than 0")
    shutil.rmtree(out / "sources", ignore_errors=True)
    source_bytes = {} if text is None else _link_sources(text, out / "sources")
    workers = min(4, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        library = list(_read_modules(pool, _modules(Path(sysconfig.get_paths()["stdlib"]))))
        if text is None:
            texts = _python_sources(pool, library, max_bytes_per_source)
            source_bytes = {name: _write_shards(out / "sources" / name, rows) for name, rows in texts.items()}
    sets = instruction_sets(symbol for _, documentation in library for symbol in documentation.symbols)
    for name, rows in zip(("instructions", "preferences", "questions"), sets, strict=True):
        write_atomically(out / f"{name}.jsonl", _json_lines(rows))
    return CorpusFacts(source_bytes, *map(len, sets))


def _python_sources(
    pool: ProcessPoolExecutor, library: list[tuple[str, Documentation]], max_bytes: int
) -> dict[str, Iterable[Text]]:
    """The texts of each source with their URLs, up to its share of the bytes. A package's module goes to one source."""
    packages = Path(sysconfig.get_paths()["purelib"])
    modules = _modules(packages)
    raw_modules = [module for module in modules if stable_number(f"raw {module[0]}") % 2]
    paged_modules = [module for module in modules if not stable_number(f"raw {module[0]}") % 2]
    raw = (text for _, found in _read_modules(pool, raw_modules) for text in found.raw)
    paged = (text for _, found in _read_modules(pool, paged_modules) for text in found.pages)
    pages = [(f"python:{name}", text) for _, found in library for name, text in found.pages]
    pages += [(f"python:topic/{name}", text) for name, text in topics.items()]
    pages.sort(key=lambda page: stable_number(page[0]))
    web_file_bytes = int(WEB_FILE_SHARE * max_bytes)
    return {
        "web": chain(
            _cut(_web_files(packages), web_file_bytes),
            _cut(((f"package:{name}", text) for name, text in raw), max_bytes - web_file_bytes),
        ),
        "docs": _cut(((f"package:{name}", text) for name, text in paged), max_bytes // 2),
        "stdlib": _cut(pages, max_bytes // 2),
    }


def _cut(texts: Iterable[Text], max_bytes: int) -> Iterator[Text]:
    """The first texts that together have at most `max_bytes`."""
    total_bytes = 0
    for url, text in texts:
        total_bytes += len(text.encode(errors="replace"))
        if total_bytes > max_bytes:
            return
        yield url, text


def _walk(root: Path) -> Iterator[Path]:
    """Every file below `root` outside of tests and caches."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT_FOLDERS]
        yield from (Path(folder, name) for name in names)


def _modules(root: Path) -> list[tuple[str, Path]]:
    """Public modules below `root` that are long enough to say something, by dotted name, in an order by hash."""
    found: list[tuple[str, Path]] = []
    for path in _walk(root):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        is_public = parts and all(part.isidentifier() and not part.startswith("_") for part in parts)
        if path.suffix == ".py" and is_public and MIN_MODULE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            name = ".".join(parts)
            found.append((RENAMED_MODULES.get(name, name), path))
    return sorted(found, key=lambda module: stable_number(module[0]))


def _read_modules(pool: ProcessPoolExecutor, modules: list[tuple[str, Path]]) -> Iterator[tuple[str, Documentation]]:
    """Each module's documentation, in order; what is not asked for any more is not read."""
    names, paths = [name for name, _ in modules], [path for _, path in modules]
    yield from zip(names, pool.map(read_module, paths, names, chunksize=MODULES_AT_ONCE), strict=True)


def _web_files(packages: Path) -> Iterator[Text]:
    """Files that packages bring for people to read, in an order by hash."""
    files = [path.relative_to(packages).as_posix() for path in _walk(packages) if WEB_NAMES.fullmatch(path.name)]
    for file in sorted(files, key=stable_number):
        path = packages / file
        if path.stat().st_size <= MAX_FILE_BYTES:
            yield f"package:{file}", path.read_text(errors="replace").replace("\0", "")


def _write_shards(folder: Path, texts: Iterable[Text]) -> int:
    """Write rows `text`, `url` as gzipped JSON lines, about 1 MB of text a file; bytes of text in all."""
    folder.mkdir(parents=True)
    rows: list[dict[str, str]] = []
    shard_bytes = total_bytes = number = 0

    def flush() -> None:
        write_atomically(folder / f"shard-{number:05}.jsonl.gz", gzip.compress(_json_lines(rows).encode(), mtime=0))

    for url, text in texts:
        rows.append({"text": text, "url": url})
        shard_bytes += len(text.encode(errors="replace"))
        if shard_bytes >= SHARD_BYTES:
            flush()
            rows, total_bytes, shard_bytes, number = [], total_bytes + shard_bytes, 0, number + 1
    if rows:
        flush()
    return total_bytes + shard_bytes


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _link_sources(text: Path, folder: Path) -> dict[str, int]:
    """A file, or a folder's files and subfolders, as sources below `folder`; bytes on disk of each.

    Files are linked, but for long plain text: a book is one file and many documents.
    """
    require(text.exists(), "text", str(text), "an existing file or folder")
    text = text.resolve()
    entries = [text] if text.is_file() else sorted(path for path in text.iterdir() if not path.name.startswith("."))
    require(bool(entries), "text", str(text), "a folder with at least one file")
    for entry in entries:
        source = folder / _source_name(entry.name if entry.is_dir() else text.stem if text.is_file() else text.name)
        for file in [entry] if entry.is_file() else sorted(path for path in entry.rglob("*") if path.is_file()):
            place = source / (file.name if entry.is_file() else file.relative_to(entry))
            place.parent.mkdir(parents=True, exist_ok=True)
            documents = _cut_into_documents(file)
            if documents:
                write_atomically(place.with_name(f"{file.name}.jsonl"), _json_lines(documents))
            else:
                place.symlink_to(file)
    return {
        source.name: sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        for source in sorted(folder.iterdir())
    }


def _cut_into_documents(file: Path) -> list[dict[str, str]]:
    """Rows of a long plain text, cut between paragraphs; none for what is short, of another form, or not UTF-8."""
    if file.suffix != ".txt" or file.stat().st_size < 4 * DOCUMENT_CHARS:
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    documents, size = [[]], 0
    for paragraph in re.split(r"\n\s*\n", text):
        if size > DOCUMENT_CHARS:
            documents.append([])
            size = 0
        documents[-1].append(paragraph)
        size += len(paragraph)
    return [{"text": "\n\n".join(parts), "url": f"{file}#{number}"} for number, parts in enumerate(documents)]


def _source_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name).lstrip(".")
