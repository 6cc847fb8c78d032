"""What every post-training task shares: the base it starts from, its examples, and the folder it ends in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from danube_ray.artifacts import MANIFEST, content_hash, file_hash
from danube_ray.config import FinetuneConfig
from danube_ray.data.conversations import ConversationReader, PairReader
from danube_ray.model.huggingface import load_config, load_model
from danube_ray.posttrain.lora import add_adapters, merge
from danube_ray.train.checkpoint import MODEL
from danube_ray.train.export import export_state
from danube_ray.train.protocol import StepReader


class FinetuneTask:
    """A task of the loop on the Hugging Face folder `config.base`; a kind of post-training adds examples and loss.

    Trains all weights of the base, or adapters where the configuration has them. Sequences are as long as
    `config.max_length` says, or the base's full context.
    """

    name: ClassVar[str]
    examples: ClassVar[type[ConversationReader] | type[PairReader]]

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        context_length = load_config(Path(config.base)).context_length
        self.reader = self.examples(
            Path(config.data),
            Path(config.base),
            batch_size=config.batch_size,
            epochs=config.epochs,
            max_length=min(config.max_length or context_length, context_length),
            seed=config.loop.seed,
        )
        self.data_hash = content_hash([self.reader.hash, weights_hashes(Path(config.base))])

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def micro_batch_size(self, step: int) -> int:
        return self.config.micro_batch_size

    def position(self, steps_done: int) -> dict[str, Any]:
        return {"tokens": self.reader.tokens_at(steps_done), "stage": self.name}

    def validation(self, step: int) -> Mapping[str, StepReader]:
        return {}


def weights_hashes(base: Path) -> dict[str, str]:
    """SHA-256 of each file of a Hugging Face folder that says what the model is."""
    return {path.name: file_hash(path) for path in sorted([base / "config.json", *base.glob("*.safetensors")])}


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
    # The checkpoint's manifest covers its state, and that the hash of the data and the base.
    inputs = {"checkpoint": file_hash(checkpoint / MANIFEST), "lora": config.lora, "dtype": str(dtype)}
    return export_state(state, load_config(base), base, out, inputs, dtype)
