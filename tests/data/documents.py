"""A documents folder as curation leaves it, for the tests of tokenization."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.artifacts import commit

COLUMNS = [("id", pa.string()), ("text", pa.string()), ("url", pa.string()), ("quality", pa.float64())]
SCHEMA = pa.schema(COLUMNS)


def document(source: str, number: int) -> dict[str, str | float | None]:
    """A short text that differs by source and number; `web` has a quality, the other sources have none."""
    words = ["".join(chr(97 + number * step * place % 26) for place in (1, 3, 5, 7)) for step in range(number % 40)]
    text = f"{source} {number}: {' '.join(words)}"
    quality = number % 11 / 10 if source == "web" else None
    return {"id": f"{source}-{number}", "text": text, "url": f"https://{source}.org/{number}", "quality": quality}


def write_documents(folder: Path, splits: dict[str, list[int]]) -> Path:
    """`splits[source]` are the sizes of the source's Parquet files; documents are numbered through."""
    counts = {}
    for source, sizes in splits.items():
        (folder / "documents" / source).mkdir(parents=True)
        start, kept_bytes = 0, 0
        for index, size in enumerate(sizes):
            rows = [document(source, number) for number in range(start, start + size)]
            kept_bytes += sum(len(str(row["text"])) for row in rows)
            table = pa.Table.from_pylist(rows, SCHEMA)
            pq.write_table(table, folder / "documents" / source / f"{index:016x}.parquet", row_group_size=64)
            start += size
        counts[source] = {"kept": start, "kept_bytes": kept_bytes}
    commit(folder, counts=counts)
    return folder
