"""Samples: the likeliest continuation, the same as transformers', and no trace of them in the training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from danube_ray.artifacts import read_json_lines
from danube_ray.config import ConfigError, LoopConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig
from danube_ray.data.shards import write_tokens
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.model.huggingface import load_model
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from danube_ray.train.pretrain import PretrainTask
from danube_ray.train.samples import write_samples
from tests.models import TEXT, tiny_model, tiny_tokenizer

PROMPTS = ("The Danube rises", "Question: which river is longer? Answer:", "def")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_prompts_are_continued_as_transformers_would(folder: Path) -> None:
    """Prompts of different lengths in one batch, each with the greedy ids of a whole forward pass a token."""
    tokenizer, reference = Tokenizer.load(folder), HuggingFaceModel(folder)
    module = load_model(folder).train()
    samples = write_samples(module, tokenizer, PROMPTS, context_length=256)
    assert [sample["prompt"] for sample in samples] == list(PROMPTS)
    for sample in samples:
        ids = [tokenizer.bos_id, *tokenizer.encode(sample["prompt"])]
        expected = reference.generate(ids, max_tokens=48)
        assert sample["continuation"] == tokenizer.decode([*ids, *expected])[len(sample["prompt"]) :]
    assert len({sample["continuation"] for sample in samples}) == 3 and module.training


def test_a_prompt_longer_than_the_context_loses_its_beginning(folder: Path) -> None:
    tokenizer, module = Tokenizer.load(folder), load_model(folder)
    long = " ".join(TEXT * 20)
    (whole,) = write_samples(module, tokenizer, [long], context_length=256)
    ids = [tokenizer.bos_id, *tokenizer.encode(long)][-(256 - 48) :]
    expected = HuggingFaceModel(folder).generate(ids, max_tokens=48)
    assert whole["continuation"] == tokenizer.decode([*ids, *expected])[len(tokenizer.decode(ids)) :]


def a_run(folder: Path, name: str, prompts: tuple[str, ...]) -> RunConfig:
    """Six steps on the tiny tokenizer's own text, validated and saved every second one."""
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    documents = Tokenizer.load(tokenizer).encode_documents(TEXT * 8)
    if not (folder / "tokens").is_dir():
        sha256 = Tokenizer.load(tokenizer).sha256
        write_tokens(
            folder / "tokens", {"text": {"unscored": documents}}, {"text": documents}, 512, tokenizer_sha256=sha256
        )
    model = ModelConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        context_length=64,
    )  # fmt: skip
    stage = StageConfig(name="only", tokens=6 * 128, sequence_length=64, micro_batch_size=2, shares={"text": 1})
    return RunConfig(
        name=name,
        model=model,
        stages=(stage,),
        global_batch_tokens=128,
        optimizer=OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=1),
        loop=LoopConfig(precision="fp32", log_every_steps=1, validate_every_steps=2, checkpoint_every_steps=2),
        max_epochs=100.0,
        validation_windows=2,
        sample_prompts=prompts,
        tokenizer=str(tokenizer),
        tokens_dir=str(folder / "tokens"),
        output_dir=str(folder),
    )


def train(run: RunConfig) -> Path:
    folder = Path(run.output_dir) / run.name
    return fit(PretrainTask(run), folder, run.loop, run.optimizer, LocalContext()).checkpoint


def test_a_run_with_samples_has_the_weights_of_one_without(tmp_path: Path) -> None:
    plain = train(a_run(tmp_path, "plain", ()))
    sampled = train(a_run(tmp_path, "sampled", PROMPTS[:2]))
    before, after = load_file(plain / "model.safetensors"), load_file(sampled / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    rows = read_json_lines(tmp_path / "sampled" / "samples.jsonl")
    assert [(row["step"], row["tokens"], row["prompt"]) for row in rows] == [
        (step, 128 * step, prompt) for step in (2, 4, 6) for prompt in PROMPTS[:2]
    ]
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


def test_samples_of_steps_that_are_trained_again_are_there_once(tmp_path: Path) -> None:
    run = a_run(tmp_path, "run", PROMPTS[:1])
    train(run)
    samples = tmp_path / "run" / "samples.jsonl"
    whole = [{**json.loads(line), "time": 0} for line in samples.read_text().splitlines()]
    (tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json").unlink()  # back to step 4
    train(run)
    assert [{**row, "time": 0} for row in read_json_lines(samples)] == whole


def test_another_tokenizer_than_the_data_has_is_refused_before_the_run(tmp_path: Path) -> None:
    run = a_run(tmp_path, "run", PROMPTS[:1])
    other = tiny_tokenizer(tmp_path / "other", vocab_size=400)
    with pytest.raises(ConfigError, match=r"RunConfig\.tokenizer"):
        PretrainTask(dataclasses.replace(run, tokenizer=str(other)))
