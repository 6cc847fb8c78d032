from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from danube_ray.config import ConfigError
from danube_ray.inference.gguf import GgufModel
from danube_ray.runtime.quantization import quantize
from tests.models import tiny_model

TOKENS = np.random.default_rng(0).integers(3, 512, 600).astype(np.uint16)


@pytest.mark.ray
def test_levels_are_made_measured_and_kept(ray_session, tmp_path):
    folder, out = tiny_model(tmp_path / "model"), tmp_path / "gguf"
    made = []
    quantize(folder, out, TOKENS, ["Q8_0"], on_level=lambda row: made.append(row["level"]))
    rows = quantize(folder, out, TOKENS, ["Q4_K_M", "F16"], on_level=lambda row: made.append(row["level"]))
    assert sorted(made) == ["F16", "Q4_K_M", "Q8_0"]
    assert [row["level"] for row in rows] == ["F16", "Q8_0", "Q4_K_M"]
    assert rows == json.loads((out / "quantization.json").read_text())
    for row in rows:
        assert row["bytes"] == (out / row["file"]).stat().st_size
        assert row["tokens_per_s"] > 0
        with GgufModel(out / row["file"]) as model:
            assert model.vocab_size == 512
    for wider, narrower in pairwise(rows):
        assert wider["kld_mean"] < narrower["kld_mean"]
        assert wider["bits_per_weight"] > narrower["bits_per_weight"]
    assert len(rows[2]["fallbacks"]) == 16

    made.clear()
    (out / "Q8_0.gguf").write_bytes(b"torn")
    again = quantize(folder, out, TOKENS, ["F16", "Q8_0", "Q4_K_M"], on_level=lambda row: made.append(row["level"]))
    assert made == ["Q8_0"]
    assert [row["sha256"] for row in again] == [row["sha256"] for row in rows]

    made.clear()
    tiny_model(folder, seed=1)
    quantize(folder, out, TOKENS, ["F16"], on_level=lambda row: made.append(row["level"]))
    assert made == ["F16"]
    assert [row["level"] for row in json.loads((out / "quantization.json").read_text())] == ["F16"]


@pytest.mark.ray
def test_an_error_in_a_task_is_said_in_its_own_words(ray_session, tmp_path):
    folder = tiny_model(tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.model"):
        quantize(folder, tmp_path / "gguf", TOKENS, ["F16"])


def test_wrong_settings_are_named_before_workers_start(tmp_path):
    folder = tiny_model(tmp_path / "model", sliding_window=64)
    with pytest.raises(ConfigError, match="level is 'Q9'"):
        quantize(folder, tmp_path / "gguf", TOKENS, ["Q9"])
    with pytest.raises(ConfigError, match="context is 65, allowed is 2 to 64"):
        quantize(folder, tmp_path / "gguf", TOKENS, context=65)
    with pytest.raises(ConfigError, match="at least two"):
        quantize(folder, tmp_path / "gguf", TOKENS[:1])
    assert not (tmp_path / "gguf").exists()
