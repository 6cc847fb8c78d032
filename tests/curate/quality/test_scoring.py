"""Scoring a judged split again: only what is in the band, in its rows, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danube_ray.curate.quality import Encoder, QualityModel
from danube_ray.curate.quality.calibration import Band, Platt
from danube_ray.curate.quality.scoring import score_split
from danube_ray.curate.records import Part, Split
from danube_ray.curate.splits import judged_path, read_qualities
from danube_ray.curate.tables import DOCUMENTS

SPLIT = Split("web", "/nowhere", (Part("a.jsonl", 1, "1"),))
QUALITIES = [0.1, 0.5, 0.9, 0.45, None, 0.55, 0.99]


class Lengths(Encoder):
    """An encoder whose probability is a text's length over 100; it remembers what it was asked."""

    def score(self, texts: Sequence[str]) -> np.ndarray:
        ASKED.extend(texts)
        return np.array([len(text) / 100 for text in texts])


ASKED: list[str] = []
ENCODER = Lengths(tokenizer=None, runner=None, max_tokens=8)  # type: ignore[arg-type]
MODEL = QualityModel(None, None, Platt(1, 0), Band(0.4, 0.6), 0.5)  # type: ignore[arg-type]


@pytest.fixture
def work(tmp_path) -> Path:
    rows = [{"text": "x" * (10 + number), "quality": quality} for number, quality in enumerate(QUALITIES)]
    path = judged_path(tmp_path, SPLIT, "documents")
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, DOCUMENTS), path, row_group_size=3)
    ASKED.clear()
    return tmp_path


def test_only_the_band_is_scored_and_takes_the_place_of_the_first_score(work):
    assert score_split(SPLIT, work, MODEL, ENCODER) == {"scored": 3}
    assert [len(text) for text in ASKED] == [11, 13, 15]
    found = read_qualities(SPLIT, work)
    np.testing.assert_array_equal(found, [0.1, 0.11, 0.9, 0.13, np.nan, 0.15, 0.99])


def test_a_scored_split_is_not_scored_again_and_a_torn_one_gets_the_same_bytes(work):
    score_split(SPLIT, work, MODEL, ENCODER)
    [path] = (work / "scored").rglob("*.parquet")
    whole = path.read_bytes()
    ASKED.clear()
    assert score_split(SPLIT, work, MODEL, ENCODER) == {"scored": 3}
    assert ASKED == []
    path.write_bytes(whole[:-5])
    assert score_split(SPLIT, work, MODEL, ENCODER) == {"scored": 3}
    assert path.read_bytes() == whole


def test_a_split_without_open_documents_leaves_no_table(work):
    sure = dataclasses.replace(MODEL, band=Band(1.0, 0.0))
    assert score_split(SPLIT, work, sure, ENCODER) == {"scored": 0}
    assert not list(work.rglob("scored/**/*.parquet"))
    empty = Split("web", "/nowhere", (Part("b.jsonl", 1, "1"),))  # judged, and no document was kept
    assert score_split(empty, work, MODEL, ENCODER) == {"scored": 0}
