"""Readers hand each rank its rows: together the global batch in order, whatever the number of ranks."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from danube_ray.config import ConfigError, ModelConfig, RunConfig, StageConfig
from danube_ray.data.shards import write_tokens
from danube_ray.data.windows import MixtureReader, ValidationReader

MODEL = ModelConfig(
    vocab_size=50_000,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    context_length=64,
)


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """Two sources whose tokens tell where they come from: web counts from 0, wiki from 20,000."""
    web = {"q0": [range(0, 1_500), range(1_500, 3_000)], "q3": [range(10_000, 11_111)]}
    wiki = {"unscored": [range(20_000, 24_000)]}
    write_tokens(tmp_path, {"web": web, "wiki": wiki}, {"web": [range(30_000, 30_500)]}, MODEL.vocab_size)
    stages = (
        StageConfig(name="a", tokens=2_800, sequence_length=16, micro_batch_size=1, shares={"web": 7, "wiki": 3}),
        StageConfig(name="b", tokens=2_800, sequence_length=64, micro_batch_size=1, shares={"web": 1, "wiki": 1}),
    )
    return RunConfig(name="windows", model=MODEL, stages=stages, global_batch_tokens=448, tokens_dir=str(tmp_path))


FIRST = {("web", "q0"): 0, ("web", "q3"): 10_000, ("wiki", "unscored"): 20_000}


def test_a_row_is_the_plans_window_with_its_label(run: RunConfig) -> None:
    reader = MixtureReader(run)
    for step in range(reader.num_steps):
        batch = reader(step, 0, 1)
        for slot, row in enumerate(batch["tokens"]):
            window = reader.plan.window(step, slot)
            start = FIRST[window.source, window.bucket] + window.start_token
            assert row.tolist() == list(range(start, start + window.length + 1))
        assert batch["weight"].tolist() == [1] * reader.plan.windows_per_step(step)
        assert batch["tokens"].dtype == np.uint16


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 40])
def test_the_ranks_together_hold_the_global_batch_in_order(run: RunConfig, world_size: int) -> None:
    reader = MixtureReader(run)
    for step in range(reader.num_steps):
        whole = reader(step, 0, 1)["tokens"]
        parts = [reader(step, rank, world_size) for rank in range(world_size)]
        assert len({part["tokens"].shape for part in parts}) == 1
        rows = np.concatenate([part["tokens"][part["weight"] == 1] for part in parts])
        assert np.array_equal(rows, whole)
        padding = np.concatenate([part["tokens"][part["weight"] == 0] for part in parts])
        assert not padding.any()


def test_a_pickled_reader_is_small_and_reads_the_same(run: RunConfig) -> None:
    reader = MixtureReader(run)
    before = reader(3, 1, 2)
    data = pickle.dumps(reader)
    assert len(data) < 4_000
    after = pickle.loads(data)(3, 1, 2)
    assert np.array_equal(before["tokens"], after["tokens"])


def test_a_run_that_cannot_be_read_fails_at_once(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens_dir"):
        MixtureReader(replace(run, tokens_dir=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"vocabulary of .* is 50000, allowed is the model's 32000"):
        MixtureReader(replace(run, model=replace(MODEL, vocab_size=32_000)))
    with pytest.raises(ConfigError, match="epochs of source"):
        MixtureReader(replace(run, max_epochs=0.5))


def test_validation_windows_lie_apart_in_held_out_text(run: RunConfig, tmp_path: Path) -> None:
    every = ValidationReader(tmp_path, "web", 16, max_windows=1_000, batch_windows=8)
    assert every.num_steps == 4  # 499 // 16 = 31 windows
    rows = np.concatenate([every(step, 0, 1)["tokens"] for step in range(4)])
    assert rows.tolist() == [list(range(30_000 + 16 * i, 30_000 + 16 * i + 17)) for i in range(31)]
    some = ValidationReader(tmp_path, "web", 16, max_windows=5, batch_windows=8)
    parts = [some(0, rank, 2) for rank in range(2)]
    rows = np.concatenate([part["tokens"][part["weight"] == 1] for part in parts])
    assert [part["weight"].tolist() for part in parts] == [[1, 1, 1], [1, 1, 0]]
    assert [int(row[0]) - 30_000 for row in rows] == [16 * (31 * i // 5) for i in range(5)]


def test_validation_needs_a_known_source_and_one_window_of_text(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation source is 'wiki', allowed is one of web"):
        ValidationReader(tmp_path, "wiki", 16, 4)
    with pytest.raises(ConfigError, match="held-out tokens of source 'web' is 500, allowed is at least 513"):
        ValidationReader(tmp_path, "web", 512, 4)
    with pytest.raises(ConfigError, match="allowed is at least 501"):
        ValidationReader(tmp_path, "web", 500, 4)
    one = ValidationReader(tmp_path, "web", 499, 4)
    assert one(0, 0, 1)["tokens"].tolist() == [list(range(30_000, 30_500))]


def test_a_rank_that_cannot_be_is_refused(run: RunConfig) -> None:
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} of 2"):
            MixtureReader(run)(0, rank, 2)
