"""Supervised fine-tuning as a task of the loop: the loss of the assistant's tokens, the prompt's masked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from danube_ray.config import FinetuneConfig
from danube_ray.data.conversations import ConversationReader
from danube_ray.model.huggingface import load_config, load_model
from danube_ray.posttrain.lora import add_adapters, merge
from danube_ray.train.checkpoint import MODEL
from danube_ray.train.export import export_state
from danube_ray.train.losses import cross_entropy_sum, trained_labels
from danube_ray.train.protocol import StepReader, TensorBatch


class SftTask:
    """Next-token prediction on conversations, one a row, padded to the longest of the step.

    Trains all weights of the base, or adapters where the configuration has them. Source: H2O-Danube, section 4.1.
    """

    name = "sft"

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.reader = ConversationReader(
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

    def labels(self, batch: TensorBatch) -> torch.Tensor:
        """(B, T) int64; -100 on prompts and padding."""
        return trained_labels(batch["tokens"].long(), batch["trained"].bool())

    def count(self, batch: TensorBatch) -> torch.Tensor:
        return (self.labels(batch) != -100).sum()

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor:
        return cross_entropy_sum(model(batch["tokens"][:, :-1].long()), self.labels(batch))

    def validation(self, step: int) -> Mapping[str, StepReader]:
        return {}


def context_length(config: FinetuneConfig) -> int:
    """Longest conversation in tokens: the setting, or the base's full context."""
    base = load_config(Path(config.base)).context_length
    return min(config.max_length or base, base)


def build_model(config: FinetuneConfig) -> nn.Module:
    """The base in float32, with adapters where the configuration has them."""
    model = load_model(Path(config.base), attention=config.loop.attention)
    return add_adapters(model, config.lora) if config.lora else model


def export(checkpoint: Path, config: FinetuneConfig, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The tuned model as a Hugging Face folder, adapters merged into the base's weights."""
    state = load_file(checkpoint / MODEL)
    model = build_model(config) if config.lora else None
    if isinstance(model, PeftModel):
        state = merge(model, state)
    base = Path(config.base)
    inputs = {"checkpoint": str(checkpoint), "config": config, "dtype": str(dtype)}
    return export_state(state, load_config(base), base, out, inputs, dtype)
