"""Pretraining as a task of the loop: next-token prediction on the staged mixture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danube_ray.config import BOS_ID, RunConfig
from danube_ray.data.windows import MixtureReader, ValidationReader
from danube_ray.model.transformer import Transformer
from danube_ray.train.losses import cross_entropy_sum, document_ids
from danube_ray.train.protocol import StepReader, TensorBatch


class PretrainTask:
    """Next-token prediction on windows (B, T+1) of packed documents, attention kept within a document.

    A document's first token `<s>` is given, never predicted, so it is not trained; nor are padding rows.
    """

    name = "pretrain"

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.reader = MixtureReader(run)
        self.data_hash = self.reader.plan.hash

    def build_model(self) -> nn.Module:
        return Transformer(self.run.model, attention=self.run.loop.attention)

    def micro_batch_size(self, step: int) -> int:
        return self.run.stages[self.run.stage_at(step)].micro_batch_size

    def position(self, steps_done: int) -> dict[str, Any]:
        stage = self.run.stages[self.run.stage_at(max(0, steps_done - 1))]
        tokens = steps_done * self.run.global_batch_tokens
        return {"tokens": tokens, "stage": stage.name, "sequence_length": stage.sequence_length}

    def labels(self, batch: TensorBatch) -> torch.Tensor:
        """(B, T) int64; -100 where nothing is trained."""
        labels = batch["tokens"][:, 1:].long()
        return labels.masked_fill((labels == BOS_ID) | (batch["weight"] == 0)[:, None], -100)

    def count(self, batch: TensorBatch) -> torch.Tensor:
        return (self.labels(batch) != -100).sum()

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor:
        tokens = batch["tokens"][:, :-1].long()
        logits = model(tokens, document_ids(tokens, BOS_ID))
        return cross_entropy_sum(logits, self.labels(batch))

    def validation(self, step: int) -> Mapping[str, StepReader]:
        length = self.run.stages[self.run.stage_at(step)].sequence_length
        folder = Path(self.run.tokens_dir)
        sources = {source for stage in self.run.stages for source in stage.shares}
        return {
            source: ValidationReader(folder, source, length, self.run.validation_windows) for source in sorted(sources)
        }
