"""Quality models trained end to end on Ray, and judged documents scored on actors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danube_ray.artifacts import damage, read_json
from danube_ray.config import ConfigError
from danube_ray.curate.quality import Encoder, QualityModel
from danube_ray.curate.records import Part, Split
from danube_ray.curate.splits import judged_path, read_qualities
from danube_ray.curate.tables import DOCUMENTS
from danube_ray.runtime import quality
from danube_ray.runtime.quality import score_splits, train
from tests.curate.quality.corpus import TINY, TINY_ENCODER, text, write_source

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = dataclasses.replace(
    TINY, languages=(), encoder=TINY_ENCODER, encoder_share=0.3, always_ask_encoder=True, split_bytes=1
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[dict[str, Path], dict[str, Path]]:
    folder = tmp_path_factory.mktemp("sources")
    good = {
        name: write_source(folder / f"{name}.jsonl", seed, True, 60, [name])
        for seed, name in enumerate(("books", "wiki"))
    }
    return good, {"web": write_source(folder / "web.jsonl", 7, False, 80, ["web"])}


@pytest.fixture(scope="module")
def trained(ray_session, sources, tmp_path_factory) -> Path:
    return train(*sources, tmp_path_factory.mktemp("trained") / "quality", SETTINGS)


def test_training_leaves_models_and_a_card(trained, sources):
    assert damage(trained) is None
    assert [path.name for path in trained.parent.iterdir()] == ["quality"]  # no work is left behind
    facts = read_json(trained / "card.json")
    assert facts["models"]["gbm"]["auc"] > 0.95
    assert facts["models"]["encoder"]["auc"] > 0.9
    assert facts["models"]["cascade"]["auc"] > 0.95
    assert 0 <= facts["max_logit_difference"] < 1
    assert facts["data"]["web"]["read"] == 80
    assert {row["good"][0] for row in facts["control"]["shuffled"]} <= {"books", "wiki"}
    model, encoder = QualityModel.load(trained), Encoder.load(trained)
    assert model.has_encoder
    generator = np.random.default_rng(5)
    good, raw = encoder.score([text(generator, True), text(generator, False)])
    assert good > raw


def test_a_finished_training_is_left_as_it_is(trained, sources, monkeypatch):
    monkeypatch.setattr(quality, "run_splits", None)
    before = (trained / "manifest.json").stat().st_mtime_ns
    assert train(*sources, trained, SETTINGS) == trained
    assert (trained / "manifest.json").stat().st_mtime_ns == before


def test_what_the_trees_leave_open_is_scored_on_actors_once_and_to_the_same_bytes(trained, tmp_path):
    model, encoder = QualityModel.load(trained), Encoder.load(trained)
    generator, splits, texts = np.random.default_rng(8), [], []
    inside = (model.band.low + model.band.high) / 2
    for number in range(3):
        split = Split("web", "/nowhere", (Part(f"{number}.jsonl", 1, "1"),))
        rows = [{"text": text(generator, row % 2 == 0), "quality": inside if row else 1.0} for row in range(4)]
        path = judged_path(tmp_path, split, "documents")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, DOCUMENTS), path)
        splits.append(split)
        texts.append([row["text"] for row in rows])
    progress = []
    assert score_splits(splits, tmp_path, trained, on_progress=lambda *done: progress.append(done)) == 9
    assert progress[-1] == (3, 3)
    for split, of_split in zip(splits, texts, strict=True):
        assert read_qualities(split, tmp_path).tolist() == [1.0, *encoder.score(of_split[1:]).tolist()]
    tables = {path: path.read_bytes() for path in (tmp_path / "scored").rglob("*.parquet")}
    assert len(tables) == 3
    torn = next(iter(tables))
    torn.unlink()
    assert score_splits(splits, tmp_path, trained) == 9
    assert {path: path.read_bytes() for path in tables} == tables


def test_mistakes_are_said_before_any_work(sources, tmp_path):
    good, raw = sources
    with pytest.raises(ConfigError, match="--raw"):
        train(good, {}, tmp_path / "out", SETTINGS)
    with pytest.raises(ConfigError, match="names that no good source has"):
        train(good, {"wiki": raw["web"]}, tmp_path / "out", SETTINGS)
    with pytest.raises(ConfigError, match="existing file or folder"):
        train(good, {"web": tmp_path / "nothing"}, tmp_path / "out", SETTINGS)
    assert list(tmp_path.iterdir()) == []
