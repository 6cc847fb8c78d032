"""The encoder's training in the loop: it learns, batches don't depend on workers, and it goes on where it stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from danube_ray.config import EncoderConfig, LoopConfig, OptimizerConfig
from danube_ray.curate.quality.building import write_base
from danube_ray.curate.quality.encoder import TorchRunner, load_tokenizer
from danube_ray.curate.quality.metrics import auc
from danube_ray.posttrain.quality import EncoderTask, PassageReader, export, write_passages
from danube_ray.train.checkpoint import newest_verified
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from tests.curate.quality.corpus import TINY_ENCODER, text

LABELS = np.arange(48) % 3 > 0  # two good ones for each raw one


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EncoderConfig:
    folder = tmp_path_factory.mktemp("passages")
    generator = np.random.default_rng(0)
    texts = [text(generator, good) for good in LABELS.tolist()]
    write_base(TINY_ENCODER, texts, folder / "base", seed=1)
    tokenizer, _ = load_tokenizer(folder / "base")
    write_passages(folder / "passages.parquet", [one.ids for one in tokenizer.encode_batch_fast(texts)], LABELS)
    return EncoderConfig(
        name="encoder",
        base=str(folder / "base"),
        data=str(folder / "passages.parquet"),
        epochs=5,
        batch_size=8,
        micro_batch_size=4,
        optimizer=OptimizerConfig(learning_rate=3e-3, min_learning_rate=0.0, warmup_steps=3),
        loop=LoopConfig(precision="fp32", deterministic=True, checkpoint_every_steps=10),
    )


def train(config: EncoderConfig, run: Path) -> Path:
    return fit(EncoderTask(config), run, config.loop, config.optimizer, LocalContext()).checkpoint


def log_odds(config: EncoderConfig, checkpoint: Path, folder: Path, texts: list[str]) -> np.ndarray:
    export(checkpoint, Path(config.base), folder)
    tokenizer, _ = load_tokenizer(folder)
    return TorchRunner(folder, "cpu")([one.ids for one in tokenizer.encode_batch_fast(texts)])


def test_it_learns_to_tell_passages_apart_that_it_never_saw(config, tmp_path):
    checkpoint = train(config, tmp_path / "run")
    generator = np.random.default_rng(99)
    texts = [text(generator, good) for good in LABELS.tolist()]
    assert auc(log_odds(config, checkpoint, tmp_path / "out", texts), LABELS) > 0.95
    untrained = TorchRunner(Path(config.base), "cpu")
    tokenizer, _ = load_tokenizer(Path(config.base))
    assert auc(untrained([one.ids for one in tokenizer.encode_batch_fast(texts)]), LABELS) < 0.9


def test_a_stopped_training_goes_on_to_the_same_weights(config, tmp_path):
    whole = train(config, tmp_path / "whole")
    part = tmp_path / "part"
    train(dataclasses.replace(config, epochs=5), part)
    for folder in (part / "checkpoints").iterdir():
        if folder.name != "step-00000010":
            (folder / "manifest.json").unlink()
    found = newest_verified(part / "checkpoints")
    assert found is not None and found.name == "step-00000010"
    again = train(config, part)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_batches_hold_every_passage_once_an_epoch_for_any_number_of_workers(config):
    reader = PassageReader(Path(config.data), batch_size=10, epochs=1, seed=3)
    assert reader.num_steps == 5
    for workers in (1, 2, 3):
        sums = []
        for step in range(reader.num_steps):
            batches = [reader(step, rank, workers) for rank in range(workers)]
            assert len({batch["tokens"].shape for batch in batches}) == 1
            for batch in batches:
                trained = batch["weight"] > 0
                assert (batch["seen"][trained].sum(axis=1) == (batch["tokens"][trained] > 0).sum(axis=1)).all()
                sums += batch["tokens"][trained].astype(np.int64).sum(axis=1).tolist()
        assert len(sums) == len(LABELS)
        if workers == 1:
            alone = sums
        assert sums == alone


def test_both_classes_weigh_the_same(config):
    reader = PassageReader(Path(config.data), batch_size=48, epochs=1, seed=3)
    batch = reader(0, 0, 1)
    good = batch["good"] > 0
    assert good.sum() == 32
    assert batch["weight"][good].sum() == pytest.approx(batch["weight"][~good].sum())
    assert reader.tokens_at(1) == batch["seen"].sum()
    with pytest.raises(IndexError, match="step 1 of 1"):
        reader(1, 0, 1)


def test_other_passages_are_another_training(config, tmp_path):
    before = EncoderTask(config).identity()
    write_passages(tmp_path / "other.parquet", [[2, 5, 3], [2, 6, 3]], np.array([True, False]))
    assert EncoderTask(dataclasses.replace(config, data=str(tmp_path / "other.parquet"))).identity() != before
