"""The questions of evaluation sets, from the files they are handed round in."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.config import require
from danube_ray.curate.readers.files import format_of
from danube_ray.curate.readers.rows import json_rows, table_rows
from danube_ray.curate.readers.streams import unpacked
from danube_ray.curate.records import Unusable

# Where a row has several of these, the first is its question. A dictionary there is a row again, and of a list (the
# turns of MT-Bench) every text is a question.
QUESTION_FIELDS = ("question", "problem", "prompt", "instruction", "goal", "query", "ctx", "sentence", "premise")
QUESTION_FIELDS += ("stem", "turns", "text", "input", "doc")
FORMATS = ("json", "csv", "tsv", "parquet")
SETTING = "CurationConfig.benchmarks"
MAX_ROW_BYTES = 2**24
BLANK = codecs.BOM_UTF8 + b" \t\r\n"


def question_files(path: Path) -> list[Path]:
    """The file, or the files of a folder by name, that are read: `ConfigError` where there is none.

    They hold rows, as sources do: JSON lines, TSV or CSV (packed or not), Parquet; or a JSON list.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and format_of(file.name)[0] in FORMATS]
    require(bool(files), SETTING, str(path), f"a file of rows ({', '.join(FORMATS)}), or a folder with some")
    return files


def read_questions(path: Path) -> Iterator[str]:
    """The questions of a file, or of a folder's files; rows without one give none.

    `ConfigError` where there is no such file, one has a row that can't be read, or there is no question at all.
    """
    number = 0
    for file in question_files(path):
        try:
            for row in _rows(file):
                for question in _questions(row):
                    number += 1
                    yield question
        except (Unusable, pa.ArrowException, ValueError, RecursionError) as error:
            require(False, SETTING, str(file), "a well-formed file", str(error))
    require(number > 0, SETTING, str(path), f"rows with one of the fields {', '.join(QUESTION_FIELDS)}")


def _rows(file: Path) -> Iterator[Any]:
    kind, packing = format_of(file.name)
    with file.open("rb") as opened:
        if kind == "parquet":
            yield from pq.read_table(opened).to_pylist()
            return
        stream = unpacked(opened, packing)
        if ".json" in PurePath(file.name.lower()).suffixes and stream.peek().lstrip(BLANK).startswith(b"["):
            yield from json.load(io.TextIOWrapper(stream, encoding="utf-8-sig"))
            return
        if kind == "json":
            rows = json_rows(stream, MAX_ROW_BYTES)
        else:
            rows = table_rows(stream, MAX_ROW_BYTES, "\t" if kind == "tsv" else ",")
        for offset, _, value in rows:
            if isinstance(value, Unusable):
                raise Unusable(f"{value.reason} at byte {offset + value.offset}")
            yield value


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
