"""Direct preference optimisation as a task of the loop (Rafailov et al., 2023)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danube_ray.config import DpoConfig
from danube_ray.data.conversations import PairReader
from danube_ray.posttrain.finetune import FinetuneTask
from danube_ray.train.losses import sequence_log_probability, trained_labels
from danube_ray.train.protocol import TensorBatch


class DpoTask(FinetuneTask):
    """-log sigmoid(beta * (chosen's log-ratio - rejected's)), ratios against the base with its adapters switched off.

    Batches hold pairs (B, 2, T+1), the chosen answer first; a pair is the unit that the loop averages over.
    """

    name = "dpo"
    examples = PairReader

    def __init__(self, config: DpoConfig) -> None:
        super().__init__(config)
        self.beta = config.beta

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "beta": self.beta}

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
        losses = -F.logsigmoid(self.beta * (chosen - rejected))
        return (losses * batch["weight"]).sum()
