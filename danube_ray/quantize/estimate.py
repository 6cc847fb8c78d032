"""Sizes of a model's files, and memory to run them, from its shape alone: no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from danube_ray.artifacts import read_json
from danube_ray.config import ModelConfig, require
from danube_ray.presets import PRESETS
from danube_ray.quantize.levels import LEVELS, Level, size_bytes, tensor_shapes, tensor_types

HEADER_BYTES_PER_PIECE = 23  # of a sentencepiece vocabulary: length, text, score and type
KV_BYTES = 2  # a key or value in llama.cpp's default f16 cache


@dataclass(frozen=True)
class LevelSize:
    """A level's file, and the memory that weights and a full key-value cache take; llama.cpp adds some for its work."""

    level: Level
    bytes: int
    bits_per_weight: float
    num_fallbacks: int
    cache_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.bytes + self.cache_bytes


def model_of(preset_or_folder: str) -> tuple[ModelConfig, bool]:
    """The shape that a preset's name or a Hugging Face folder stands for, and whether its embeddings are tied."""
    if preset_or_folder in PRESETS:
        return PRESETS[preset_or_folder]().model, False
    from danube_ray.model.huggingface import load_config  # torch, seconds: presets do without

    folder = Path(preset_or_folder)
    allowed = f"a folder with config.json, or one of {', '.join(PRESETS)}"
    require((folder / "config.json").is_file(), "model", preset_or_folder, allowed)
    return load_config(folder, any_rope=True), bool(read_json(folder / "config.json").get("tie_word_embeddings"))


def estimate(
    config: ModelConfig,
    levels: Sequence[Level] = LEVELS,
    *,
    tied_embeddings: bool = False,
    context: int | None = None,
    with_importance: bool = False,
) -> list[LevelSize]:
    """Each level's size; the cache is for `context` tokens (None: the longest usable), whatever the level."""
    context = context or config.usable_context
    cache_bytes = 2 * KV_BYTES * config.num_layers * config.num_kv_heads * config.head_dim * context
    num_weights = {name: prod(size) for name, size in tensor_shapes(config, tied_embeddings).items()}
    sizes = []
    for level in levels:
        types = tensor_types(level, config, tied_embeddings, with_importance)
        num_bytes = sum(size_bytes(kind, num_weights[name]) for name, (kind, _) in types.items())
        sizes.append(
            LevelSize(
                level=level,
                bytes=num_bytes + HEADER_BYTES_PER_PIECE * config.vocab_size,
                bits_per_weight=8 * num_bytes / sum(num_weights.values()),
                num_fallbacks=sum(fell_back for _, fell_back in types.values()),
                cache_bytes=cache_bytes,
            )
        )
    return sizes
