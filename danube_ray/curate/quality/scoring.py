"""The encoder over one judged split: what the trees were unsure of is scored again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from danube_ray.curate.quality.encoder import Encoder
from danube_ray.curate.quality.model import QualityModel
from danube_ray.curate.records import Split
from danube_ray.curate.splits import commit_files, decided_path, judged_path, verified
from danube_ray.curate.tables import SCORED, TableWriter


def score_split(split: Split, work: Path, model: QualityModel, encoder: Encoder) -> dict[str, int]:
    """Score the documents of a judged split whose quality lies in the model's band; how many were `scored`.

    Writes `work/scored/SOURCE/SPLIT.parquet` (row, quality), and its record last; does nothing where that is done.
    """
    if (counts := verified(work, "scored", split)) is not None:
        return counts
    judged, path = judged_path(work, split, "documents"), decided_path(work, split, "scored")
    with TableWriter(path, SCORED) as table:
        first = 0
        for quality, texts in _row_groups(judged):
            rows = np.flatnonzero(model.uncertain(quality))
            scores = encoder.score([texts[row] for row in rows])
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
                table.add({"row": first + row, "quality": score})
            first += len(quality)
    return commit_files(work, "scored", split, [path], {"scored": table.num_rows})


def _row_groups(path: Path) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Qualities (n,) float64, NaN for none, and texts of each row group; nothing where no document was kept."""
    if path.is_file():
        with pq.ParquetFile(path) as parquet:
            for number in range(parquet.num_row_groups):
                table = parquet.read_row_group(number, columns=["text", "quality"])
                yield table["quality"].to_numpy().astype(np.float64), table["text"].to_pylist()
