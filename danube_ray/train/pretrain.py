"""Pretraining as a task of the loop: next-token prediction on the staged mixture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danube_ray.artifacts import read_manifest
from danube_ray.config import BOS_ID, RunConfig, StageConfig, require, to_dict
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.data.windows import MixtureReader, ValidationReader
from danube_ray.model.transformer import Transformer
from danube_ray.train.initial import check_initial, initial_model, weights_hashes
from danube_ray.train.losses import document_ids
from danube_ray.train.protocol import StepReader, TensorBatch
from danube_ray.train.samples import write_samples


class PretrainTask:
    """Next-token prediction on windows (B, T+1) of packed documents, attention kept within a document.

    A document's first token `<s>` is given, never predicted, so it is not trained; nor are padding rows.

    Raises `ConfigError` before any work for data that can't feed the run, and for `init_from` of another shape.
    """

    name = "pretrain"

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.reader = MixtureReader(run)
        self.tokenizer_sha256: str = read_manifest(Path(run.tokens_dir))["tokenizer_sha256"]
        if run.init_from is not None:
            check_initial(Path(run.init_from), run.model, self.tokenizer_sha256)
        self.tokenizer = self.shards_tokenizer(run.tokenizer) if run.sample_prompts and run.tokenizer else None

    def shards_tokenizer(self, folder: str) -> Tokenizer:
        tokenizer, allowed = Tokenizer.load(folder), f"the tokenizer of the shards in {self.run.tokens_dir}"
        require(tokenizer.sha256 == self.tokenizer_sha256, "RunConfig.tokenizer", folder, allowed)
        return tokenizer

    def identity(self) -> dict[str, Any]:
        """Model, tokenizer, plan, and the weights that the run begins with. Hashes those: seconds a GB."""
        run = self.run
        return {
            "model": to_dict(run.model),
            "tokenizer": self.tokenizer_sha256,
            "plan": {
                "seed": run.loop.seed,
                "global_batch_tokens": run.global_batch_tokens,
                "stages": [self.stage_identity(stage) for stage in run.stages],
            },
            "init_from": run.init_from and weights_hashes(Path(run.init_from)),
            "data": self.reader.plan.hash,
        }

    def stage_identity(self, stage: StageConfig) -> dict[str, Any]:
        """What of a stage decides its tokens and its attention; its name and its micro-batches don't."""
        model = self.run.model_in(stage)
        return {
            "tokens": stage.tokens,
            "sequence_length": stage.sequence_length,
            "shares": stage.shares,
            "min_quality": stage.min_quality,
            "sliding_window": model.sliding_window,
            "rope_theta": model.rope_theta,
        }

    def build_model(self) -> nn.Module:
        model, attention = self.run.model, self.run.loop.attention
        if self.run.init_from is None:
            return Transformer(model, attention=attention)
        return initial_model(Path(self.run.init_from), model, attention)

    def stage_at(self, step: int) -> StageConfig:
        return self.run.stages[self.run.stage_at(step)]

    def enter_step(self, module: nn.Module, step: int) -> None:
        """Give the decoder the window and the RoPE base of the step's stage; it reads them at every forward pass."""
        assert isinstance(module, Transformer)
        module.model.config = self.run.model_in(self.stage_at(step))

    def micro_batch_size(self, step: int) -> int:
        return self.stage_at(step).micro_batch_size

    def learning_rate_scale(self, step: int) -> float:
        return self.stage_at(step).learning_rate_scale

    def flops_per_token(self, step: int) -> float:
        stage = self.stage_at(step)
        return self.run.model_in(stage).flops_per_token(stage.sequence_length)

    def position(self, steps_done: int) -> dict[str, Any]:
        stage = self.stage_at(max(0, steps_done - 1))
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
        return model(tokens, document_ids(tokens, BOS_ID), self.labels(batch))

    def validation(self, step: int) -> Mapping[str, StepReader]:
        length = self.stage_at(step).sequence_length
        folder = Path(self.run.tokens_dir)
        sources = {source for stage in self.run.stages for source in stage.shares}
        return {
            source: ValidationReader(folder, source, length, self.run.validation_windows) for source in sorted(sources)
        }

    def samples(self, module: nn.Module) -> list[dict[str, str]]:
        if self.tokenizer is None:
            return []
        return write_samples(module, self.tokenizer, self.run.sample_prompts, self.run.model.context_length)
