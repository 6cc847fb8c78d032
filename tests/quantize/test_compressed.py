from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from danube_ray.artifacts import read_json
from danube_ray.config import ConfigError
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.quantize.compressed import Scheme, compress
from danube_ray.quantize.divergence import score, summarize
from tests.models import tiny_model

WINDOWS = [list(np.random.default_rng(seed).integers(3, 512, 64)) for seed in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), hidden_size=256, intermediate_size=512, num_heads=8)


@pytest.mark.parametrize(("scheme", "largest_kld"), [("FP8", 0.05), ("W4A16", 0.2)])
def test_a_compressed_folder_is_smaller_and_says_nearly_the_same(
    folder: Path, tmp_path: Path, scheme: Scheme, largest_kld: float
):
    pytest.importorskip("llmcompressor", reason="needs danube-ray[compress]")
    facts = compress(folder, tmp_path / "out", scheme, WINDOWS)
    written = read_json(tmp_path / "out" / "config.json")
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"
    assert facts.bytes < 0.8 * (folder / "model.safetensors").stat().st_size / 2, "of the size in 16 bits"
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    model, reference = HuggingFaceModel(tmp_path / "out"), HuggingFaceModel(folder)
    scores = [score(reference.logits(ids)[:-1], model.logits(ids)[:-1], np.asarray(ids[1:])) for ids in WINDOWS]
    assert 0 < summarize(scores).kld_mean < largest_kld
    with pytest.raises(ConfigError, match="isn't there yet"):
        compress(folder, tmp_path / "out", scheme, WINDOWS)


def test_what_cannot_be_compressed_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="FP8 or W4A16"):
        compress(folder, tmp_path / "out", "INT3")  # type: ignore[arg-type]
    pytest.importorskip("llmcompressor", reason="needs danube-ray[compress]")
    with pytest.raises(ConfigError, match="windows of token ids for W4A16"):
        compress(folder, tmp_path / "out", "W4A16")
    uneven = tiny_model(tmp_path / "uneven", intermediate_size=352)
    with pytest.raises(ConfigError, match=r"\[352\]"):
        compress(uneven, tmp_path / "out", "W4A16", WINDOWS)
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_remedy_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "llmcompressor.modifiers.quantization", None)
    with pytest.raises(ConfigError, match=r"pip install 'danube-ray\[compress\]'"):
        compress(folder, tmp_path / "out", "FP8")
