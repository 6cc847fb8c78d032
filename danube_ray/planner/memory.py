"""Bytes on one GPU at the peak of a step, by part, and the largest micro-batch that fits.

The parts are counted: what this repository's transformer keeps for its backward pass (a test compares the count with
autograd's), what DDP and DeepSpeed hold. What the allocator, NCCL and CUDA take beside them is `hardware.USABLE`'s.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from danube_ray.config import FP8_SCALINGS, ModelConfig, Precision
from danube_ray.planner.hardware import Hardware
from danube_ray.planner.work import Work

FP32_BYTES = 4
MOMENTS_BYTES = 8  # AdamW's two, fp32, a parameter

# DeepSpeed as `train.zero` runs it and has measured it. By stage: fp32 numbers a parameter of the gradients that are
# spread over the GPUs (with a copy), and buckets that they travel in; then what stage 3 gathers of others' weights.
ZERO_GRADIENT_SHARDS = {0: 0, 1: 0, 2: 2, 3: 2}
ZERO_BUCKETS = {0: 0, 1: 1, 2: 2, 3: 2}
ZERO_BUCKET_BYTES = 50_000_000 * FP32_BYTES
ZERO3_LIVE_PARAMETERS = 1_000_000_000

# `model.functional.cross_entropy_sum` on a GPU: logits that exist at once, as themselves, log-softmax and gradient.
LOSS_CHUNK_LOGITS = 2**26
LOSS_BYTES_PER_LOGIT = 8


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by part. `copies` are the weights in the precision of the products, `working` what one layer's backward
    pass makes beside what was kept, `loss` one chunk's logits, `buffers` what ZeRO moves weights and gradients in."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    copies_bytes: float
    buffers_bytes: float
    activations_bytes: float
    working_bytes: float
    loss_bytes: float

    @property
    def total_bytes(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def memory(work: Work) -> Memory:
    """What one GPU holds at the peak of the step, all parts together: fp32 weights, gradients and moments, activations.

    ZeRO spreads the moments and an fp32 copy of the weights that it updates (stage 1), the gradients (2) and the
    weights that it computes with (3).
    """
    model, stage, parameters = work.model, work.zero_stage, work.model.num_parameters
    tokens, precision = work.micro_batch_tokens, work.loop.precision
    spread = FP32_BYTES * parameters / work.shards
    layer = layer_bytes_per_token(model, precision)
    layers = model.num_layers * layer
    if work.loop.activation_checkpointing:  # each layer keeps its input; one at a time has all of its own again
        layers = model.num_layers * FP32_BYTES * model.hidden_size + layer
    return Memory(
        weights_bytes=spread if stage == 3 else FP32_BYTES * parameters,
        gradients_bytes=(FP32_BYTES * parameters if stage < 2 else 0) + spread * ZERO_GRADIENT_SHARDS[stage],
        optimizer_bytes=MOMENTS_BYTES * parameters / work.shards + (spread if stage else 0),
        copies_bytes=copied_bytes(work),
        buffers_bytes=zero_buffer_bytes(work),
        activations_bytes=tokens * layers,
        working_bytes=tokens * working_bytes_per_token(model, precision),
        loss_bytes=loss_bytes(work),
    )


def copied_bytes(work: Work) -> float:
    """Weights cast for the products and held through a step: in bf16 by autocast, or in FP8.

    transformer-engine holds them in two layouts, torchao in one, and not at all under rowwise scales; the head is bf16.
    """
    if work.loop.precision == "fp32":
        return 0.0
    fp8 = {"fp8-te": 2, "fp8-torchao": 1 if work.loop.scaling == "current" else 0}
    return fp8.get(work.loop.precision, 2) * work.linear_parameters + 2 * work.head_parameters


def zero_buffer_bytes(work: Work) -> float:
    gathered = min(work.model.num_parameters, ZERO3_LIVE_PARAMETERS) * FP32_BYTES if work.zero_stage == 3 else 0
    return gathered + ZERO_BUCKETS[work.zero_stage] * ZERO_BUCKET_BYTES


def loss_bytes(work: Work) -> float:
    """One chunk's logits; and the gradients that the loss makes while it goes forward, of the head and its input."""
    logits = min(work.micro_batch_tokens * work.model.vocab_size, LOSS_CHUNK_LOGITS)
    width = FP32_BYTES if work.loop.precision == "fp32" else 2
    gradients = FP32_BYTES * work.head_parameters + width * work.micro_batch_tokens * work.model.hidden_size
    return logits * LOSS_BYTES_PER_LOGIT + gradients


def layer_bytes_per_token(model: ModelConfig, precision: Precision) -> int:
    """What a layer keeps of one token for its backward pass.

    The fp32 residual stream before each of its norms and both normed results; q, k, v, the heads' result and a
    log-sum-exp a head; of the MLP the gate, the up projection and their product. Under FP8 q, k and v are
    parts of one tensor, which v keeps beside the rotated q and k; transformer-engine keeps its linears' inputs in FP8.
    """
    width = FP32_BYTES if precision == "fp32" else 2
    te, fp8 = precision == "fp8-te", precision in FP8_SCALINGS
    input_width = 1 if te else width
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    residual = 2 * FP32_BYTES * model.hidden_size
    normed = 2 * input_width * model.hidden_size
    attended = width * (2 * queries + 2 * keys) + FP32_BYTES * model.num_heads
    joined = width * (queries + keys) * fp8
    heads_cast = queries * te
    mlp = (2 * width + input_width) * model.intermediate_size
    return residual + normed + attended + joined + heads_cast + mlp


def working_bytes_per_token(model: ModelConfig, precision: Precision) -> int:
    """Gradients alive at once in an MLP's backward pass: of product, gate, silu and up, and of the residual."""
    width = FP32_BYTES if precision == "fp32" else 2
    return 4 * width * model.intermediate_size + 2 * FP32_BYTES * model.hidden_size


def largest_micro_batch(work: Work, gpu: Hardware) -> int:
    """The most windows at a time that fit `gpu`, at most those of a step; 0 where not even one does."""
    fitting = range(1, work.windows + 1)

    def too_big(windows: int) -> bool:
        return memory(dataclasses.replace(work, micro_batch_size=windows)).total_bytes > gpu.usable_bytes

    # Memory grows with the micro-batch, so the first that does not fit is found by halving.
    low, high = 0, len(fitting)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if too_big(fitting[middle]) else (middle + 1, high)
    return low
