"""SFT and DPO as tasks of the one loop: what is trained, what the losses are, and what comes out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from danube_ray.artifacts import MANIFEST, damage, file_hash, read_json, read_json_lines, write_json
from danube_ray.cli.training import finetune
from danube_ray.config import ConfigError, DpoConfig, FinetuneConfig, LoopConfig, LoraConfig, OptimizerConfig, to_dict
from danube_ray.inference.gguf import GgufModel
from danube_ray.model.huggingface import load_model
from danube_ray.posttrain.dpo import DpoTask
from danube_ray.posttrain.finetune import export, export_adapter
from danube_ray.posttrain.lora import add_adapters, merge
from danube_ray.posttrain.sft import SftTask
from danube_ray.quantize.adapter import CONFIG, WEIGHTS, convert_adapter
from danube_ray.quantize.gguf import convert
from danube_ray.train.checkpoint import MODEL
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from danube_ray.train.metrics import METRICS
from tests.models import tiny_model

LOOP = LoopConfig(precision="fp32", log_every_steps=1, checkpoint_every_steps=100)
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, min_learning_rate=0.0, warmup_steps=1, weight_decay=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sft") / "conversations.jsonl"
    rows = [{"prompt": f"What is {n} and {n}?", "response": f"It is {2 * n}."} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("dpo") / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}.", "chosen": f"Gladly: {n}.", "rejected": "No, I won't."} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sft_config(base: Path, data: Path, out: Path, **changes) -> FinetuneConfig:
    config = FinetuneConfig(
        name="sft", base=str(base), data=str(data), epochs=4, batch_size=6, micro_batch_size=2, optimizer=OPTIMIZER,
        loop=LOOP, output_dir=str(out),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def dpo_config(base: Path, data: Path, out: Path) -> DpoConfig:
    return DpoConfig(
        name="dpo", base=str(base), data=str(data), epochs=4, batch_size=4, micro_batch_size=2, optimizer=OPTIMIZER,
        loop=LOOP, output_dir=str(out),
    )  # fmt: skip


def tensors(batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(folder / METRICS) if row["kind"] == "train"]


def test_sft_trains_answers_alone_with_the_loss_of_transformers(base, conversations, tmp_path):
    task = SftTask(sft_config(base, conversations, tmp_path))
    batch = tensors(task.reader(0, 0, 1))
    labels = task.labels(batch)
    tokens = batch["tokens"].long()
    for row in range(len(labels)):
        answer = labels[row][labels[row] != -100].tolist()
        text = task_tokenizer(base).decode(answer)
        assert text.strip().startswith("It is") and answer[-1] == 2  # the answer and its end, nothing of the prompt
    ours = task.loss(task.build_model(), batch) / task.count(batch)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    everything = torch.cat([torch.full_like(labels[:, :1], -100), labels], dim=1)
    assert ours.item() == pytest.approx(theirs(input_ids=tokens, labels=everything).loss.item(), abs=1e-5)


def task_tokenizer(base: Path):
    from danube_ray.data.tokenizer import Tokenizer

    return Tokenizer.load(base)


def test_sft_learns_and_its_export_opens_in_transformers(base, conversations, tmp_path):
    config = sft_config(base, conversations, tmp_path)
    result = fit(SftTask(config), tmp_path / "sft", config.loop, config.optimizer, LocalContext())
    assert losses(tmp_path / "sft")[-1] < 0.7 * losses(tmp_path / "sft")[0]
    folder = export(result.checkpoint, config, tmp_path / "model", dtype=torch.float32)
    trained = load_model(folder)
    tokens = torch.arange(3, 40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (trained(tokens) - theirs(tokens).logits).abs().max() <= 1e-4
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_adapters_alone_are_trained_and_merge_into_the_same_function(base):
    model = add_adapters(load_model(base), LoraConfig(rank=4, alpha=16))
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert state and all("lora_" in name for name in state)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    tokens = torch.arange(3, 40)[None]
    adapted = model(tokens)
    fresh = load_model(base)
    plain = load_model(base)
    plain.load_state_dict(merge(add_adapters(fresh, LoraConfig(rank=4, alpha=16)), state))
    torch.testing.assert_close(plain(tokens), adapted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(load_model(base)(tokens), adapted, atol=1e-3)


def test_dpo_starts_at_ln_2_and_learns_to_prefer(base, pairs, tmp_path):
    config = dpo_config(base, pairs, tmp_path)
    task = DpoTask(config)
    batch = tensors(task.reader(0, 0, 1))
    model = task.build_model()
    assert task.loss(model, batch).item() / task.count(batch).item() == pytest.approx(math.log(2), abs=1e-6)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    fit(task, tmp_path / "dpo", config.loop, config.optimizer, LocalContext())
    assert losses(tmp_path / "dpo")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(tmp_path / "dpo")[-1] < 0.6
    folder = export(tmp_path / "dpo" / "checkpoints" / "step-00000008", config, tmp_path / "model", torch.float32)
    merged, reference = load_model(folder).state_dict(), load_model(base).state_dict()
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], reference["model.layers.0.self_attn.q_proj.weight"]
    )
    assert torch.equal(merged["lm_head.weight"], reference["lm_head.weight"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_killed_run_with_adapters_and_dropout_ends_with_the_weights_of_an_uninterrupted_one(base, pairs, tmp_path):
    config = dpo_config(base, pairs, tmp_path)
    loop = dataclasses.replace(LOOP, deterministic=True, checkpoint_every_steps=3)
    config = dataclasses.replace(config, lora=LoraConfig(dropout=0.2), loop=loop)
    whole = fit(DpoTask(config), tmp_path / "whole", loop, OPTIMIZER, LocalContext())
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for folder in (tmp_path / "killed" / "checkpoints").iterdir():
        if folder.name != "step-00000003":
            (folder / MANIFEST).unlink()
    again = fit(DpoTask(config), tmp_path / "killed", loop, OPTIMIZER, LocalContext())
    assert again.steps == whole.steps == 8
    ends = [(result.checkpoint / MODEL).read_bytes() for result in (whole, again)]
    assert ends[0] == ends[1]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_dpo_equals_its_formula(base, pairs, tmp_path):
    """The loss by hand: log-probabilities of whole answers under policy and base, one sequence at a time."""
    task = DpoTask(dpo_config(base, pairs, tmp_path))
    model = task.build_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    batch = tensors(task.reader(0, 0, 1))
    reference = load_model(base)

    def answer_log_probability(net: nn.Module, tokens: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        scores = net(tokens[None, :-1].long())[0].log_softmax(-1)
        return scores[torch.arange(len(tokens) - 1), tokens[1:].long()][trained[1:].bool()].sum()

    expected = 0.0
    for row in range(len(batch["tokens"])):
        ratios = [
            answer_log_probability(model, batch["tokens"][row, side], batch["trained"][row, side])
            - answer_log_probability(reference, batch["tokens"][row, side], batch["trained"][row, side])
            for side in (0, 1)
        ]
        expected -= torch.nn.functional.logsigmoid(0.2 * (ratios[0] - ratios[1])).item()
    assert task.loss(model, batch).item() == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def aligned(base, pairs, tmp_path_factory) -> tuple[DpoConfig, Path]:
    """A DPO run as the verb leaves it, but for Ray; a base of a relative path, as one types it."""
    config = dpo_config(Path(os.path.relpath(base)), pairs, tmp_path_factory.mktemp("runs"))
    run = Path(config.output_dir) / config.name

    def train(config: DpoConfig, progress: object) -> Path:
        write_json(run / "config.json", {**to_dict(config), "kind": "dpo"})
        return fit(DpoTask(config), run, config.loop, config.optimizer, LocalContext()).checkpoint

    finetune(config, train)
    return config, run


def test_a_run_with_adapters_leaves_them_as_peft_does_and_on_their_base_they_are_the_merged_model(
    aligned, base, tmp_path
):
    config, run = aligned
    assert {file.name for file in (run / "adapter").iterdir()} == {MANIFEST, CONFIG, WEIGHTS}
    assert read_json(run / "adapter" / CONFIG)["base_model_name_or_path"] == str(base)  # from any folder
    merged = export(run / "checkpoints" / "step-00000008", config, tmp_path / "merged", torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert (bare(tokens).logits - wanted).abs().max() > 0.2
        adapted = PeftModel.from_pretrained(bare, str(run / "adapter"))
        assert (adapted(tokens).logits - wanted).abs().max() <= 1e-4
        named = AutoPeftModelForCausalLM.from_pretrained(str(run / "adapter"), dtype=torch.float32)  # finds its base
        assert (named(tokens).logits - wanted).abs().max() <= 1e-4
    gguf = tmp_path / "base.gguf"
    convert(base, gguf, "F32")
    with GgufModel(gguf, adapters={"dpo": convert_adapter(run / "adapter", gguf, tmp_path / "dpo.gguf")}) as model:
        model.use_adapter("dpo")
        assert np.abs(model.logits(tokens[0].tolist()) - wanted[0].numpy()).max() <= 0.05  # 16-bit keys and values


def test_an_adapter_is_exported_once_and_again_where_it_is_torn_or_its_base_has_moved(aligned, base, tmp_path):
    config, run = aligned
    checkpoint, folder = run / "checkpoints" / "step-00000008", tmp_path / "adapter"
    first = file_hash(export_adapter(checkpoint, config, folder) / WEIGHTS)
    (folder / "note").touch()
    assert (export_adapter(checkpoint, config, folder) / "note").exists()  # left as it was
    (folder / MANIFEST).unlink()
    (folder.parent / f".{folder.name}.unfinished").touch()  # as one that was killed has left it
    assert file_hash(export_adapter(checkpoint, config, folder) / WEIGHTS) == first
    assert damage(folder) is None and not (folder / "note").exists()
    moved = shutil.copytree(base, tmp_path / "moved")
    export_adapter(checkpoint, dataclasses.replace(config, base=str(moved)), folder)
    assert read_json(folder / CONFIG)["base_model_name_or_path"] == str(moved)


def test_a_run_without_adapters_has_none_to_export(base, conversations, tmp_path):
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.lora is None"):
        export_adapter(tmp_path, sft_config(base, conversations, tmp_path), tmp_path / "adapter")


def test_dpo_without_adapters_is_refused_with_its_reason():
    with pytest.raises(ConfigError, match="reference model"):
        DpoConfig(name="dpo", base="base", data="data", lora=None)


def test_a_base_that_is_no_model_is_one_error(tmp_path, conversations):
    with pytest.raises(ConfigError):
        SftTask(sft_config(tmp_path, conversations, tmp_path))


def test_a_task_is_known_by_its_base_its_adapters_and_its_examples(base, conversations, pairs, tmp_path):
    config = sft_config(base, conversations, tmp_path)
    identity = SftTask(config).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["model"]["hidden_size"] == 128 and identity["lora"] is None
    copy, shorter = shutil.copytree(base, tmp_path / "copy"), tmp_path / "shorter.jsonl"
    shorter.write_text("".join(conversations.read_text().splitlines(keepends=True)[1:]))
    tiny_model(tmp_path / "other", seed=1)

    def changed(**changes) -> list[str]:
        now = SftTask(dataclasses.replace(config, **changes)).identity()
        return [name for name in identity if identity[name] != now[name]]

    assert changed(base=str(copy), name="again", micro_batch_size=1) == []
    assert changed(base=str(tmp_path / "other")) == ["base"]
    assert changed(lora=LoraConfig()) == ["lora"]
    assert changed(data=str(shorter)) == ["data"]
    assert changed(batch_size=4) == ["plan", "data"]
    dpo = dpo_config(base, pairs, tmp_path)
    sharper = DpoTask(dataclasses.replace(dpo, beta=0.5)).identity()
    assert [name for name, value in DpoTask(dpo).identity().items() if value != sharper[name]] == ["beta"]
