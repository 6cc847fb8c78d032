"""A model small enough to serve in a test, and long-winded: it never draws the end, so only limits end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danube_ray.artifacts import read_json, write_json
from danube_ray.config import ServedModel
from danube_ray.quantize.gguf import convert
from tests.models import tiny_model

CONTEXT_TOKENS = 65_536  # minutes of answer: a slot that is not given back is a test that does not end


def tiny_served_model(folder: Path, seed: int = 0, **shape: Any) -> ServedModel:
    """A GGUF file with its tokenizer, in `folder`; `shape` is `tiny_model`'s."""
    from safetensors.torch import load_file, save_file

    tiny_model(folder, seed=seed, **shape)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "max_position_embeddings": CONTEXT_TOKENS})
    weights = load_file(folder / "model.safetensors")
    # The first hidden value is the same at every token and layer; </s> has it against itself, and so is never drawn.
    weights["model.embed_tokens.weight"][:, 0] = 0.3
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name][0] = 0
    weights["lm_head.weight"][2] = 0
    weights["lm_head.weight"][2, 0] = -1000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, folder / "model.gguf", "F16")
    return ServedModel(weights=folder / "model.gguf", tokenizer_folder=folder, num_slots=2, num_threads=1)
