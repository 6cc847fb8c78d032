"""Every setting of a run, as frozen dataclasses that validate themselves and compute what follows from them.

A configuration is data: it imports neither torch nor ray, reads no file, and prints as JSON. Presets build them
(`danube_ray.presets`), the command line overrides single fields, and each run stores the resolved result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp8-te"]
AttentionBackend = Literal["auto", "sdpa"]

# `<unk>`, `<s>` and `</s>`, as in Llama's and Mistral's models. Shards, training and exported folders count on them.
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2


class ConfigError(ValueError):
    """A setting that can't be used. Says which, what it was, what is allowed and what to do."""

    def __init__(self, setting: str, value: object, allowed: str, remedy: str = "") -> None:
        super().__init__(f"{setting} is {value!r}, allowed is {allowed}" + (f"; {remedy}" if remedy else ""))
        self._parts = (setting, value, allowed, remedy)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        """Rebuilt from its parts: a worker raises it, the driver shows it."""
        return ConfigError, self._parts


def require(condition: bool, setting: str, value: object, allowed: str, remedy: str = "") -> None:
    """Raise `ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(setting, value, allowed, remedy)


def require_positive(owner: object, *names: str) -> None:
    """Raise `ConfigError` unless each named attribute of `owner` is greater than zero."""
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{type(owner).__name__}.{name}", value, "greater than 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama or Mistral decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases, untied head.

    With `sliding_window` set, a query sees itself and the `sliding_window - 1` tokens before it, as in Mistral.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        require_positive(self, "num_kv_heads", "head_dim", "context_length", "rope_theta", "rms_norm_eps")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "ModelConfig.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
            "query heads share key-value heads in equal groups",
        )
        require(self.head_dim % 2 == 0, "ModelConfig.head_dim", self.head_dim, "even", "RoPE rotates pairs")
        if self.sliding_window is not None:
            require_positive(self, "sliding_window")

    @property
    def num_layer_linear_parameters(self) -> int:
        """Weights of one layer's attention and MLP projections: those that FP8 computes."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, embeddings and head included."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        embeddings = 2 * self.vocab_size * self.hidden_size
        return embeddings + norms + self.num_layers * self.num_layer_linear_parameters

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOP per token (forward and backward): 6 per matmul weight plus causal, window-aware attention.

        The input embedding is a look-up and counts nothing. A query at position t scores min(t + 1, window) keys;
        both attention products cost 2 FLOP a multiply-add forward and twice that backward: 12 * heads * head_dim a key.
        """
        window = min(self.sliding_window or sequence_length, sequence_length)
        mean_keys = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
        matmul = self.num_layers * self.num_layer_linear_parameters + self.vocab_size * self.hidden_size
        return 6 * matmul + 12 * self.num_layers * self.num_heads * self.head_dim * mean_keys


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of pretraining: how many tokens, at what sequence length, from which sources.

    `shares` are integer weights of the sources' windows (`{"web": 906, "wiki": 94}` is 90.6 % web).
    `min_quality` leaves out a source's documents scored below it (0 to 1).
    """

    name: str
    tokens: int
    sequence_length: int
    micro_batch_size: int
    shares: dict[str, int]
    min_quality: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_positive(self, "tokens", "sequence_length", "micro_batch_size")
        setting = f"StageConfig.shares of stage {self.name!r}"
        require(bool(self.shares), setting, self.shares, "at least one source")
        for source, share in self.shares.items():
            require(isinstance(share, int) and share > 0, setting, {source: share}, "positive integers")
        for source, quality in self.min_quality.items():
            setting = f"StageConfig.min_quality of stage {self.name!r}"
            require(source in self.shares, setting, source, f"a source of the stage: {', '.join(self.shares)}")
            require(0 <= quality <= 1, setting, {source: quality}, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up and a cosine (or constant) schedule; defaults are Danube 1.8B's (report, section 3)."""

    learning_rate: float = 2e-4
    min_learning_rate: float = 1e-5
    warmup_steps: int = 2_000
    schedule: Literal["cosine", "constant"] = "cosine"
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
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"OptimizerConfig.{name}", value, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How the one training loop runs, whatever the task: workers, precision, and when it logs, validates and saves."""

    num_workers: int = 1
    cpus_per_worker: int = 1
    precision: Precision = "bf16"
    attention: AttentionBackend = "auto"
    compile: bool = False
    deterministic: bool = False
    seed: int = 1234
    log_every_steps: int = 10
    validate_every_steps: int = 500
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 3
    max_restarts: int = 5

    def __post_init__(self) -> None:
        require_positive(self, "num_workers", "cpus_per_worker", "log_every_steps", "validate_every_steps")
        require_positive(self, "checkpoint_every_steps", "keep_checkpoints")
        require(self.max_restarts >= 0, "LoopConfig.max_restarts", self.max_restarts, "0 or more")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run: a model, its stages, and how to train it.

    `global_batch_tokens` is the same in every stage: the batch stays constant while the window grows. The sources of
    the stages are folders under `tokens_dir`; results go to `output_dir/name`. `max_epochs` caps how often a source may
    be seen: past about four epochs repeated text teaches little (Muennighoff et al., 2023).
    """

    name: str
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    global_batch_tokens: int
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    max_epochs: float = 4.0
    validation_windows: int = 64
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
        require(
            self.num_steps > 0, "RunConfig.stages", self.total_tokens, f"at least {self.global_batch_tokens} tokens"
        )

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


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on every linear of attention and MLP (Danube: rank 4, alpha 16 for DPO)."""

    rank: int = 4
    alpha: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "rank", "alpha")
        require(0 <= self.dropout < 1, "LoraConfig.dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Post-training of the Hugging Face folder `base` on the JSONL or Parquet file `data`.

    `max_length` None takes the base's full context. `batch_size` counts conversations (SFT) or pairs (DPO) a step.
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
    """Direct preference optimisation (Rafailov et al., 2023) with the reports' beta of 0.2 and LoRA of rank 4."""

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


def valid_name(name: str) -> bool:
    """Whether `name` can name a folder on every system: letters, digits, '.', '_' and '-', not starting with a dot."""
    return bool(name) and not name.startswith(".") and all(c.isalnum() or c in "._-" for c in name)


def to_dict(config: object) -> dict[str, Any]:
    """A configuration as plain JSON-able values."""
    return dataclasses.asdict(config)  # type: ignore[arg-type]
