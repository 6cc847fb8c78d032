"""What every post-training task shares: the base it starts from, its examples, and the folder it ends in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from danube_ray.artifacts import MANIFEST, complete_once, content_hash, file_hash
from danube_ray.config import ConfigError, FinetuneConfig, to_dict
from danube_ray.data.chat import CHAT_TEMPLATE
from danube_ray.data.conversations import ConversationReader, PairReader
from danube_ray.model.huggingface import load_config, load_model
from danube_ray.posttrain.lora import add_adapters, load_adapters, merge, save_adapters
from danube_ray.train.checkpoint import MODEL
from danube_ray.train.export import export_state
from danube_ray.train.initial import weights_hashes
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
        self.model = load_config(Path(config.base))
        self.reader = self.examples(
            Path(config.data),
            Path(config.base),
            batch_size=config.batch_size,
            epochs=config.epochs,
            max_length=min(config.max_length or self.model.context_length, self.model.context_length),
            seed=config.loop.seed,
        )

    def identity(self) -> dict[str, Any]:
        """The base, its adapters, and the examples in their order. Hashes the base's weights: seconds a GB."""
        config = self.config
        return {
            "model": to_dict(self.model),
            "base": weights_hashes(Path(config.base)),
            "lora": config.lora and to_dict(config.lora),
            "template": content_hash(CHAT_TEMPLATE),
            "plan": {
                "seed": config.loop.seed,
                "batch_size": config.batch_size,
                "epochs": config.epochs,
                "max_length": self.reader.max_length,
            },
            "data": self.reader.hash,
        }

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def enter_step(self, module: nn.Module, step: int) -> None:
        """Every step has the base's window and RoPE base."""

    def micro_batch_size(self, step: int) -> int:
        return self.config.micro_batch_size

    def learning_rate_scale(self, step: int) -> float:
        return 1.0

    def flops_per_token(self, step: int) -> float:
        return 0.0  # unknown: conversations differ in length, and adapters save part of the backward pass

    def position(self, steps_done: int) -> dict[str, Any]:
        return {"tokens": self.reader.tokens_at(steps_done), "stage": self.name}

    def validation(self, step: int) -> Mapping[str, StepReader]:
        return {}

    def samples(self, module: nn.Module) -> list[dict[str, str]]:
        return []


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


def export_adapter(checkpoint: Path, config: FinetuneConfig, out: Path) -> Path:
    """The trained adapters alone, in float32, as a folder of PEFT for the base, which `danube serve --adapters` takes.

    Written once for the same checkpoint and place of the base. `ConfigError` for a run that trained all weights.
    """
    lora, base = config.lora, Path(config.base).resolve()
    if lora is None:
        raise ConfigError("FinetuneConfig.lora", None, "a LoraConfig", "a run without adapters leaves a model only")

    def write(folder: Path) -> None:
        bare = add_adapters(load_model(base, device="meta"), lora)  # names and shapes: the base's weights stay on disk
        save_adapters(load_adapters(bare, load_file(checkpoint / MODEL)), base, folder)

    complete_once(out, {"checkpoint": file_hash(checkpoint / MANIFEST), "lora": lora, "base": str(base)}, write)
    return out
