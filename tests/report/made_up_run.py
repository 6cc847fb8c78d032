"""Run folders as the pipeline writes them, made up: three stages with noise and a spike, and every other artifact."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from danube_ray.artifacts import append_json_lines, commit, write_json
from danube_ray.config import DpoConfig, FinetuneConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig, to_dict

SOURCES = ("licences", "docstrings", "documentation")
SHAPE = ModelConfig(
    vocab_size=2_048,
    hidden_size=128,
    intermediate_size=344,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    context_length=512,
)
STAGES = (
    ("broad", 720_000, 128, (60, 30, 10)),
    ("cleaner", 400_000, 256, (30, 40, 30)),
    ("cleanest", 190_000, 512, (10, 30, 60)),
)
RUN = RunConfig(
    name="pretrain",
    model=SHAPE,
    stages=tuple(
        StageConfig(
            name=name,
            tokens=tokens,
            sequence_length=length,
            micro_batch_size=8,
            shares=dict(zip(SOURCES, shares, strict=True)),
        )
        for name, tokens, length, shares in STAGES
    ),
    global_batch_tokens=8_192,
    optimizer=OptimizerConfig(learning_rate=3e-3, min_learning_rate=1.5e-4, warmup_steps=12),
)

DROPPED = {
    "licences": {"duplicate": 310, "too_short": 96, "few_stop_words": 41},
    "docstrings": {"too_short": 402, "symbol_ratio": 55, "duplicate": 23},
    "documentation": {"too_short": 61, "bullet_lines": 88, "ellipsis_lines": 12},
}
KEPT = {"licences": 512, "docstrings": 2_804, "documentation": 1_377}
QUARANTINED = {"licences": {}, "docstrings": {}, "documentation": {"not_utf8": 9}}

LEVELS = (  # level, bytes, bits a weight, perplexity, KL divergence (mean, 99th percentile), same top, tokens/s
    ("Q8_0", 1_210_000, 8.51, 29.15, 2.2e-5, 1e-4, 0.9962, 2_480),
    ("F16", 2_260_000, 16.0, 29.14, 1e-9, 2e-8, 0.9998, 1_870),
    ("Q4_K_M", 742_000, 5.02, 29.31, 0.00103, 0.0101, 0.9658, 2_910),
)
RESULTS = (  # task, metric, value, standard error, examples
    ("summary_choice", "acc,none", 0.4375, 0.0301, 272),
    ("summary_choice", "acc_norm,none", 0.4706, 0.0303, 272),
    ("validation", "perplexity", 29.14, 0.41, 64),
)
TRIALS = ((1e-3, 8, 5.21), (3e-3, 8, 4.87), (1e-2, 12, float("nan")), (6e-3, 4, 4.93))  # rate, warm-up steps, loss
STEPS: tuple[tuple[str, str, float, dict[str, Any]], ...] = (  # name and folder, title, seconds, facts
    ("text", "Collect text", 6.2, {"files": 4_211, "text_bytes": 11_600_000}),
    ("documents", "Curate documents", 14.8, {"read": 5_790, "kept": 4_693, "kept_bytes": 11_263_200}),
    ("tokens", "Train the tokenizer, write shards", 9.1, {"vocabulary": 2_048, "tokens": 3_204_118}),
    ("search", "Search learning rates on a proxy", 31.0, {"trials": 4, "best_learning_rate": 0.003}),
    ("pretrain", "Pretrain", 92.4, {"parameters": SHAPE.num_parameters, "tokens": 1_310_720}),
    ("sft", "Fine-tune on instructions", 18.3, {"conversations": 1_120, "truncated": 3}),
    ("dpo", "Align on preferences", 12.0, {"pairs": 120}),
    ("gguf", "Quantize", 7.7, {"levels": ["F16", "Q8_0", "Q4_K_M"]}),
)
SAMPLES = (
    (
        "What does os.path.join do?",
        "Join two or more pathname components, inserting '/' as needed.\n"
        "If any component is an absolute path, all previous path components will be discarded.",
    ),
    ("Write the signature of a function that returns the length of a list.", "len(obj, /)"),
)
EVENTS = (
    (40, "stopped", "asked to stop: signal SIGTERM"),
    (61, "rollback", "loss nan and gradient norm nan"),
    (61, "skip", "loss nan and gradient norm nan"),
)
CONTINUATIONS = (
    ("The licence grants", " you the right to use, copy and modify the software, provided that this notice is kept"),
    ("def main():", "\n    parser = argparse.ArgumentParser()\n    parser.add_argument('--out')"),
)
VERSIONS = {"danube-ray": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "transformers": "5.23.0", "gguf": "0.19.0"}


def train_row(step: int, loss: float, learning_rate: float, **changed: Any) -> dict[str, Any]:
    """One logged training step, in the form that the loop writes."""
    stage = RUN.stages[RUN.stage_at(min(step, RUN.num_steps) - 1)]
    row = {
        "kind": "train",
        "step": step,
        "tokens": step * RUN.global_batch_tokens,
        "stage": stage.name,
        "sequence_length": stage.sequence_length,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": math.exp(random.gauss(-0.4, 0.25)),
        "tokens_per_s": random.gauss(21_000, 600),
        "data_wait_share": abs(random.gauss(0.004, 0.002)),
        "step_s": 0.39,
        "time": 1_763_769_600 + step,
    }
    return {**row, **changed}


def write_pretraining(folder: Path, steps: int = RUN.num_steps) -> None:
    """Three stages, logged every step and validated every twenty, noise and a spike; or the first of their steps."""
    random.seed(7)
    peak, low, warmup = RUN.optimizer.learning_rate, RUN.optimizer.min_learning_rate, RUN.optimizer.warmup_steps
    rows = []
    for step in range(1, steps + 1):
        progress = (step - warmup) / (RUN.num_steps - warmup)
        rate = peak * step / warmup if step < warmup else low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2
        mean = 3.55 + 4.1 * math.exp(-step / 14) + 0.75 * math.exp(-step / 70) - 0.1 * RUN.stage_at(step - 1)
        spike = 0.5 if step in (61, 62) else 0.0
        row = train_row(step, mean + spike + random.gauss(0, 0.06), rate)
        rows.append(row)
        if step % 20 == 0 or step == steps:
            by_source = {source: mean + gap for source, gap in zip(SOURCES, (-0.35, 0.12, 0.3), strict=True)}
            where = {key: row[key] for key in ("step", "tokens", "stage")}
            rows.append({"kind": "validation", **where, "loss": sum(by_source.values()) / 3, "by_source": by_source})
    folder.mkdir(parents=True)
    append_json_lines(folder / "metrics.jsonl", rows)
    write_json(folder / "config.json", to_dict(RUN))


def write_gpu_run(folder: Path, steps: int) -> None:
    """A run on GPUs as far as `steps`: utilisation, memory, network, FP8's guard, events and samples as well."""
    write_pretraining(folder, steps)
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train":
            slower = 1 - 0.04 * RUN.stage_at(row["step"] - 1)
            row["tokens_per_s"] = random.gauss(455_000, 2_500) * slower
            row["mfu"] = row["tokens_per_s"] / 455_000 * 0.52
            row["memory_bytes"] = 61.2e9 if row["step"] < 40 else 66.8e9
            row["communication_share"] = abs(random.gauss(0.031, 0.004))
            row["grad_norm"] *= 14 if row["step"] in (61, 62) else 1
    guard = [
        {"kind": "guard", "step": step, "loss": 3.0, "loss_bf16": 2.98, "gap": random.gauss(0.003, 0.002)}
        for step in range(10, steps, 10)
    ]
    metrics.write_text("")
    append_json_lines(metrics, rows + guard)
    append_json_lines(folder / "events.jsonl", [
        {"time": 1_763_769_600 + step, "step": step, "event": event, "detail": detail} for step, event, detail in EVENTS
    ])  # fmt: skip
    append_json_lines(folder / "samples.jsonl", [
        {"step": step, "tokens": step * RUN.global_batch_tokens, "prompt": prompt, "continuation": f"{text} ({step})"}
        for step in range(20, steps + 1, 20) for prompt, text in CONTINUATIONS
    ])  # fmt: skip


def write_finetuning(folder: Path, config: FinetuneConfig, start: float, end: float, steps: int) -> None:
    """A fine-tuning run whose loss falls from `start` to `end`."""
    random.seed(steps)
    rows = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-step / (steps / 4)) + random.gauss(0, 0.05)
        rows.append(train_row(step, loss, 1e-4 * (1 - step / steps), tokens=step * 900, stage=config.name))
    folder.mkdir(parents=True)
    append_json_lines(folder / "metrics.jsonl", rows)
    write_json(folder / "config.json", to_dict(config))


def write_curation(folder: Path) -> None:
    counts = {}
    for source, kept in KEPT.items():
        dropped, quarantined = sum(DROPPED[source].values()), sum(QUARANTINED[source].values())
        counts[source] = {
            "read": kept + dropped + quarantined,
            "kept": kept,
            "dropped": dropped,
            "quarantined": quarantined,
            "kept_bytes": kept * 2_400,
            "dropped_by": DROPPED[source],
            "quarantined_by": QUARANTINED[source],
        }
    folder.mkdir(parents=True)
    commit(folder, inputs="0" * 64, counts=counts)


def write_mixture(path: Path) -> None:
    epochs = {str(source): 0.0 for source in SOURCES}
    mixture: dict[str, dict[str, Any]] = {}
    for stage in RUN.stages:
        for source, share in stage.shares.items():
            tokens = stage.tokens * share // sum(stage.shares.values())
            epochs[source] += tokens / 400_000
            mixture.setdefault(stage.name, {})[source] = {"tokens": tokens, "epochs": round(epochs[source], 3)}
    write_json(path, mixture)


def write_demo(folder: Path) -> Path:
    """A finished pipeline with every artifact that the report knows."""
    write_curation(folder / "documents")
    write_pretraining(folder / "pretrain")
    write_mixture(folder / "pretrain" / "mixture.json")
    sft = FinetuneConfig(name="sft", base="runs/demo/pretrain/model", data="runs/demo/chat/train.jsonl")
    write_finetuning(folder / "sft", sft, 4.2, 2.6, 140)
    dpo = DpoConfig(name="dpo", base="runs/demo/sft/model", data="runs/demo/chat/pairs.jsonl")
    write_finetuning(folder / "dpo", dpo, 0.69, 0.43, 60)
    levels = [
        {
            "level": level,
            "file": f"danube-{level}.gguf",
            "bytes": size_bytes,
            "bits_per_weight": bits,
            "perplexity": perplexity,
            "perplexity_error": 0.41,
            "kld_mean": mean,
            "kld_p99": tail,
            "same_top": same_top,
            "tokens_per_s": speed,
        }
        for level, size_bytes, bits, perplexity, mean, tail, same_top, speed in LEVELS
    ]
    write_json(folder / "gguf" / "quantization.json", levels)
    results = [dict(zip(("task", "metric", "value", "stderr", "n"), row, strict=True)) for row in RESULTS]
    write_json(folder / "evaluation" / "results.json", results)
    improvement = {"validation_loss": 3.372, "unigram_entropy": 5.948, "improvement": 1 - 3.372 / 5.948}
    write_json(folder / "evaluation" / "perplexity.json", improvement)
    trials = [
        {"config": {"learning_rate": rate, "warmup_steps": warmup, "hidden_size": 64}, "loss": loss}
        for rate, warmup, loss in TRIALS
    ]
    write_json(folder / "search" / "trials.json", trials)
    samples = [{"prompt": prompt, "answer": answer, "model": "demo Q4_K_M"} for prompt, answer in SAMPLES]
    write_json(folder / "samples.json", samples)
    steps = [
        {
            "name": name,
            "title": title,
            "seconds": s,
            "skipped": name == "text",
            "facts": facts,
            "path": str(folder / name),
        }
        for name, title, s, facts in STEPS
    ]
    write_json(folder / "steps.json", steps)
    made_by = {"git_revision": "4f0c2a9be1d7c55e8a3e6b0c9d2f417a5b6c8d90", "python": "3.11.9", "versions": VERSIONS}
    write_json(folder / "provenance.json", made_by)
    return folder
