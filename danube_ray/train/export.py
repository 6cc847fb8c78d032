"""A checkpoint as a Hugging Face folder: model, tokenizer and chat template, opened unchanged by other tools."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from danube_ray.artifacts import MANIFEST, complete_once, file_hash
from danube_ray.config import ModelConfig
from danube_ray.model.huggingface import export_model
from danube_ray.train.checkpoint import MODEL

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_model(
    state: dict[str, torch.Tensor], model: ModelConfig, tokenizer: Path, folder: Path, dtype: torch.dtype
) -> None:
    """Write weights, configuration and the tokenizer's files to `folder`."""
    export_model(state, model, folder, dtype)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)


def export_state(
    state: dict[str, torch.Tensor], model: ModelConfig, tokenizer: Path, out: Path, inputs: Any, dtype: torch.dtype
) -> Path:
    """Write a model folder to `out`, once for the same `inputs`."""
    complete_once(out, inputs, lambda folder: write_model(state, model, tokenizer, folder, dtype))
    return out


def export_checkpoint(
    checkpoint: Path, model: ModelConfig, tokenizer: Path, out: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Export a pretraining checkpoint with the tokenizer that its shards were made with."""
    inputs = {"checkpoint": file_hash(checkpoint / MANIFEST), "model": model, "dtype": str(dtype)}
    return export_state(load_file(checkpoint / MODEL), model, tokenizer, out, inputs, dtype)
