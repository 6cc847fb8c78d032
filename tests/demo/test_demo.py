"""`danube demo` as its user runs it, and everything it promises about what it leaves. Minutes long: `make test-all`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from danube_ray.artifacts import damage, read_json, read_json_lines, read_manifest
from danube_ray.presets import PRESETS
from danube_ray.train.checkpoint import newest_verified

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

STEPS = ("text", "documents", "tokenizer", "tokens", "search", "pretrain", "model", "sft", "dpo", "evaluation", "gguf")


def danube_demo(out: Path, *options: str) -> str:
    command = [str(Path(sys.executable).parent / "danube"), "demo", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    said = danube_demo(out)
    assert "danube serve danube-nano-chat=" in said and "What does json.loads do?" in said
    return out


def test_every_step_is_recorded_and_leaves_a_whole_folder(demo):
    steps = read_json(demo / "steps.json")
    assert [step["name"] for step in steps] == [*STEPS, "samples.json"]
    assert not any(step["skipped"] for step in steps)
    for name in ("documents", "tokens", "search", "model"):
        assert damage(demo / name) is None
    for counts in read_manifest(demo / "documents")["counts"].values():
        assert counts["read"] == counts["kept"] + counts["dropped"] + counts["quarantined"] > 0


def test_the_model_saw_a_million_tokens_and_learnt_more_than_frequencies(demo):
    rows = read_json_lines(demo / "pretrain" / "metrics.jsonl")
    assert rows[-1]["tokens"] >= 1_000_000 and 0.9e6 < PRESETS["nano"]().model.num_parameters < 2e6
    facts = read_json(demo / "evaluation" / "perplexity.json")
    assert facts["validation_loss"] == rows[-1]["loss"] < 0.9 * facts["unigram_entropy"]
    assert newest_verified(demo / "pretrain" / "checkpoints") is not None


def test_transformers_opens_the_exported_models(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (demo / "model", demo / "sft" / "model", demo / "chat"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer) == 2048
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)


def test_llama_cpp_opens_every_gguf_and_the_levels_stay_close(demo):
    from danube_ray.inference.gguf import GgufModel

    rows = {row["level"]: row for row in read_json(demo / "gguf" / "quantization.json")}
    assert set(rows) == {"F16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0"}
    for row in rows.values():
        with GgufModel(demo / "gguf" / row["file"]) as model:
            assert len(model.generate([1, 10, 20], max_tokens=4)) <= 4
    divergences = [rows[level]["kld_mean"] for level in ("F16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0")]
    assert divergences == sorted(divergences) and divergences[-1] < 0.1


def test_the_report_shows_the_run(demo):
    page = (demo / "report.html").read_text()
    for shown in ("Q4_K_M", "anneal", "stdlib", "What does json.loads do?"):
        assert shown in page


def test_a_second_run_does_nothing_again(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*.safetensors")}
    said = danube_demo(demo)
    assert all(step["skipped"] for step in read_json(demo / "steps.json")) and "done before" in said
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*.safetensors")} == before


def test_the_users_own_text_takes_the_same_road(tmp_path, shared_data):
    text = shared_data / "wiki" / "wikitext2" / "word_language_model" / "data" / "wikitext-2"
    danube_demo(tmp_path / "run", "--text", str(text))
    assert set(read_manifest(tmp_path / "run" / "tokens")["counts"]) == {"wikitext-2"}
    assert read_json(tmp_path / "run" / "samples.json")[0]["answer"]
