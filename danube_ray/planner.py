"""What a run will need, before it is launched: memory a GPU by part, FLOP, tokens a second, days by stage.

The memory coefficients are estimates: they count what this repository's transformer keeps for its backward pass (a
test compares the count with autograd's), not what the allocator, NCCL or a compiler add or save.
"""

from __future__ import annotations

from dataclasses import dataclass

from danube_ray.config import ModelConfig, RunConfig, require

FP32_BYTES = 4
MOMENTS_BYTES = 8  # AdamW's two, fp32, a parameter
USABLE = 0.94  # of a GPU's memory: the rest goes to CUDA's context, NCCL's buffers and fragmentation (estimate)
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU: memory, dense bf16 peak in FLOP/s, and the share of that peak a training step reaches (MFU)."""

    name: str
    memory_bytes: int
    peak_flops: float
    mfu: float

    def __post_init__(self) -> None:
        require(0 < self.mfu <= 1, "Hardware.mfu", self.mfu, "above 0 and at most 1")


# NVIDIA's data sheet: 989.4 TFLOP/s bf16 without sparsity. 0.416 is what the Danube report's 292.7k tokens/s on 8 H100s
# in FP8 at 2,048 make of it by `ModelConfig.flops_per_token`; the drivers leave about 79 GiB to programs.
H100 = Hardware(name="H100 SXM 80 GB", memory_bytes=79 * 2**30, peak_flops=989.4e12, mfu=0.416)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    low_precision_copies_bytes: float
    activations_bytes: float
    logits_bytes: float

    @property
    def total_bytes(self) -> float:
        static = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.low_precision_copies_bytes
        return static + self.activations_bytes + self.logits_bytes

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "low_precision_copies", "activations", "logits")
        listed = ", ".join(f"{part.replace('_', ' ')} {getattr(self, part + '_bytes') / 1e9:.1f}" for part in parts)
        return f"{self.total_bytes / 1e9:.1f} GB ({listed})"


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage's cost. `tokens_per_s` and `days` are for all GPUs together."""

    name: str
    tokens: int
    sequence_length: int
    micro_batch_size: int
    flops_per_token: float
    tokens_per_s: float
    days: float
    memory: Memory
    fits: bool

    def __str__(self) -> str:
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return (
            f"{self.name}: {self.tokens / 1e9:,.1f}B tokens at {self.sequence_length:,} x {self.micro_batch_size}, "
            f"{self.flops_per_token / 1e9:.2f} GFLOP/token, {self.tokens_per_s:,.0f} tokens/s, {self.days:.2f} days, "
            f"{self.memory}: {verdict}"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's stages on its GPUs."""

    run: str
    gpu: Hardware
    num_gpus: int
    num_parameters: int
    stages: tuple[StagePlan, ...]

    @property
    def days(self) -> float:
        return sum(stage.days for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.num_gpus

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    def __str__(self) -> str:
        head = (
            f"{self.run}: {self.num_parameters:,} parameters on {self.num_gpus} x {self.gpu.name} "
            f"at {self.gpu.mfu:.1%} MFU (estimate): {self.days:.2f} days, {self.gpu_hours:,.1f} GPU hours"
        )
        return "\n".join((head, *(f"  {stage}" for stage in self.stages)))


def plan(run: RunConfig, gpu: Hardware = H100, optimizer_shards: int = 1) -> Plan:
    """Price `run` on `run.loop.num_workers` GPUs like `gpu`.

    `optimizer_shards` is how many GPUs share one copy of the optimizer's moments: 1 for DDP, num_workers for ZeRO-1.
    The MFU given is taken to hold at every sequence length.
    """
    num_gpus = run.loop.num_workers
    allowed = f"a divisor of num_workers={num_gpus}"
    require(optimizer_shards > 0 and num_gpus % optimizer_shards == 0, "optimizer_shards", optimizer_shards, allowed)
    stages = []
    for stage in run.stages:
        flops = run.model.flops_per_token(stage.sequence_length)
        tokens_per_s = num_gpus * gpu.peak_flops * gpu.mfu / flops
        windows_per_gpu = -(-run.global_batch_tokens // (stage.sequence_length * num_gpus))
        micro_batch_tokens = min(stage.micro_batch_size, windows_per_gpu) * stage.sequence_length
        needed = memory(run.model, micro_batch_tokens, half=run.loop.precision != "fp32", shards=optimizer_shards)
        stages.append(
            StagePlan(
                name=stage.name,
                tokens=stage.tokens,
                sequence_length=stage.sequence_length,
                micro_batch_size=stage.micro_batch_size,
                flops_per_token=flops,
                tokens_per_s=tokens_per_s,
                days=stage.tokens / tokens_per_s / SECONDS_PER_DAY,
                memory=needed,
                fits=needed.total_bytes <= USABLE * gpu.memory_bytes,
            )
        )
    return Plan(run=run.name, gpu=gpu, num_gpus=num_gpus, num_parameters=run.model.num_parameters, stages=tuple(stages))


def memory(model: ModelConfig, micro_batch_tokens: int, *, half: bool, shards: int = 1) -> Memory:
    """Bytes at the peak of a step: fp32 weights, gradients and moments, and what a micro-batch keeps for its backward.

    `half` computes in bf16 (or FP8, counted as bf16: its casts are smaller but kept a linear each) beside fp32 weights,
    whose 2-byte copies autocast holds through the pass. The logits' peak is the rounded logits, their fp32 cast, the
    log-softmax and its gradient.
    """
    parameters, width = model.num_parameters, 2 if half else FP32_BYTES
    logit_bytes = 3 * FP32_BYTES + (width if half else 0)
    copied = model.num_layers * model.num_layer_linear_parameters + model.vocab_size * model.hidden_size
    return Memory(
        weights_bytes=FP32_BYTES * parameters,
        gradients_bytes=FP32_BYTES * parameters,
        optimizer_bytes=MOMENTS_BYTES * parameters / shards,
        low_precision_copies_bytes=width * copied if half else 0,
        activations_bytes=micro_batch_tokens * activation_bytes_per_token(model, width),
        logits_bytes=micro_batch_tokens * model.vocab_size * logit_bytes,
    )


def activation_bytes_per_token(model: ModelConfig, width: int) -> int:
    """What the layers keep of one token for the backward pass, in linears of `width` bytes a number.

    A layer keeps the fp32 residual stream before each of its norms and both normed results; q, k, v, the heads' result
    and a log-sum-exp a head; of the MLP the gate, its silu, the up projection and their product.
    """
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    residual = 2 * FP32_BYTES * model.hidden_size
    normed = 2 * width * model.hidden_size
    heads = width * (2 * queries + 2 * keys) + FP32_BYTES * model.num_heads
    mlp = 4 * width * model.intermediate_size
    return model.num_layers * (residual + normed + heads + mlp)
