"""Quantization levels and which tensor gets which type: llama.cpp's mixing rule for dense Llama models.

A level such as Q4_K_M is a mix: most matrices at its base type, the sensitive ones (output, values, down projection)
at a wider one. The rule is llama.cpp's (`src/llama-quant.cpp`), so that a file made here is the file its own quantizer
makes. K types pack 256 weights of a row; rows that 256 does not divide fall back to a wider type of block 32, and those
that 32 does not divide to F16. Nothing here needs weights: what a file will hold follows from the model's shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from danube_ray.config import ModelConfig, require

Level = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"]
LEVELS: tuple[Level, ...] = get_args(Level)
DEFAULT_LEVELS: tuple[Level, ...] = ("F16", "Q8_0", "Q4_K_M")

PLAIN_TYPES = (Type.F32, Type.F16, Type.BF16)
BASE_TYPE: dict[Level, Type] = {level: Type[level.removesuffix("_M")] for level in LEVELS}
FALLBACK: dict[Type, Type] = {
    Type.Q6_K: Type.Q8_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q4_K: Type.Q5_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q2_K: Type.Q4_0,
}


@dataclass(frozen=True)
class Shape:
    """What the mixing rule asks of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    tied_embeddings: bool
    with_importance: bool = False  # whether an importance matrix is used

    @staticmethod
    def of(config: ModelConfig, tied_embeddings: bool = False, with_importance: bool = False) -> Shape:
        return Shape(config.num_layers, config.num_heads, config.num_kv_heads, tied_embeddings, with_importance)


def check_level(level: str) -> Level:
    """`level` itself, or `ConfigError`."""
    require(level in LEVELS, "level", level, ", ".join(LEVELS))
    return level  # type: ignore[return-value]


def file_type(level: Level) -> LlamaFileType:
    """GGUF's `general.file_type` of a level."""
    return LlamaFileType.ALL_F32 if level == "F32" else LlamaFileType[f"MOSTLY_{level}"]


def tensor_shapes(config: ModelConfig, tied_embeddings: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model by GGUF's name, (rows, columns) or (columns,), in the order of llama.cpp's files.

    A model with tied embeddings has no `output.weight`: llama.cpp takes `token_embd.weight` there.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embedding = (config.vocab_size, hidden)
    head = {} if tied_embeddings else {"output.weight": embedding}
    layer = {
        "attn_k": (kv, hidden),
        "attn_norm": (hidden,),
        "attn_output": (hidden, query),
        "attn_q": (query, hidden),
        "attn_v": (kv, hidden),
        "ffn_down": (hidden, ffn),
        "ffn_gate": (ffn, hidden),
        "ffn_norm": (hidden,),
        "ffn_up": (ffn, hidden),
    }
    layers = {f"blk.{i}.{part}.weight": size for i in range(config.num_layers) for part, size in layer.items()}
    return {**head, "output_norm.weight": (hidden,), "token_embd.weight": embedding, **layers}


def tensor_types(
    level: Level, config: ModelConfig, tied_embeddings: bool = False, with_importance: bool = False
) -> dict[str, tuple[Type, bool]]:
    """The type of every tensor of `tensor_shapes` at a level, and whether it is a fallback; norms stay F32."""
    shape = Shape.of(config, tied_embeddings, with_importance)
    return {
        name: (Type.F32, False) if len(size) == 1 else tensor_type(level, name, size[-1], shape)
        for name, size in tensor_shapes(config, tied_embeddings).items()
    }


def tensor_type(level: Level, name: str, columns: int, shape: Shape) -> tuple[Type, bool]:
    """Type of the matrix `name` (GGUF's name) with rows of `columns` weights, and whether it is a fallback."""
    wanted = mixed_type(level, name, shape)
    chosen = wanted
    if columns % block_size(chosen):
        chosen = FALLBACK.get(chosen, Type.F16)
    if columns % block_size(chosen):
        chosen = Type.F16
    return chosen, chosen != wanted


def mixed_type(level: Level, name: str, shape: Shape) -> Type:
    """Type that the mixing rule wants for a matrix, whatever the length of its rows."""
    base = BASE_TYPE[level]
    if base in PLAIN_TYPES or base == Type.Q8_0:
        return base
    if name == "output.weight" or (shape.tied_embeddings and name == "token_embd.weight"):
        return Type.Q6_K
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    layer, part = (int(match[1]), match[2]) if match else (0, "")
    if part == "attn_v":
        return _value_type(level, base, layer, shape)
    if part == "ffn_down":
        early = layer < shape.num_layers // 16
        wider = {"Q3_K_M": Type.Q5_K if early else Type.Q4_K, "Q2_K": Type.Q3_K}
        if level == "Q4_0" and shape.with_importance and layer < shape.num_layers // 8:
            return Type.Q4_1  # with an importance matrix, Q4_0's first down projections can go astray
        return Type.Q6_K if _keeps_more_bits(level, layer, shape) else wider.get(level, base)
    if part == "attn_output":
        return {"Q3_K_M": Type.Q4_K, "Q2_K": Type.Q3_K}.get(level, base)
    return base


def _value_type(level: Level, base: Type, layer: int, shape: Shape) -> Type:
    groups = shape.num_heads // shape.num_kv_heads
    wider = {
        "Q3_K_M": Type.Q5_K if layer < 2 else Type.Q4_K,
        "Q2_K": Type.Q4_K if groups >= 4 else Type.Q3_K,
    }
    chosen = Type.Q6_K if _keeps_more_bits(level, layer, shape) else wider.get(level, base)
    # llama.cpp takes 80 layers with shared values for Llama 2 70B, whose value matrices are an eighth of the others
    large = shape.num_layers == 80 and groups > 1
    return Type.Q5_K if large and chosen in (Type.Q3_K, Type.Q4_K) else chosen


def _keeps_more_bits(level: Level, layer: int, shape: Shape) -> bool:
    """Q4_K_M and Q5_K_M widen the first eighth of the layers, the last eighth, and every third between."""
    eighth = shape.num_layers // 8
    edge = layer < eighth or layer >= 7 * shape.num_layers // 8
    return level in ("Q4_K_M", "Q5_K_M") and (edge or (layer - eighth) % 3 == 2)


def block_size(kind: Type) -> int:
    """Weights that share one block (and its scale)."""
    return GGML_QUANT_SIZES[kind][0]


def size_bytes(kind: Type, num_weights: int) -> int:
    """Bytes of `num_weights` at a type."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return num_weights // block * block_bytes
