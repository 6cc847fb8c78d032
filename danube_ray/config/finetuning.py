"""Post-training runs."""

from __future__ import annotations

from dataclasses import dataclass

from danube_ray.config.check import require, require_positive, valid_name
from danube_ray.config.training import LoopConfig, OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on every linear of attention and MLP (Danube: rank 4, alpha 16 for DPO).

    Args:
        rank: of the two factors.
        alpha: the adapter counts alpha / rank times.
        dropout: of the adapter's input.
    """

    rank: int = 4
    alpha: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "rank", "alpha")
        require(0 <= self.dropout < 1, "LoraConfig.dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Post-training of a Hugging Face folder on rows of conversations or pairs.

    Args:
        name: of the run's folder; the same name goes on with a run that was stopped.
        base: the Hugging Face folder to start from.
        data: a .jsonl or .parquet file: messages, or prompt and response; for DPO prompt, chosen and rejected.
        epochs: times that the data is seen.
        batch_size: conversations or pairs a step, of all workers together.
        micro_batch_size: of these, what a worker computes at a time.
        max_length: tokens of a row: longer ones lose their oldest exchanges, then their end. None: the base's context.
        lora: adapters instead of all weights: lora:lora-config at the end turns them on, lora:none off.
        output_dir: where the run's folder goes.
    """

    name: str
    base: str
    data: str
    epochs: float = 1.0
    batch_size: int = 8
    micro_batch_size: int = 1
    max_length: int | None = None
    lora: LoraConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, min_learning_rate=0.0, warmup_steps=20)
    loop: LoopConfig = LoopConfig()
    output_dir: str = "runs"

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "batch_size", "micro_batch_size")
        require(valid_name(self.name), "FinetuneConfig.name", self.name, "letters, digits, '.', '_' and '-'")
        if self.max_length is not None:
            require_positive(self, "max_length")


@dataclass(frozen=True, kw_only=True)
class DpoConfig(FinetuneConfig):
    """Direct preference optimisation (Rafailov et al., 2023) with the reports' beta of 0.2 and LoRA of rank 4.

    Args:
        beta: how much a departure from the base costs.
    """

    beta: float = 0.2
    batch_size: int = 2
    lora: LoraConfig | None = LoraConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")
        require(
            self.lora is not None,
            "DpoConfig.lora",
            self.lora,
            "a LoraConfig",
            "the frozen base under the adapters is DPO's reference model",
        )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(FinetuneConfig):
    """Training of an encoder of any shape, the Hugging Face folder `base`, to tell labelled passages apart."""

    batch_size: int = 16
    micro_batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lora is None, "EncoderConfig.lora", self.lora, "None", "an encoder is trained whole")
