"""A small real task: the project's transformer learns to count in threes, from a random start in every window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from danube_ray.config import LoopConfig, ModelConfig, OptimizerConfig, to_dict
from danube_ray.model.transformer import Transformer
from danube_ray.train.protocol import Batch, StepReader, TensorBatch

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    context_length=32,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2)
SETTINGS = LoopConfig(
    precision="fp32", log_every_steps=1, validate_every_steps=4, checkpoint_every_steps=4, deterministic=True
)


class CountingReader:
    """`windows` rows a step, a function of the step alone; short ranks are padded with rows of weight 0."""

    def __init__(self, num_steps: int, windows: int = 6, length: int = 16) -> None:
        self.num_steps, self.windows, self.length = num_steps, windows, length

    def __call__(self, step: int, rank: int, world_size: int) -> Batch:
        starts = np.random.default_rng(step).integers(0, 62, (self.windows, 1))
        rows = ((starts + 3 * np.arange(self.length + 1)) % 62 + 2).astype(np.uint16)
        each = -(-self.windows // world_size)
        mine = rows[rank * each : (rank + 1) * each]
        padding = np.zeros((each - len(mine), self.length + 1), np.uint16)
        weight = np.array([1] * len(mine) + [0] * len(padding), np.uint8)
        return {"tokens": np.concatenate([mine, padding]), "weight": weight}


class CountingTask:
    name = "counting"

    def __init__(self, num_steps: int = 10, micro_batch_size: int = 2) -> None:
        self.reader: StepReader = CountingReader(num_steps)
        self.rows = micro_batch_size
        self.stride = 3

    def identity(self) -> dict[str, Any]:
        return {"model": to_dict(MODEL), "plan": {"stride": self.stride}}

    def build_model(self) -> nn.Module:
        return Transformer(MODEL)

    def enter_step(self, module: nn.Module, step: int) -> None:
        """Every step is the same."""

    def micro_batch_size(self, step: int) -> int:
        return self.rows

    def learning_rate_scale(self, step: int) -> float:
        return 1.0

    def flops_per_token(self, step: int) -> float:
        return MODEL.flops_per_token(16)

    def position(self, steps_done: int) -> dict[str, Any]:
        return {"tokens": steps_done * 6 * 16, "stage": "only"}

    def labels(self, batch: TensorBatch) -> torch.Tensor:
        return batch["tokens"][:, 1:].long().masked_fill((batch["weight"] == 0)[:, None], -100)

    def count(self, batch: TensorBatch) -> torch.Tensor:
        return (self.labels(batch) != -100).sum()

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor:
        return model(batch["tokens"][:, :-1].long(), labels=self.labels(batch))

    def validation(self, step: int) -> Mapping[str, StepReader]:
        return {"counting": CountingReader(2)}

    def samples(self, module: nn.Module) -> list[dict[str, str]]:
        return []
