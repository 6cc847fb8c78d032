"""What a run folder holds: every artifact that a report shows, empty where the run has not made it.

Two kinds of folder read the same way: a whole pipeline (`documents/`, `pretrain/`, `gguf/` and the rest below it), and
one training run (`metrics.jsonl` and `config.json` at its top).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from danube_ray.artifacts import MANIFEST, ArtifactError, read_json, read_json_lines
from danube_ray.config import ModelConfig

Row = dict[str, Any]

QUANTIZATION = "quantization.json"


@dataclass(frozen=True)
class Training:
    """One run of the training loop: its resolved configuration, and what it logged, in the order of its steps.

    `guard` compares FP8 with bf16, `events` say what happened to the run, `samples` what the model wrote.
    """

    config: Row
    train: list[Row]
    validation: list[Row]
    guard: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)

    @property
    def stages(self) -> list[Row]:
        """Stages of a pretraining run; fine-tuning has none."""
        return self.config.get("stages") or []

    @property
    def sources(self) -> list[str]:
        """Every source of the stages."""
        return list(dict.fromkeys(source for stage in self.stages for source in stage["shares"]))

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run as planned; fine-tuning's configuration doesn't say."""
        batch_tokens = self.config.get("global_batch_tokens")
        return round(sum(stage["tokens"] for stage in self.stages) / batch_tokens) if batch_tokens else None

    @property
    def unfinished(self) -> bool:
        return self.num_steps is not None and self.train[-1]["step"] < self.num_steps

    def tokens_at(self, step: int) -> float:
        """Tokens trained after `step` steps: the batch stays constant."""
        return step * self.train[-1]["tokens"] / self.train[-1]["step"]

    @property
    def num_parameters(self) -> int | None:
        """Weights of the model, or None where the configuration isn't one that this version knows."""
        model = self.config.get("model")
        known = {item.name for item in dataclasses.fields(ModelConfig)}
        return ModelConfig(**model).num_parameters if isinstance(model, dict) and set(model) == known else None


@dataclass(frozen=True, kw_only=True)
class RunArtifacts:
    """Everything a report shows of one run folder."""

    folder: Path
    steps: list[Row] = field(default_factory=list)
    pretraining: Training | None = None
    mixture: dict[str, dict[str, Row]] = field(default_factory=dict)
    curation: dict[str, Row] = field(default_factory=dict)
    posttraining: dict[str, Training] = field(default_factory=dict)
    results: list[Row] = field(default_factory=list)
    perplexity: Row = field(default_factory=dict)
    quantization: list[Row] = field(default_factory=list)
    trials: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    provenance: Row = field(default_factory=dict)
    configs: dict[str, Row] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def sources(self) -> list[str]:
        """Every source named anywhere, in the order the pipeline meets them: each keeps one colour on the page."""
        named = [*self.curation]
        if self.pretraining:
            named += self.pretraining.sources
            named += [source for row in self.pretraining.validation for source in row.get("by_source", {})]
        return list(dict.fromkeys(named))


def read_run(folder: Path) -> RunArtifacts:
    """Read a run folder; `ArtifactError` when it isn't there, holds nothing to show, or a file in it is torn."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: name a run, for example runs/demo")
    trainings = {name: read_training(folder / name) for name in ("", "pretrain", "sft", "dpo")}
    found = {name or folder.resolve().name: training for name, training in trainings.items() if training}
    results, perplexity = read_evaluation(folder / "evaluation")
    pretraining = next((training for training in found.values() if training.stages), None)
    run = RunArtifacts(
        folder=folder,
        steps=optional(folder / "steps.json", []),
        pretraining=pretraining,
        mixture=optional(folder / "pretrain" / "mixture.json", {}) or optional(folder / "mixture.json", {}),
        curation=optional(folder / "documents" / MANIFEST, {}).get("counts", {}),
        posttraining={name: training for name, training in found.items() if training is not pretraining},
        results=results,
        perplexity=perplexity,
        quantization=optional(folder / "gguf" / QUANTIZATION, []) or optional(folder / QUANTIZATION, []),
        trials=optional(folder / "search" / "trials.json", []) or optional(folder / "trials.json", []),
        samples=optional(folder / "samples.json", []),
        provenance=read_provenance(folder),
        configs={name: training.config for name, training in found.items() if training.config},
    )
    shown = (run.steps, found, run.curation, run.results, run.perplexity, run.quantization, run.trials, run.samples)
    if not any(shown):
        raise ArtifactError(f"{folder} holds nothing to report: neither steps.json, metrics.jsonl nor a finished step")
    return run


def optional(path: Path, missing: Any) -> Any:
    return read_json(path) if path.is_file() else missing


def read_training(folder: Path) -> Training | None:
    """The training run in `folder`, or None where none has logged a step."""
    rows = read_json_lines(folder / "metrics.jsonl")
    train, validation, guard = (rows_by_step(rows, kind) for kind in ("train", "validation", "guard"))
    if not train:
        return None
    return Training(
        config=optional(folder / "config.json", {}),
        train=train,
        validation=validation,
        guard=guard,
        events=read_json_lines(folder / "events.jsonl"),
        samples=read_json_lines(folder / "samples.jsonl"),
    )


def rows_by_step(rows: list[Row], kind: str) -> list[Row]:
    """Rows of one kind in step order, once each: a resumed run repeats steps, and the later row is the one that counts.

    A loss that is not finite can't be drawn and is left out; the run that logged one has failed there anyway.
    """
    last = {row["step"]: row for row in rows if row.get("kind") == kind and math.isfinite(row["loss"])}
    return [last[step] for step in sorted(last)]


def read_provenance(folder: Path) -> Row:
    """Revision and versions: each training run records its own, and a pipeline's were all made in one place."""
    found = (optional(folder / part / "provenance.json", {}) for part in ("", "pretrain", "sft", "dpo"))
    return next((stated for stated in found if stated), {})


def read_evaluation(folder: Path) -> tuple[list[Row], Row]:
    """Task results, with perplexity by source among them, and the validation loss against the unigram entropy."""
    results, measured = optional(folder / "results.json", []), optional(folder / "perplexity.json", {})
    if "unigram_entropy" in measured:
        return results, measured
    by_source = [
        {"task": source, "metric": "perplexity", "value": row["value"], "stderr": row["error"], "n": row["tokens"]}
        for source, row in measured.items()
    ]
    return results + by_source, {}
