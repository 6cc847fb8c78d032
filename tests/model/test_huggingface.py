"""Hugging Face folders: transformers computes our logits from what we write, and we compute its from what it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from danube_ray.config import ConfigError, ModelConfig
from danube_ray.model.huggingface import export_model, load_config, load_model
from danube_ray.model.transformer import Transformer
from danube_ray.presets import danube2_1_8b, danube3_4b, danube3_500m, danube_1_8b

TOLERANCE = 1e-4  # largest difference between logits, fp32


def scaled_down(config: ModelConfig) -> ModelConfig:
    """A model of the same head dimension, head grouping and window rule, small enough for a test."""
    heads = config.num_heads // 4
    return dataclasses.replace(
        config,
        vocab_size=160,
        hidden_size=96,
        intermediate_size=192,
        num_layers=3,
        num_heads=heads,
        num_kv_heads=config.num_kv_heads // 4,
        context_length=96,
        sliding_window=None if config.sliding_window is None else 24,
        initializer_range=0.2,  # sharp attention: a wrong mask or angle moves the logits by more than a rounding
    )


SHAPES = {
    "danube": scaled_down(danube_1_8b().model),
    "danube2": scaled_down(danube2_1_8b().model),
    "danube3-500m": scaled_down(danube3_500m().model),
    "danube3-4b": scaled_down(danube3_4b().model),
}
SMALL = SHAPES["danube2"]


def exported(config: ModelConfig, folder: Path) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    export_model(model.state_dict(), config, folder, torch.float32)
    return model


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
@pytest.mark.parametrize("length", [20, 96], ids=["within-window", "beyond-window"])
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_our_logits(name: str, length: int, tmp_path: Path):
    config = SHAPES[name]
    model = exported(config, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa")
    assert type(theirs) is (MistralForCausalLM if name == "danube" else LlamaForCausalLM)
    tokens = torch.randint(0, config.vocab_size, (2, length))
    ours, other = model(tokens), theirs(tokens, use_cache=False).logits
    assert ours.std() > 0.1
    assert (ours - other).abs().max() <= TOLERANCE


@torch.no_grad()
def test_the_window_is_active_in_transformers_too(tmp_path: Path):
    """Guards the test above: were the window ignored on either side, the logits would differ by far more."""
    config = SHAPES["danube"]
    exported(config, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, config.vocab_size, (1, 96))
    unlimited = Transformer(dataclasses.replace(config, sliding_window=None))
    unlimited.load_state_dict(theirs.state_dict())
    assert (unlimited(tokens) - theirs(tokens, use_cache=False).logits).abs().max() > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_folder_of_transformers_gives_its_logits(family: str, tied: bool, tmp_path: Path):
    shape = {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 80,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0},
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(0)
    if family == "llama":
        theirs = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        theirs = MistralForCausalLM(MistralConfig(**shape, sliding_window=16))
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1  # sharded, with an index
    model = load_model(tmp_path)
    assert model.config.rope_theta == 5_000.0
    assert model.config.sliding_window == (16 if family == "mistral" else None)
    tokens = torch.randint(0, 120, (2, 40))
    assert (model(tokens) - theirs(tokens, use_cache=False).logits).abs().max() <= TOLERANCE
    assert all(weight.requires_grad for weight in model.parameters())
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", SHAPES)
def test_export_and_import_are_inverse(name: str, tmp_path: Path):
    model = exported(SHAPES[name], tmp_path)
    again = load_model(tmp_path)
    assert load_config(tmp_path) == SHAPES[name]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_export_casts_drops_fp8_state_and_checks_names(tmp_path: Path):
    model = Transformer(SMALL)
    state = {**model.state_dict(), "model.layers.0.mlp.up_proj._extra_state": torch.empty(0, dtype=torch.uint8)}
    export_model(state, SMALL, tmp_path, torch.bfloat16)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    del state["model.norm.weight"]
    with pytest.raises(ConfigError, match=r"model\.norm\.weight of model_state is 'missing', allowed is \(96,\)"):
        export_model(state, SMALL, tmp_path / "other")


def test_older_configs_are_read_with_the_defaults_of_their_time(tmp_path: Path):
    exported(SMALL, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "max_position_embeddings"):
        del values[key]
    values.update(rope_theta=123.0, hidden_size=640, num_attention_heads=8)
    path.write_text(json.dumps(values))
    config = load_config(tmp_path)
    assert (config.rope_theta, config.head_dim, config.num_kv_heads, config.context_length) == (123.0, 80, 8, 2048)
    rewrite_config(tmp_path, architectures=["MistralForCausalLM"])
    assert load_config(tmp_path).sliding_window == 4096
    rewrite_config(tmp_path, sliding_window=None)
    assert load_config(tmp_path).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, r"architectures in .* is 'Qwen2ForCausalLM', allowed is Llama"),
        ({"attention_bias": True}, "attention_bias in .* is True, allowed is False"),
        ({"mlp_bias": True}, "mlp_bias in .* is True, allowed is False"),
        ({"hidden_act": "gelu"}, "hidden_act in .* is 'gelu', allowed is 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling in .*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type in .* is 'yarn', allowed is 'def"),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_type in .* is 'linear', allowed is 'default'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config in .*unquantized"),
        ({"vocab_size": 161}, r"lm_head\.weight of .* is \(160, 96\), allowed is \(161, 96\)"),
    ],
)
def test_what_the_transformer_does_not_compute_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    exported(SMALL, tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def test_missing_torn_pickled_or_foreign_weights_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model folder is .*config\.json does not exist"):
        load_model(tmp_path / "nowhere")
    exported(SMALL, tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    state = load_file(weights)
    weights.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="a whole safetensors file"):
        load_model(tmp_path)
    save_file({**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(4)}, weights)
    with pytest.raises(ConfigError, match=r"q_proj\.bias of .*allowed is no such weight"):
        load_model(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        load_model(tmp_path)
