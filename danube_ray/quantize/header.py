"""What a GGUF file says before its weights: the model's shape, its RoPE, its tokenizer, and how it was quantized.

Keys and values are those of llama.cpp's own converter for the architecture `llama`, which serves Mistral's models too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFWriter, RopeScalingType

from danube_ray.artifacts import read_json
from danube_ray.config import ModelConfig, require
from danube_ray.quantize.imatrix import ImportanceMatrix
from danube_ray.quantize.levels import Level, file_type
from danube_ray.quantize.vocabulary import write_vocabulary

# What each kind of scaled RoPE says. llama.cpp computes no other kind that a Llama's config.json can ask for, and has
# the rest of their settings fixed, at transformers' defaults.
ROPE_SETTINGS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
ROPE_FIXED = {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def rope_settings(model_folder: Path) -> dict[str, Any]:
    """RoPE's scaling by config.json, `rope_type` first; `ConfigError` for one that llama.cpp does not compute."""
    path = model_folder / "config.json"
    values = read_json(path)
    found = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = found.get("rope_type") or found.get("type") or "default"
    require(kind in ROPE_SETTINGS, f"rope_type in {path}", kind, ", ".join(ROPE_SETTINGS), "llama.cpp knows no other")
    ignored = ("rope_type", "type", "rope_theta")
    settings = {key: value for key, value in found.items() if key not in ignored and value is not None}
    settings = {key: value for key, value in settings.items() if value != ROPE_FIXED.get(key)}
    unknown = settings.keys() - ROPE_SETTINGS[kind]
    allowed = f"of {kind}: {', '.join(sorted(ROPE_SETTINGS[kind])) or 'nothing'}"
    require(not unknown, f"RoPE of {path}", sorted(unknown), allowed, "llama.cpp has the rest fixed")
    if kind == "yarn":
        original = values.get("original_max_position_embeddings") or values.get("max_position_embeddings")
        settings = {"original_max_position_embeddings": original, **settings}
    missing = ROPE_SETTINGS[kind] - settings.keys()
    require(not missing, f"RoPE of {path}", "not set", f"{', '.join(sorted(missing))} for {kind}")
    return {"rope_type": kind, **settings}


def llama3_factors(config: ModelConfig, rope: dict[str, Any]) -> np.ndarray:
    """What Llama 3.1 divides each of RoPE's frequencies by, (head_dim / 2,) float32, as `rope_freqs.weight`.

    Waves longer than the original context over `low_freq_factor` turn `factor` times slower, those shorter than it
    over `high_freq_factor` as before, and those between by a mix of both.
    """
    pair = np.arange(0, config.head_dim, 2, dtype=np.float32)
    wave = 2 * math.pi * config.rope_theta ** (pair / config.head_dim)  # tokens a turn
    original, low, high = (rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"])
    share = np.clip((original / wave - low) / (high - low), 0, 1)  # of the unscaled frequency
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def write_header(
    writer: GGUFWriter, model_folder: Path, config: ModelConfig, level: Level, importance: ImportanceMatrix | None
) -> None:
    """Everything but tensors. The context length is capped at the sliding window, which llama.cpp ignores here.

    Keys stand in the order in which llama.cpp's quantizer leaves them: those that it sets come last.
    """
    writer.add_name(model_folder.resolve().name)
    writer.add_context_length(config.usable_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    _write_rope(writer, rope_settings(model_folder))
    write_vocabulary(writer, model_folder, config.vocab_size)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(file_type(level))
    if importance:
        importance.describe(writer)


def _write_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    if rope["rope_type"] not in ("linear", "yarn"):
        return  # Llama 3.1's is a tensor
    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
