"""Supervised fine-tuning as a task of the loop: the loss of the assistant's tokens, the prompt's masked."""

from __future__ import annotations

import torch
from torch import nn

from danube_ray.data.conversations import ConversationReader
from danube_ray.posttrain.finetune import FinetuneTask
from danube_ray.train.losses import trained_labels
from danube_ray.train.protocol import TensorBatch


class SftTask(FinetuneTask):
    """Next-token prediction on conversations (B, T+1), padded to the longest of the step (H2O-Danube, section 4.1)."""

    name = "sft"
    examples = ConversationReader

    def labels(self, batch: TensorBatch) -> torch.Tensor:
        """(B, T) int64; -100 on prompts and padding."""
        return trained_labels(batch["tokens"].long(), batch["trained"].bool())

    def count(self, batch: TensorBatch) -> torch.Tensor:
        return (self.labels(batch) != -100).sum()

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor:
        return model(batch["tokens"][:, :-1].long(), labels=self.labels(batch))
