"""A pretraining run and its stages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from danube_ray.config.check import require, require_positive, valid_name
from danube_ray.config.model import ModelConfig
from danube_ray.config.training import LoopConfig, OptimizerConfig

QUALITY_BOUNDS = (0.0, 0.25, 0.5, 0.75)  # the least quality in each of the buckets that a source is parted in


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of pretraining: how many tokens, at what sequence length, from which sources.

    The exported model has the last stage's window and RoPE base.

    Args:
        name: what logs and reports call it.
        tokens: to train on.
        sequence_length: tokens a window.
        micro_batch_size: windows that a worker computes at a time; gradients of several are added up.
        shares: integer weights of the sources' windows: web=906,wiki=94 is 90.6 % web.
        min_quality: by source: documents scored below it are left out; 0, 0.25, 0.5 or 0.75.
        sliding_window: tokens that attention sees in this stage; None: all, model: as the model.
        rope_theta: RoPE's base in this stage; model: as the model.
        learning_rate_scale: times the schedule's learning rate.
    """

    name: str
    tokens: int
    sequence_length: int
    micro_batch_size: int
    shares: dict[str, int]
    min_quality: dict[str, float] = field(default_factory=dict)
    sliding_window: int | Literal["model"] | None = "model"
    rope_theta: float | Literal["model"] = "model"
    learning_rate_scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "tokens", "sequence_length", "micro_batch_size", "learning_rate_scale")
        if isinstance(self.sliding_window, int):
            setting = f"StageConfig.sliding_window of stage {self.name!r}"
            allowed = f"between 1 and sequence_length={self.sequence_length}, or None"
            require(0 < self.sliding_window <= self.sequence_length, setting, self.sliding_window, allowed)
        if not isinstance(self.rope_theta, str):
            require_positive(self, "rope_theta")
        setting = f"StageConfig.shares of stage {self.name!r}"
        require(bool(self.shares), setting, self.shares, "at least one source")
        for source, share in self.shares.items():
            require(isinstance(share, int) and share > 0, setting, {source: share}, "positive integers")
        for source, quality in self.min_quality.items():
            setting = f"StageConfig.min_quality of stage {self.name!r}"
            require(source in self.shares, setting, source, f"a source of the stage: {', '.join(self.shares)}")
            allowed = f"one of {', '.join(f'{bound:g}' for bound in QUALITY_BOUNDS)}"
            remedy = "shards part a source's documents by quarters of the scale"
            require(quality in QUALITY_BOUNDS, setting, {source: quality}, allowed, remedy)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run: a model, its stages, and how to train it.

    Args:
        name: of the run's folder; the same name goes on with a run that was stopped.
        global_batch_tokens: tokens a step, of all workers together; the same in every stage while the window grows.
        max_epochs: how often a source may be seen; past about four, repeated text teaches little (Muennighoff et al.,
            2023).
        validation_windows: held-out windows of each source that a validation scores.
        init_from: a Hugging Face folder whose weights the run begins with; step, optimizer and data begin anew.
        sample_prompts: texts that the model continues at every validation; they need --tokenizer.
        tokenizer: the folder of the tokenizer that made the token shards.
        tokens_dir: the folder of token shards, with a folder for each source.
        output_dir: where the run's folder goes.
    """

    name: str
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    global_batch_tokens: int
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    max_epochs: float = 4.0
    validation_windows: int = 64
    init_from: str | None = None
    sample_prompts: tuple[str, ...] = ()
    tokenizer: str | None = None
    tokens_dir: str = "data/tokens"
    output_dir: str = "runs"

    def __post_init__(self) -> None:
        require_positive(self, "global_batch_tokens", "max_epochs", "validation_windows")
        require(valid_name(self.name), "RunConfig.name", self.name, "letters, digits, '.', '_' and '-'")
        require(bool(self.stages), "RunConfig.stages", self.stages, "at least one stage")
        for stage in self.stages:
            where = f"sequence_length of stage {stage.name!r}"
            length = stage.sequence_length
            require(length <= self.model.context_length, where, length, f"at most {self.model.context_length}")
            divides = self.longest_sequence % length == 0
            require(divides, where, length, f"a divisor of the longest stage's {self.longest_sequence}")
            fits = self.global_batch_tokens % length == 0
            require(fits, where, length, f"a divisor of global_batch_tokens={self.global_batch_tokens}")
        if self.sample_prompts:
            remedy = "the folder of the tokenizer that made the token shards"
            require(self.tokenizer is not None, "RunConfig.tokenizer", None, "a folder with sample_prompts", remedy)
        for stage, begin, end in zip(self.stages, (0, *self.stage_ends), self.stage_ends, strict=False):
            allowed = f"enough for a step of global_batch_tokens={self.global_batch_tokens}"
            require(begin < end, f"tokens of stage {stage.name!r}", stage.tokens, allowed)

    @property
    def longest_sequence(self) -> int:
        return max(stage.sequence_length for stage in self.stages)

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The step at which each stage ends: cumulative tokens over the batch, rounded, so that no rounding adds up."""
        ends, tokens = [], 0
        for stage in self.stages:
            tokens += stage.tokens
            ends.append(round(tokens / self.global_batch_tokens))
        return tuple(ends)

    @property
    def num_steps(self) -> int:
        return self.stage_ends[-1]

    def stage_at(self, step: int) -> int:
        """Index of the stage that trains `step` (0-based)."""
        return next(index for index, end in enumerate(self.stage_ends) if step < end)

    def model_in(self, stage: StageConfig) -> ModelConfig:
        """The model as `stage` trains it: with its window and its RoPE base."""
        changes: dict[str, Any] = {}
        if stage.sliding_window != "model":
            changes["sliding_window"] = stage.sliding_window
        if stage.rope_theta != "model":
            changes["rope_theta"] = stage.rope_theta
        return dataclasses.replace(self.model, **changes)

    @property
    def final_model(self) -> ModelConfig:
        """The model as the last stage leaves it."""
        return self.model_in(self.stages[-1])
