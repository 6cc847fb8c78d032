"""How a model is optimized, and how the training loop runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danube_ray.config.check import require, require_positive

Precision = Literal["fp32", "bf16", "fp8-te", "fp8-torchao", "fp8-emulated"]
Fp8Scaling = Literal["current", "delayed", "block", "rowwise"]
AttentionBackend = Literal["auto", "flash", "te", "varlen", "flex", "sdpa"]
Parallelism = Literal["ddp", "zero1", "zero2", "zero3"]

# The ways to scale tensors into FP8 that each precision knows; the first is its default.
FP8_SCALINGS: dict[str, tuple[Fp8Scaling, ...]] = {
    "fp8-te": ("current", "delayed", "block"),
    "fp8-torchao": ("current", "rowwise"),
    "fp8-emulated": ("current", "delayed"),
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up and a schedule; defaults are Danube 1.8B's (report, section 3).

    `wsd` holds the learning rate after the warm-up and lowers it linearly to the minimum over the last
    `decay_fraction` of the steps (warm-up, stable, decay: Hu et al., 2024).
    """

    learning_rate: float = 2e-4
    min_learning_rate: float = 1e-5
    warmup_steps: int = 2_000
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "epsilon", "max_grad_norm")
        require(self.warmup_steps >= 0, "OptimizerConfig.warmup_steps", self.warmup_steps, "0 or more")
        require(self.weight_decay >= 0, "OptimizerConfig.weight_decay", self.weight_decay, "0 or more")
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            "OptimizerConfig.min_learning_rate",
            self.min_learning_rate,
            f"between 0 and learning_rate={self.learning_rate}",
        )
        require(0 < self.decay_fraction <= 1, "OptimizerConfig.decay_fraction", self.decay_fraction, "in (0, 1]")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"OptimizerConfig.{name}", value, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How the one training loop runs, whatever the task: workers, precision, and when it logs, validates and saves.

    Workers: with `min_workers` set, a run that loses a node goes on with as few, and grows again (elastic); the global
    batch stays the same. `parallelism` is DDP, or DeepSpeed's ZeRO stage 1, 2 or 3 where a model outgrows one GPU.

    FP8: `fp8_scaling` None takes the precision's default (`FP8_SCALINGS`). Every `fp8_guard_every_steps` steps (0:
    never) the same held-out batches are evaluated in bf16; where FP8's loss is more than `fp8_guard_max_gap` (relative)
    above it, the guard warns, or goes on in bf16.

    A bad step has a loss or gradient that is no number or, with `spike_deviations` set, a loss that many standard
    deviations above the recent mean. `on_bad_step` stops the run, skips the update, or rolls back to the last good
    checkpoint (a step that is bad twice is skipped); after `max_bad_steps` the run stops. `skip_steps`, counted from 1
    as in the metrics, are passed over without training. A worker without progress for `hang_timeout_s` is named and
    ended.

    `compile` compiles each layer; under fp8-te, whose products can't be compiled, what lies between them.

    `keep_checkpoints` newest checkpoints stay, and for ever those every `milestone_every_steps` (0: none).

    `tracker` shows the run in W&B or MLflow beside TensorBoard and the report; their keys and servers come from the
    environment. torch's profiler records `profile_steps` steps, after a few warm ones, to the run's `profile/`.
    """

    num_workers: int = 1
    min_workers: int | None = None
    cpus_per_worker: int = 1
    parallelism: Parallelism = "ddp"
    precision: Precision = "bf16"
    fp8_scaling: Fp8Scaling | None = None
    fp8_guard_every_steps: int = 0
    fp8_guard_max_gap: float = 0.02
    fp8_guard_action: Literal["warn", "bf16"] = "warn"
    attention: AttentionBackend = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = False
    seed: int = 1234
    log_every_steps: int = 10
    validate_every_steps: int = 500
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 3
    milestone_every_steps: int = 0
    on_bad_step: Literal["stop", "skip", "rollback"] = "skip"
    spike_deviations: float | None = None
    max_bad_steps: int = 10
    skip_steps: tuple[int, ...] = ()
    hang_timeout_s: float = 1_800.0
    max_restarts: int = 5
    tracker: Literal["none", "wandb", "mlflow"] = "none"
    profile_steps: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "num_workers", "cpus_per_worker", "log_every_steps", "validate_every_steps")
        require_positive(self, "checkpoint_every_steps", "keep_checkpoints", "fp8_guard_max_gap", "hang_timeout_s")
        counts = ("max_restarts", "max_bad_steps", "fp8_guard_every_steps", "milestone_every_steps", "profile_steps")
        for name in counts:
            value = getattr(self, name)
            require(value >= 0, f"LoopConfig.{name}", value, "0 or more")
        if self.min_workers is not None:
            allowed = f"between 1 and num_workers={self.num_workers}"
            require(1 <= self.min_workers <= self.num_workers, "LoopConfig.min_workers", self.min_workers, allowed)
        if self.spike_deviations is not None:
            require_positive(self, "spike_deviations")
        for step in self.skip_steps:
            require(step >= 1, "LoopConfig.skip_steps", step, "steps counted from 1")
        self._check_fp8()

    def _check_fp8(self) -> None:
        scalings = FP8_SCALINGS.get(self.precision, ())
        if self.fp8_scaling is not None:
            allowed = f"one of {', '.join(scalings)}" if scalings else "None without FP8"
            setting = f"LoopConfig.fp8_scaling of precision {self.precision}"
            require(self.fp8_scaling in scalings, setting, self.fp8_scaling, allowed)
        if self.fp8_guard_every_steps:
            remedy = "the guard compares FP8 with bf16"
            require(
                bool(scalings), "LoopConfig.fp8_guard_every_steps", self.fp8_guard_every_steps, "0 without FP8", remedy
            )
        if self.parallelism == "zero3":
            allowed = "a precision that is not FP8 under zero3"
            require(not scalings, "LoopConfig.precision", self.precision, allowed, "use zero1 or zero2, or bf16")
        if self.precision == "fp8-te" and self.fp8_scaling == "delayed":
            remedy = "use fp8_scaling current: delayed scales move on between a forward pass and its repetition"
            setting, allowed = "LoopConfig.activation_checkpointing", "False with delayed scaling of fp8-te"
            require(not self.activation_checkpointing, setting, self.activation_checkpointing, allowed, remedy)

    @property
    def scaling(self) -> Fp8Scaling | None:
        """How FP8 tensors are scaled; None without FP8."""
        return self.fp8_scaling or next(iter(FP8_SCALINGS.get(self.precision, ())), None)
