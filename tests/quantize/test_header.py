from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from danube_ray.artifacts import read_json, write_json
from danube_ray.config import ConfigError
from danube_ray.inference.gguf import GgufModel
from danube_ray.quantize.gguf import convert
from tests.models import tiny_model

SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, defaults said": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
IDS = np.random.default_rng(0).integers(3, 512, 200).tolist()


def with_rope(folder, rope, key="rope_parameters"):
    config = {name: value for name, value in read_json(folder / "config.json").items() if name != "rope_parameters"}
    base = {"rope_theta": 10_000.0}
    write_json(folder / "config.json", {**config, **base, key: {**base, **rope} if key == "rope_parameters" else rope})
    return folder


def logits(folder, gguf_file):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    with GgufModel(gguf_file) as model:
        return wanted, model.logits(IDS)


@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_rope_gives_the_logits_of_transformers(scaling, tmp_path):
    folder = tiny_model(tmp_path / "model")
    convert(folder, tmp_path / "plain.gguf", "F32")
    with_rope(folder, SCALED[scaling])
    convert(folder, tmp_path / "scaled.gguf", "F32")
    wanted, got = logits(folder, tmp_path / "scaled.gguf")
    with GgufModel(tmp_path / "plain.gguf") as model:
        effect = np.abs(model.logits(IDS) - wanted).max()
    assert np.abs(got - wanted).max() < 0.02 < 0.2 < effect


def test_the_key_of_older_folders_means_the_same(tmp_path):
    folder = with_rope(tiny_model(tmp_path / "model"), SCALED["llama3"])
    convert(folder, tmp_path / "new.gguf", "F16")
    old = {"type" if key == "rope_type" else key: value for key, value in SCALED["llama3"].items()}
    convert(with_rope(folder, old, key="rope_scaling"), tmp_path / "old.gguf", "F16")
    assert (tmp_path / "old.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type in .* is 'dynamic', allowed is default, linear"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope'"),
        ({**SCALED["yarn"], "attention_factor": 1.5}, "attention_factor.*of yarn"),
        ({**SCALED["yarn"], "beta_slow": 2.0}, "beta_slow.*of yarn"),
        ({**SCALED["llama3"], "low_freq_factor": None}, "not set.*low_freq_factor for llama3"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rope_that_llama_cpp_does_not_compute_is_refused(rope, said, tmp_path):
    folder = with_rope(tiny_model(tmp_path / "model"), rope)
    with pytest.raises(ConfigError, match=said):
        convert(folder, tmp_path / "out" / "model.gguf", "F32")
    assert not (tmp_path / "out" / "model.gguf").exists()
