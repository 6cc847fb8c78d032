"""A small tokens folder that a model can learn, and runs on it, for the tests of the cluster's side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from danube_ray.config import LoopConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig
from danube_ray.data.shards import write_tokens

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=64,
)
BOS, EOS = 1, 2


def documents(seed: int, stride: int, count: int) -> list[np.ndarray]:
    """Documents that count upward by `stride` from a random start, between `<s>` and `</s>`."""
    rng = np.random.default_rng(seed)
    lengths, starts = rng.integers(5, 60, count), rng.integers(0, 61, count)
    return [
        np.concatenate([[BOS], (start + stride * np.arange(length)) % 61 + 3, [EOS]])
        for length, start in zip(lengths, starts, strict=True)
    ]


def write_text(folder: Path) -> Path:
    """Three sources, each counting by another stride."""
    sources = {"web": 1, "docs": 2, "stdlib": 3}
    write_tokens(
        folder,
        {source: {"unscored": documents(stride, stride, 300)} for source, stride in sources.items()},
        {source: documents(10 + stride, stride, 20) for source, stride in sources.items()},
        vocab_size=64,
    )
    return folder


def small_run(tokens: Path, output: Path, name: str, num_workers: int = 1) -> RunConfig:
    """Two stages of 12 steps, 8 windows of 32 tokens then 4 of 64."""
    return RunConfig(
        name=name,
        model=MODEL,
        stages=(
            StageConfig(
                name="first",
                tokens=12 * 256,
                sequence_length=32,
                micro_batch_size=2,
                shares={"web": 6, "docs": 3, "stdlib": 1},
            ),
            StageConfig(
                name="second",
                tokens=12 * 256,
                sequence_length=64,
                micro_batch_size=1,
                shares={"web": 3, "docs": 3, "stdlib": 4},
            ),
        ),
        global_batch_tokens=256,
        optimizer=OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2),
        loop=LoopConfig(
            num_workers=num_workers,
            precision="fp32",
            deterministic=True,
            log_every_steps=1,
            validate_every_steps=8,
            checkpoint_every_steps=8,
        ),
        validation_windows=4,
        tokens_dir=str(tokens),
        output_dir=str(output),
    )
