"""Folders of any size with random weights, written shard by shard: a real size in little memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from danube_ray.artifacts import write_json
from danube_ray.config import ModelConfig
from danube_ray.model.huggingface import INDEX, hf_config
from danube_ray.model.transformer import Transformer
from tests.models import tiny_tokenizer


def write_random_model(folder: Path, config: ModelConfig) -> Path:
    """A bfloat16 folder of `config`, one shard a layer, with a tokenizer of 512 pieces."""
    tiny_tokenizer(folder)
    write_json(folder / "config.json", hf_config(config, torch.bfloat16))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if name.startswith("model.layers.") else name.split(".")[-2]
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        weights = {name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16() for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
    write_json(folder / INDEX, {"weight_map": {name: file for file, names in shards.items() for name in names}})
    return folder
