"""Documents of a finished curation by what they are: found in the order of the files, read no further than needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import and_
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds

from danube_ray.report.curated import Curated, Row, Table

FILES_AT_ONCE = 32  # whose small columns are read together, on all cores, to see whether they hold anything


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What rows are looked for; None is anything. `contains` is part of the text, whatever its case."""

    reason: str | None = None
    language: str | None = None
    min_quality: float | None = None
    max_quality: float | None = None
    contains: str | None = None
    duplicate_of: str | None = None
    id_start: str | None = None

    @property
    def on_columns(self) -> ds.Expression:
        """What the small columns say: Parquet's statistics and they rule most row groups out."""
        equal = {name: getattr(self, name) for name in ("reason", "language", "duplicate_of")}
        conditions = [ds.field(name) == value for name, value in equal.items() if value is not None]
        if self.min_quality is not None:
            conditions.append(ds.field("quality") >= self.min_quality)
        if self.max_quality is not None:
            conditions.append(ds.field("quality") <= self.max_quality)
        if self.id_start is not None:
            starts_with = pc.starts_with  # pyright: ignore[reportAttributeAccessIssue]
            conditions.append(starts_with(ds.field("id"), self.id_start))
        return reduce(and_, conditions, ds.scalar(True))

    def on_text(self, column: str) -> ds.Expression:
        if self.contains is None:
            return ds.scalar(True)
        contains = pc.match_substring  # pyright: ignore[reportAttributeAccessIssue]
        return contains(ds.field(column), self.contains, ignore_case=True)


def find(curated: Curated, table: Table, wanted: Wanted, source: str | None, count: int) -> list[Row]:
    """The first `count` rows of a table, of one source or of all, in the order of sources, files and rows."""
    sources = [source] if source else list(curated.counts)
    rows = (row for name in sources for row in _rows(curated.files(table, name), table, wanted, count))
    return list(islice(rows, count))


def find_id(curated: Curated, start: str, source: str | None, count: int) -> list[tuple[Table, Row]]:
    """Kept and dropped documents whose id begins with `start`."""
    wanted = Wanted(id_start=start)
    found: list[tuple[Table, Row]] = [("kept", row) for row in find(curated, "kept", wanted, source, count)]
    found.extend(("dropped", row) for row in find(curated, "dropped", wanted, source, count - len(found)))
    return found


def contamination_of(curated: Curated, id: str) -> list[Row]:
    """The evaluation items that were found in a document."""
    path = curated.folder / "contamination.parquet"
    return ds.dataset(path).to_table(filter=ds.field("id") == id).to_pylist() if path.is_file() else []


def _rows(files: Sequence[Path], table: Table, wanted: Wanted, count: int) -> Iterator[Row]:
    small, text = wanted.on_columns, wanted.on_text("sample" if table == "quarantine" else "text")
    for start in range(0, len(files), FILES_AT_ONCE):
        dataset = ds.dataset([str(file) for file in files[start : start + FILES_AT_ONCE]], format="parquet")
        if not dataset.count_rows(filter=small):
            continue
        groups = [group for fragment in dataset.get_fragments() for group in fragment.split_by_row_group(small)]  # pyright: ignore[reportAttributeAccessIssue]
        holding = [group for group in groups if group.count_rows(filter=small)]
        # Texts are read only where there may be something to show: in order, some row groups ahead, on all cores.
        texts = ds.FileSystemDataset(holding, dataset.schema, ds.ParquetFileFormat())
        for batch in texts.to_batches(filter=small & text, batch_readahead=8, fragment_readahead=4):
            yield from batch.slice(0, count).to_pylist()
