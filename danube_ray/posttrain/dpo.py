"""Direct preference optimisation as a task of the loop (Rafailov et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danube_ray.config import DpoConfig
from danube_ray.data.conversations import PairReader
from danube_ray.posttrain.sft import build_model, context_length
from danube_ray.train.losses import sequence_log_probability, trained_labels
from danube_ray.train.protocol import StepReader, TensorBatch


class DpoTask:
    """-log sigmoid(beta * (chosen's log-ratio - rejected's)), ratios against the base with its adapters switched off.

    Batches hold pairs (B, 2, T+1), the chosen answer first; a pair is the unit that the loop averages over.
    """

    name = "dpo"

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        self.reader = PairReader(
            Path(config.data),
            Path(config.base),
            batch_size=config.batch_size,
            epochs=config.epochs,
            max_length=context_length(config),
            seed=config.loop.seed,
        )
        self.data_hash = self.reader.hash

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def micro_batch_size(self, step: int) -> int:
        return self.config.micro_batch_size

    def position(self, steps_done: int) -> dict[str, Any]:
        return {"tokens": self.reader.tokens_at(steps_done), "stage": self.name}

    def count(self, batch: TensorBatch) -> torch.Tensor:
        return batch["weight"].sum()

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor:
        tokens = batch["tokens"].long().flatten(0, 1)  # (2B, T+1)
        labels = trained_labels(tokens, batch["trained"].bool().flatten(0, 1))
        policy = sequence_log_probability(model(tokens[:, :-1]), labels)
        adapters = model.module if isinstance(model, DistributedDataParallel) else model
        assert isinstance(adapters, PeftModel)
        with torch.no_grad(), adapters.disable_adapter():
            reference = sequence_log_probability(adapters(tokens[:, :-1]), labels)
        chosen, rejected = (policy - reference).unflatten(0, (-1, 2)).unbind(dim=1)  # (B,) each
        losses = -F.logsigmoid(self.config.beta * (chosen - rejected))
        return (losses * batch["weight"]).sum()

    def validation(self, step: int) -> Mapping[str, StepReader]:
        return {}
