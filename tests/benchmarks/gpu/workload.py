"""What both contestants train on: one GPU's share of a preset's step, on made-up tokens in real shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from danube_ray.config import BOS_ID, EOS_ID, ConfigError, ModelConfig, RunConfig
from danube_ray.data.shards import write_tokens
from danube_ray.data.windows import MixtureReader
from danube_ray.presets import PRESETS
from danube_ray.train.protocol import Batch
from tests.benchmarks.gpu.cases import BF16, Case

SOURCE = "noise"
STEPS = 10_000  # of the run that the steps are taken from: early in its warm-up, as any run begins
STEPS_OF_TEXT = 4  # so many steps' tokens lie on the disk, and come again


class Contestant(Protocol):
    """Something that trains. `train` makes one optimizer step of the rows and tells loss and gradient norm."""

    run: RunConfig

    def train(self, batch: Batch) -> tuple[float | Tensor, float | Tensor]: ...

    def tensors(self) -> list[Tensor]:
        """The live weights and moments, which may be taken off the device between turns."""
        ...

    def facts(self) -> dict[str, Any]:
        """The mode behind the figures, as it really is."""
        ...


def one_gpu_run(case: Case, tokens_dir: Path, micro_batch: int | None, accumulate: int | None) -> RunConfig:
    """The preset's run on one GPU in the case's mode, at the case's sequence length alone.

    A step has as many whole micro-batches as come nearest to what one of the preset's GPUs has, or `accumulate`.
    """
    preset, mode = PRESETS[case.preset](), case.mode or BF16
    lengths = {stage.sequence_length: stage for stage in preset.stages}
    if case.sequence_length not in lengths:
        raise ConfigError(f"sequence length of {case.preset}", case.sequence_length, f"one of {sorted(lengths)}")
    stage = lengths[case.sequence_length]
    micro_batch = micro_batch or stage.micro_batch_size
    micro_batch_tokens = micro_batch * stage.sequence_length
    share_tokens = preset.global_batch_tokens / preset.loop.num_workers
    step_tokens = micro_batch_tokens * (accumulate or max(1, round(share_tokens / micro_batch_tokens)))
    loop = dataclasses.replace(
        preset.loop,
        num_workers=1,
        parallelism="ddp",
        precision=mode.precision,
        fp8_scaling=mode.scaling,
        attention=mode.attention,
        activation_checkpointing=mode.checkpointing,
        compile=not mode.eager,
    )
    stage = dataclasses.replace(
        stage,
        tokens=STEPS * step_tokens,
        micro_batch_size=micro_batch,
        shares={SOURCE: 1},
        min_quality={},
    )
    return dataclasses.replace(
        preset,
        stages=(stage,),
        global_batch_tokens=step_tokens,
        loop=loop,
        max_epochs=float(STEPS),
        tokens_dir=str(tokens_dir),
    )


def with_micro_batch(run: RunConfig, micro_batch: int) -> RunConfig:
    return dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], micro_batch_size=micro_batch),))


def smaller(run: RunConfig) -> list[RunConfig]:
    """The run with each micro-batch, from its own downwards, that divides the same step evenly."""
    stage = run.stages[0]
    windows = run.global_batch_tokens // stage.sequence_length
    return [with_micro_batch(run, size) for size in range(stage.micro_batch_size, 0, -1) if windows % size == 0]


def batches(run: RunConfig, micro_batches: int | None = None) -> Iterator[Batch]:
    """Steps' rows from the shards, over and over; `micro_batches` cuts each to so many."""
    reader = MixtureReader(run)
    rows = micro_batches and micro_batches * run.stages[0].micro_batch_size
    steps = [reader(step, rank=0, world_size=1) for step in range(STEPS_OF_TEXT)]
    return cycle({name: array[:rows] for name, array in step.items()} for step in steps)


def repeated(batch: Batch, rows: int) -> Batch:
    """A batch of so many rows, over and over the same."""
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in batch.items()}


def write_noise(folder: Path, model: ModelConfig, num_tokens: int, document_tokens: int | None) -> Path:
    """Random tokens: one document without an end, or documents of `document_tokens` with their marks.

    Speed depends on where documents end (attention skips what lies before), not on what the tokens say.
    """
    ids = np.random.default_rng(0).integers(EOS_ID + 1, model.vocab_size, num_tokens)
    if document_tokens is not None:
        ids[::document_tokens] = BOS_ID
        ids[document_tokens - 1 :: document_tokens] = EOS_ID
    write_tokens(folder, {SOURCE: {"unscored": [ids]}}, {SOURCE: [ids[: min(num_tokens, 10_000)]]}, model.vocab_size)
    return folder
