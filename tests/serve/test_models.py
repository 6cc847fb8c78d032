from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from danube_ray.artifacts import read_json, write_json
from danube_ray.config import ConfigError, ServedModel
from danube_ray.quantize.gguf import convert
from danube_ray.serve.models import entry_of
from tests.models import tiny_model, tiny_tokenizer
from tests.serve.tiny import CONTEXT_TOKENS


def test_the_context_is_the_files(served: ServedModel):
    assert entry_of(served).context_tokens == CONTEXT_TOKENS
    assert entry_of(replace(served, context_tokens=100)).context_tokens == 100
    with pytest.raises(ConfigError, match="context_tokens is 100000"):
        entry_of(replace(served, context_tokens=100_000))


def test_the_sliding_window_caps_the_context(tmp_path: Path):
    tiny_model(tmp_path, sliding_window=32)
    convert(tmp_path, tmp_path / "model.gguf", "F16")
    assert entry_of(ServedModel(weights=tmp_path / "model.gguf")).context_tokens == 32


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_torn_file_is_refused(served: ServedModel, tmp_path: Path, share: float):
    whole = served.weights.read_bytes()
    (tmp_path / "torn.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match=r"torn\.gguf"):
        entry_of(replace(served, weights=tmp_path / "torn.gguf"))


def test_another_models_tokenizer_is_refused(served: ServedModel, tmp_path: Path):
    with pytest.raises(ConfigError, match="tokenizer_folder"):
        entry_of(replace(served, tokenizer_folder=tiny_tokenizer(tmp_path, vocab_size=400)))


def test_a_tokenizer_without_its_sentencepiece_model_is_refused(served: ServedModel, tmp_path: Path):
    (tiny_tokenizer(tmp_path) / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"a folder with tokenizer\.model; .*tokenizer\.json alone"):
        entry_of(replace(served, tokenizer_folder=tmp_path))


@pytest.mark.parametrize(
    "field", [{"num_slots": 0}, {"num_threads": -1}, {"max_queued": 0}, {"min_replicas": 2}, {"context_tokens": 0}]
)
def test_numbers_that_make_no_sense(served: ServedModel, field: dict[str, int]):
    with pytest.raises(ConfigError, match=next(iter(field))):
        replace(served, **field)


def test_a_folder_is_served_with_gpus_or_without_and_a_file_without(served: ServedModel):
    folder = replace(served, weights=served.weights.parent)
    for num_gpus in (0, 1):
        assert entry_of(replace(folder, num_gpus=num_gpus)).context_tokens == CONTEXT_TOKENS
    with pytest.raises(ConfigError, match="runs a GGUF file on CPUs"):
        entry_of(replace(served, num_gpus=1))


def test_a_compressed_folder_is_served(served: ServedModel, tmp_path: Path):
    """What `danube compress` writes, for vLLM."""
    folder = tiny_tokenizer(tmp_path)
    config = read_json(served.weights.parent / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "compressed-tensors"}})
    model = replace(served, weights=folder, tokenizer_folder=None, num_gpus=1)
    assert entry_of(model).context_tokens == CONTEXT_TOKENS
