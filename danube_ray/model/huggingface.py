"""Models as Hugging Face folders: written for transformers, vLLM and llama.cpp, and read from any Llama or Mistral.

Our weights already carry Hugging Face's names, so a folder is `config.json`, `generation_config.json` and safetensors.
A model with a sliding window is a `MistralForCausalLM`, one without a `LlamaForCausalLM`; the two differ in nothing
else. No pickle is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from danube_ray.artifacts import ArtifactError, read_json, write_json
from danube_ray.config import BOS_ID, EOS_ID, AttentionBackend, ConfigError, ModelConfig, require
from danube_ray.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# What transformers takes when config.json leaves a key out (LlamaConfig and MistralConfig, transformers 4 and 5).
IMPLIED: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
}


def export_model(
    model_state: dict[str, Tensor], config: ModelConfig, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config and weights to `folder`, cast to `dtype`; the tokenizer's files are put beside them by the caller.

    `model_state` is `Transformer.state_dict()`, of a plain or an FP8 model. Raises `ConfigError` when it lacks a
    weight, has one too many, or one in another shape than `config` says.
    """
    weights = {name: tensor for name, tensor in model_state.items() if not name.endswith("_extra_state")}
    check_weights({name: tuple(tensor.shape) for name, tensor in weights.items()}, config, "model_state")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{WEIGHTS}"
    try:
        cast = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
        save_file(cast, unfinished, metadata={"format": "pt"})
        unfinished.replace(folder / WEIGHTS)
    finally:
        unfinished.unlink(missing_ok=True)
    write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})
    write_json(folder / "config.json", hf_config(config, dtype))


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config` as the contents of a config.json.

    RoPE's base and the dtype stand there twice: transformers 5 reads `rope_parameters` and `dtype`, transformers 4 and
    llama.cpp's converter `rope_theta` and `torch_dtype`.
    """
    family = "llama" if config.sliding_window is None else "mistral"
    dtype_name = str(dtype).removeprefix("torch.")
    values = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "use_cache": True,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
    return values if config.sliding_window is None else {**values, "sliding_window": config.sliding_window}


def load_config(folder: Path, *, any_rope: bool = False, quantized: bool = False) -> ModelConfig:
    """The shape of the model in a Hugging Face folder; `ConfigError` when it is not one that `Transformer` computes.

    With `any_rope`, scaled RoPE, which `Transformer` does not compute, is the caller's to look at; with `quantized`,
    compressed weights.
    """
    path = folder / "config.json"
    try:
        read = read_json(path)
    except ArtifactError as error:
        raise ConfigError("model folder", str(folder), "a Hugging Face folder with config.json", str(error)) from None
    architecture = (read.get("architectures") or ["none"])[0]
    require(architecture in IMPLIED, f"architectures in {path}", architecture, " or ".join(IMPLIED))
    values = {**IMPLIED[architecture], **read}
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        require(values.get(key, plain) in (plain, None), f"{key} in {path}", values.get(key), repr(plain))
    rope = values.get("rope_parameters") or {}
    if not any_rope:
        require(not values.get("rope_scaling"), f"rope_scaling in {path}", values.get("rope_scaling"), "None")
        kind = rope.get("rope_type", rope.get("type", "default"))  # both are read by transformers
        require(kind == "default", f"rope_type in {path}", kind, "'default'")
    if not quantized:
        require("quantization_config" not in values, f"quantization_config in {path}", "set", "unquantized weights")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        require(key in values, f"{key} in {path}", None, "a number")
    heads = values["num_attention_heads"]
    window = values["sliding_window"] if architecture == "MistralForCausalLM" else None
    hides = window is not None and window < values["max_position_embeddings"]
    return ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        context_length=values["max_position_embeddings"],
        sliding_window=window if hides else None,
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        initializer_range=values.get("initializer_range", 0.02),
    )


def load_model(
    folder: Path,
    attention: AttentionBackend = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The model of a Llama or Mistral folder, one file or sharded, on `device` in `dtype` (fp32, ready to train).

    A head tied to the embeddings becomes a copy of them. Raises `ConfigError` for a model that `Transformer` does not
    compute, and for weights that are missing, torn, pickled or of another shape than config.json says.
    """
    config = load_config(folder)
    state = {name: tensor.to(device, dtype) for name, tensor in read_weights(folder)}
    if HEAD not in state and EMBEDDING in state and read_json(folder / "config.json").get("tie_word_embeddings"):
        state[HEAD] = state[EMBEDDING].clone()
    check_weights({name: tuple(tensor.shape) for name, tensor in state.items()}, config, str(folder))
    with torch.device("meta"):
        model = Transformer(config, attention)
    model.load_state_dict(state, assign=True)
    return model


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a folder's safetensors, file by file; the RoPE tables that old folders carry are passed over."""
    index = folder / INDEX
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    remedy = "save it as safetensors: pickled weights are not read" if any(folder.glob("*.bin")) else "fetch it again"
    for name in names:
        path = folder / name
        require(path.is_file(), "weights of the model", str(path), "a safetensors file that is there", remedy)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    if not key.endswith("rotary_emb.inv_freq"):
                        yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise ConfigError(
                "weights of the model", str(path), f"a whole safetensors file ({error})", remedy
            ) from None


def check_weights(shapes: dict[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Raise `ConfigError` unless `shapes` are exactly those of a `Transformer` of this config."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        found, wanted = shapes.get(name, "missing"), expected.get(name, "no such weight")
        require(found == wanted, f"{name} of {where}", found, str(wanted))
