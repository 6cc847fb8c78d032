"""What levels cost, measured on a cluster: every part once, the float model's reading shared, nothing done twice."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from danube_ray.config import ConfigError
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.evaluate.harness import multiple_choice_task
from danube_ray.inference.gguf import GgufModel
from danube_ray.quantize.long_context import long_context
from danube_ray.quantize.measure import divergence, passages, reference_logits
from danube_ray.runtime.measuring import Material, Meter
from danube_ray.runtime.quantization import quantize
from tests.models import tiny_model

TOKENS = np.random.default_rng(0).integers(3, 512, 600).astype(np.uint16)
TEXTS = passages(TOKENS, 128)


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model")


@pytest.mark.ray
def test_levels_are_measured_once_and_the_float_model_reads_once(ray_session, model, tmp_path):
    out, seen = tmp_path / "gguf", []
    quantize(model, out, ["F16", "Q8_0", "Q4_0"])
    meter = Meter(model, out, Material(TEXTS), on_progress=lambda what, done, total: seen.append((what, done, total)))
    meter.measure(["Q4_0"])
    rows = meter.measure(["F16", "Q8_0", "Q4_0"])
    assert [row["level"] for row in rows] == ["F16", "Q8_0", "Q4_0"]
    assert rows == json.loads((out / "quantization.json").read_text())
    assert [step for step in seen if "float" in step[0]] == [
        ("passages read by the float model", done, len(TEXTS)) for done in range(1, len(TEXTS) + 1)
    ]
    assert [row["kld_mean"] for row in rows] == sorted(row["kld_mean"] for row in rows)
    with GgufModel(out / "Q4_0.gguf") as level:
        alone = divergence(level, TEXTS, reference_logits(model, TEXTS))
    assert rows[2]["kld_mean"] == pytest.approx(alone.kld_mean, rel=1e-4)
    assert rows[2]["perplexity"] == pytest.approx(alone.perplexity, rel=1e-5)
    assert all(row["prompt_tokens_per_s"] > 0 and row["speed_threads"] == 1 for row in rows)

    seen.clear()
    assert Meter(model, out, Material(TEXTS), on_progress=lambda *step: seen.append(step)).measure(["Q4_0"]) == rows[2:]
    assert seen == []
    other = Material(passages(TOKENS[:200], 128))
    changed = Meter(model, out, other, on_progress=lambda *step: seen.append(step)).measure(["Q4_0"])
    assert seen and changed[0]["positions"] == 198


@pytest.mark.ray
def test_tasks_and_the_long_context_are_added_to_rows_that_are_there(ray_session, model, tmp_path):
    out = tmp_path / "gguf"
    quantize(model, out, ["F32", "Q2_K"])
    plain = Meter(model, out, Material(TEXTS)).measure(["F32", "Q2_K"])
    questions = [{"question": f"Which of {n}?", "choices": ["a river", "sand", "the plain"], "answer": n % 3}
                 for n in range(6)]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(questions))
    material = Material(
        TEXTS,
        far=long_context(TOKENS, 256, Tokenizer.load(model)),
        tasks=[multiple_choice_task("rivers", tmp_path / "rows.json")],
    )
    float32, coarse = Meter(model, out, material).measure(["F32", "Q2_K"])
    assert coarse["kld_mean"] == plain[1]["kld_mean"]
    assert [(task["task"], task["metric"], task["n"]) for task in coarse["tasks"]] == [
        ("rivers", "acc", 6), ("rivers", "acc_norm", 6),
    ]  # fmt: skip
    assert all(task["drop"] == task["drop_error"] == 0 for task in float32["tasks"])
    assert coarse["long_context"]["context"] == 256
    assert float32["long_context"]["found"] == float32["long_context"]["reference_found"]
    worst = [max(span["kld_mean"] for span in row["long_context"]["by_position"]) for row in (float32, coarse)]
    assert worst[0] < 1e-4 < worst[1]
    fewer = replace(material, limit=3)
    assert Meter(model, out, fewer).measure(["Q2_K"])[0]["tasks"][0]["n"] == 3


@pytest.mark.ray
def test_a_model_that_can_not_be_read_is_an_error_in_its_own_words(ray_session, model, tmp_path):
    out = tmp_path / "gguf"
    quantize(model, out, ["F16"])
    (out / "F16.gguf").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="one that llama.cpp loads"):
        Meter(model, out, Material(TEXTS)).measure(["F16"])
    (model / "model.safetensors").unlink()
    with pytest.raises(Exception, match=r"safetensors"):
        Meter(model, out, Material(TEXTS)).measure(["F16"])
