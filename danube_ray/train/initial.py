"""Beginning from another model's weights: the Hugging Face folder that a run or a fine-tuning starts at."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from danube_ray.artifacts import file_hash
from danube_ray.config import AttentionBackend, ModelConfig, require
from danube_ray.data.tokenizer import MODEL_FILE
from danube_ray.model.huggingface import load_model
from danube_ray.model.transformer import Transformer

# What weights don't depend on: how far attention looks, how RoPE turns, how fresh weights would have been drawn.
FREE = {"context_length", "sliding_window", "rope_theta", "initializer_range"}
SETTING = "RunConfig.init_from"
REMAP = "carry the model over to the shards' tokenizer with `danube remap`"


def weights_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each weights file of a Hugging Face folder, by its name: what tells one model from another."""
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))}


def check_initial(folder: Path, model: ModelConfig, tokenizer_sha256: str) -> None:
    """Raise `ConfigError` unless `folder` holds whole weights of a model of this shape. Reads headers, not weights.

    Window, RoPE base and context length may differ: that is how a model is carried on at another length. Where the
    folder has a tokenizer it must be the one of the shards: embeddings of other pieces would fit, and mean nothing.
    """
    found = load_model(folder, device="meta").config
    for field in dataclasses.fields(ModelConfig):
        if field.name not in FREE:
            has, wanted = getattr(found, field.name), getattr(model, field.name)
            remedy = "begin from a model of the run's shape, or give the run this one's"
            remedy = REMAP if field.name == "vocab_size" else remedy
            require(has == wanted, f"{field.name} of {SETTING}={folder}", has, f"the run's {wanted}", remedy)
    tokenizer = folder / MODEL_FILE
    if tokenizer.is_file() and tokenizer_sha256:
        has = file_hash(tokenizer)
        allowed = f"the one of the token shards, {tokenizer_sha256[:12]}"
        require(has == tokenizer_sha256, f"tokenizer of {SETTING}={folder}", has[:12], allowed, REMAP)


def initial_model(folder: Path, model: ModelConfig, attention: AttentionBackend) -> Transformer:
    """The weights of `folder` in fp32 as a transformer of `model`, whose window, RoPE base and context it takes."""
    with torch.device("meta"):
        built = Transformer(model, attention)
    built.load_state_dict(load_model(folder).state_dict(), assign=True)
    return built
