"""One GPU's share of one optimizer step: what memory and time are computed from."""

from __future__ import annotations

from dataclasses import dataclass

from danube_ray.config import FP8_SCALINGS, LoopConfig, ModelConfig, require, require_positive
from danube_ray.planner.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class Work:
    """`windows` sequences through `model`, `micro_batch_size` at a time, then an update; `num_gpus` do alike.

    `model` is as the stage trains it (`RunConfig.model_in`); `loop.num_workers` is not read.
    """

    model: ModelConfig
    loop: LoopConfig
    sequence_length: int
    micro_batch_size: int
    windows: int
    num_gpus: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "sequence_length", "micro_batch_size", "windows", "num_gpus")

    @property
    def micro_batch_tokens(self) -> int:
        return min(self.micro_batch_size, self.windows) * self.sequence_length

    @property
    def tokens(self) -> int:
        return self.windows * self.sequence_length

    @property
    def num_micro_batches(self) -> int:
        return -(-self.windows // self.micro_batch_size)

    @property
    def shards(self) -> int:
        """GPUs that share one copy of what ZeRO spreads."""
        return 1 if self.loop.parallelism == "ddp" else self.num_gpus

    @property
    def zero_stage(self) -> int:
        """1 to 3, or 0 for DDP."""
        return 0 if self.loop.parallelism == "ddp" else int(self.loop.parallelism.removeprefix("zero"))

    @property
    def linear_parameters(self) -> int:
        """Weights of attention's and the MLPs' projections: what FP8 computes."""
        return self.model.num_layers * self.model.num_layer_linear_parameters

    @property
    def head_parameters(self) -> int:
        return self.model.vocab_size * self.model.hidden_size


def check_hardware(loop: LoopConfig, gpu: Hardware) -> None:
    """Raise `ConfigError` for a precision that `gpu` does not compute."""
    remedy = "plan --loop.precision bf16, fp8-te or fp8-torchao instead"
    require(loop.precision != "fp8-emulated", "LoopConfig.precision", loop.precision, "one that GPUs compute", remedy)
    computes = gpu.has_fp8 or loop.precision not in FP8_SCALINGS
    setting, allowed = f"LoopConfig.precision on {gpu.name}", "bf16 or fp32: it has no FP8"
    require(computes, setting, loop.precision, allowed, "plan with --loop.precision bf16")
