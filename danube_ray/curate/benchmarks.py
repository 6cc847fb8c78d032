"""The questions of evaluation sets, from the files they are handed round in."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from danube_ray.config import require

# Where a row has several of these, the first is its question. A dictionary there is a row again, and of a list (the
# turns of MT-Bench) every text is a question.
QUESTION_FIELDS = ("question", "problem", "prompt", "instruction", "goal", "query", "ctx", "sentence", "premise")
QUESTION_FIELDS += ("stem", "turns", "text", "input", "doc")
SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")
SETTING = "CurationConfig.benchmarks"
MAX_FIELD_CHARS = 2**24


def read_questions(path: Path) -> Iterator[str]:
    """The questions of a file, or of a folder's files by name; rows without one give none.

    Files are JSON lines, a JSON list, TSV or CSV with a header (each of these also as .gz), or Parquet. `ConfigError`
    where there is no such file or no question at all.
    """
    files = sorted(file for file in path.rglob("*") if _suffix(file) in SUFFIXES) if path.is_dir() else [path]
    known = all(file.is_file() and _suffix(file) in SUFFIXES for file in files)
    require(bool(files) and known, SETTING, str(path), f"a {', '.join(SUFFIXES)} file or a folder with some")
    number = 0
    for file in files:
        for row in _rows(file):
            for question in _questions(row):
                number += 1
                yield question
    require(number > 0, SETTING, str(path), f"rows with one of the fields {', '.join(QUESTION_FIELDS)}")


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _rows(file: Path) -> Iterator[Any]:
    if _suffix(file) == ".parquet":
        import pyarrow.parquet as pq

        yield from pq.read_table(file).to_pylist()
        return
    with _open(file) as lines:
        try:
            if _suffix(file) == ".json":
                loaded = json.load(lines)
                yield from loaded if isinstance(loaded, list) else [loaded]
            elif _suffix(file) == ".jsonl":
                yield from (json.loads(line) for line in lines if line.strip())
            else:
                csv.field_size_limit(MAX_FIELD_CHARS)
                yield from csv.DictReader(lines, delimiter="\t" if _suffix(file) == ".tsv" else ",")
        except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
            require(False, SETTING, str(file), "a well-formed file", str(error))


def _open(file: Path) -> TextIO:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _questions(row: Any) -> Iterator[str]:
    if isinstance(row, str) and row.strip():
        yield row.encode(errors="replace").decode()
    elif isinstance(row, list):
        for part in row:
            yield from _questions(part)
    elif isinstance(row, Mapping):
        fields = {str(name).lower(): value for name, value in row.items() if name is not None and value}
        name = next((name for name in QUESTION_FIELDS if name in fields), None)
        if name == "instruction" and isinstance(fields.get("input"), str):  # Alpaca's: a task, and what it is done to
            yield f"{fields['instruction']}\n{fields['input']}"
        elif name is not None:
            yield from _questions(fields[name])
