"""The run that CPU benchmarks train: the nano model on synthetic tokens, long enough to time and no longer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from danube_ray.config import RunConfig
from danube_ray.data.shards import write_tokens
from danube_ray.presets import PRESETS


def write_noise(folder: Path, tokens_per_source: int = 500_000) -> Path:
    """Three sources of random documents of 200 tokens: speed does not depend on what the tokens say."""
    rng = np.random.default_rng(0)

    def documents(tokens: int) -> list[np.ndarray]:
        return [np.concatenate([[1], rng.integers(3, 2048, 198), [2]]) for _ in range(tokens // 200)]

    sources = ("web", "docs", "stdlib")
    write_tokens(
        folder,
        {source: {"unscored": documents(tokens_per_source)} for source in sources},
        {source: documents(20_000) for source in sources},
        vocab_size=2048,
    )
    return folder


def nano_run(tokens: Path, output: Path, name: str, num_steps: int, cpus: int) -> RunConfig:
    """The nano preset cut to its middle stage and `num_steps` steps, logging each, saving and validating at the end."""
    run = PRESETS["nano"]()
    stage = dataclasses.replace(run.stages[1], tokens=num_steps * run.global_batch_tokens)
    loop = dataclasses.replace(
        run.loop,
        cpus_per_worker=cpus,
        log_every_steps=1,
        validate_every_steps=10 * num_steps,
        checkpoint_every_steps=10 * num_steps,
    )
    return dataclasses.replace(
        run, name=name, stages=(stage,), loop=loop, max_epochs=100.0, tokens_dir=str(tokens), output_dir=str(output)
    )
