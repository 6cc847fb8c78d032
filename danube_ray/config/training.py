"""How a model is optimized, and how the training loop runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danube_ray.config.check import require, require_choices, require_positive

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

    Args:
        learning_rate: the peak, after the warm-up.
        min_learning_rate: what the schedule ends at.
        warmup_steps: steps of a linear rise from zero.
        schedule: after the warm-up; wsd holds the peak and lowers it linearly at the end (Hu et al., 2024).
        decay_fraction: of the steps, in which wsd lowers the learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled, on matrices.
        max_grad_norm: gradients of a larger norm are clipped to it.
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
        require_choices(self)
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

    A bad step has a loss or gradient that is no number or, with `spike_deviations` set, a loss far above the recent
    ones.

    Args:
        num_workers: processes that share each batch, one for each GPU; their number changes no batch.
        min_workers: elastic: a run that loses a node goes on with as few, and grows again. None: it waits for all.
        cpus_per_worker: CPUs that Ray sets aside for each, and threads of one without a GPU.
        parallelism: ddp, or DeepSpeed's ZeRO stage 1, 2 or 3 where a model outgrows one GPU; checkpoints are the same.
        precision: of the products; weights and moments are fp32. fp8-te wants Hopper, fp8-emulated is for tests.
        fp8_scaling: how tensors are scaled into FP8; None is current. fp8-te: current, delayed, block; fp8-torchao:
            current, rowwise; fp8-emulated: current, delayed.
        fp8_guard_every_steps: how often FP8 is compared with bf16 on the same held-out batches; 0: never.
        fp8_guard_max_gap: FP8's loss may be so much above bf16's, relative.
        fp8_guard_action: beyond that gap: warn, or go on in bf16.
        attention: auto takes the best that the machine has.
        activation_checkpointing: keep each layer's input and compute the rest again: less memory, a third slower.
        compile: compile each layer; under fp8-te, whose products can't be compiled, what lies between them.
        deterministic: the same bits on a GPU every time, slower.
        seed: of the weights and of the data's order.
        log_every_steps: steps between lines of metrics.
        validate_every_steps: steps between validations.
        checkpoint_every_steps: steps between checkpoints, which are written beside the training.
        keep_checkpoints: so many of the newest stay.
        milestone_every_steps: checkpoints of these steps stay for ever; 0: none.
        on_bad_step: stop the run, skip the update, or roll back to the last good checkpoint (a step that is bad twice
            is skipped).
        spike_deviations: a loss so many standard deviations above the recent mean is bad; None: none is.
        max_bad_steps: after so many the run stops.
        skip_steps: passed over without training, counted from 1 as in the metrics.
        hang_timeout_s: seconds after which a worker without progress is named and ended.
        max_restarts: how often the run goes on by itself after a failure.
        tracker: shows the run beside TensorBoard and the report; keys and servers come from the environment.
        profile_steps: steps that torch's profiler records, after a few warm ones, to the run's profile/; 0: none.
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
        require_choices(self)
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
