"""The encoder's folder, its int8 graph, and that a score depends on its text alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from danube_ray.artifacts import ArtifactError, commit
from danube_ray.config import ConfigError
from danube_ray.curate.quality import Encoder
from danube_ray.curate.quality.building import write_base, write_graph
from danube_ray.curate.quality.calibration import Platt
from danube_ray.curate.quality.encoder import TorchRunner
from danube_ray.curate.quality.settings import EncoderSettings
from tests.curate.quality.corpus import TINY_ENCODER, text

GENERATOR = np.random.default_rng(0)
TEXTS = [text(GENERATOR, number % 2 == 0)[: 40 + 37 * number] for number in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An untrained encoder, its matrices larger than they are drawn, so that texts differ by more than rounding."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    write_base(TINY_ENCODER, TEXTS, folder, seed=1)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        weights[name] = tensor * 8 if tensor.ndim == 2 else tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_graph(folder)
    return folder


def test_the_int8_graph_computes_what_torch_does(folder):
    encoder = Encoder.of_folder(folder)
    plain = Encoder(encoder.tokenizer, TorchRunner(folder, "cpu"), encoder.max_tokens)
    int8, float32 = encoder.log_odds(TEXTS), plain.log_odds(TEXTS)
    assert np.ptp(float32) > 0.1
    assert np.abs(int8 - float32).max() < 0.1 * np.ptp(float32)
    assert int8.tolist() != float32.tolist()  # it is quantized


def test_a_score_depends_on_its_text_alone(folder):
    encoder = Encoder.of_folder(folder)
    together = encoder.log_odds(TEXTS)
    assert [encoder.log_odds([one])[0] for one in TEXTS] == together.tolist()
    assert encoder.log_odds(TEXTS[::-1]).tolist() == together[::-1].tolist()
    assert encoder.log_odds([]).shape == (0,)


def test_batches_by_length_come_back_in_the_order_asked(folder, monkeypatch):
    from danube_ray.curate.quality import encoder as module

    plain = Encoder(Encoder.of_folder(folder).tokenizer, TorchRunner(folder, "cpu"), 64)
    together = plain.log_odds(TEXTS)
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)  # each by itself
    np.testing.assert_allclose(plain.log_odds(TEXTS), together, atol=1e-5)


def test_texts_are_cut_to_the_first_tokens(folder):
    encoder = Encoder.of_folder(folder)
    long = " ".join(TEXTS) * 20
    assert [len(tokens) for tokens in encoder.tokens([long, "river"])] == [TINY_ENCODER.max_tokens, 3]
    assert encoder.log_odds([long])[0] == encoder.log_odds([long + " cookies"])[0]


def test_a_local_base_is_taken_with_its_weights_and_too_long_texts_are_refused(folder, tmp_path):
    base = dataclasses.replace(TINY_ENCODER, base=str(folder), max_tokens=32)
    write_base(base, [], tmp_path / "copy", seed=2)
    cut = [one[:60] for one in TEXTS]
    copied = Encoder(Encoder.of_folder(folder).tokenizer, TorchRunner(tmp_path / "copy", "cpu"), 32)
    original = Encoder(copied.tokenizer, TorchRunner(folder, "cpu"), 64)
    np.testing.assert_allclose(copied.log_odds(cut), original.log_odds(cut), atol=1e-6)
    assert json.loads((tmp_path / "copy" / "tokenizer.json").read_text())["truncation"]["max_length"] == 32
    with pytest.raises(ConfigError, match=r"EncoderSettings.max_tokens is 128, allowed is at most 64"):
        write_base(dataclasses.replace(base, max_tokens=128), [], tmp_path / "long", seed=2)


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_a_hub_id_needs_a_commit(revision):
    with pytest.raises(ConfigError, match=r"EncoderSettings.revision .* 40 hex digits"):
        EncoderSettings(base="owner/name", revision=revision)
    assert EncoderSettings(base="owner/name", revision="0123456789" * 4).base == "owner/name"


def test_a_folder_without_an_encoder_says_so(tmp_path):
    (tmp_path / "quality.json").write_text(json.dumps({"version": 1, "encoder_calibration": None}))
    commit(tmp_path)
    with pytest.raises(ArtifactError, match="has no encoder"):
        Encoder.load(tmp_path)


def test_probabilities_are_calibrated_log_odds(folder):
    encoder = Encoder.of_folder(folder, platt=Platt(2.0, -1.0))
    expected = 1 / (1 + np.exp(-(2 * encoder.log_odds(TEXTS) - 1)))
    np.testing.assert_allclose(encoder.score(TEXTS), expected, rtol=1e-12)
