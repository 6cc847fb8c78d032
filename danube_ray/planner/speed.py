"""Seconds of one optimizer step on one GPU, by part: a time model of GEMMs, attention, memory traffic and the network.

linears      6 FLOP a weight and token, at the rate of bf16 or FP8 GEMMs
head         the same in bf16
attention    causal and window-aware, head dims padded as the kernels pad them, document masks not credited
elementwise  bytes that norms, RoPE, SwiGLU, residuals and the loss move
casts        bytes that casting activations and their gradients to FP8 moves
weights      casting the weights, and adding up their gradients every micro-batch
optimizer    clipping and AdamW, once a step
network      what no backward pass hides of the gradients' exchange, and waiting for the slowest GPU
launching    how far a CPU that launches small kernels is behind its GPU

Activation checkpointing computes each layer's forward pass once more. Data and checkpoints count nothing, since they
come and go beside the training, nor does validation, which is short.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from danube_ray.config import ModelConfig
from danube_ray.planner.coefficients import (
    COMPILED_HOST_S,
    EAGER_HOST_S,
    FP8_CAST_BYTES,
    FP8_GEMM,
    OPTIMIZER_BYTES,
    OVERLAP,
    STRAGGLING,
)
from danube_ray.planner.hardware import Hardware
from danube_ray.planner.memory import FP32_BYTES
from danube_ray.planner.work import Work

HEAD_DIM_STEP = 32  # kernels compute head dims of 80 as 96, and 120 as 128
FORWARD = 1 / 3  # of the FLOP of a step

# Bytes moved a layer and token between its products, forward and backward, counted by operation: a number of the hidden
# size (norms and residual, fp32), of the rotated heads, of the MLP's width (SwiGLU).
FUSED = (56, 8, 16)
EAGER = (120, 66, 28)
LOSS_BYTES = 26  # a logit: written in bf16, softened in fp32, turned into its gradient, which two products read


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on each GPU, by part."""

    linears_s: float
    head_s: float
    attention_s: float
    elementwise_s: float
    casts_s: float
    weights_s: float
    optimizer_s: float
    network_s: float
    launching_s: float

    @property
    def total_s(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def step_time(work: Work, gpu: Hardware) -> StepTime:
    """The time of a step of `work` on `gpu`s."""
    model, loop, tokens = work.model, work.loop, work.tokens
    bytes_per_s = gpu.memory_share * gpu.memory_bytes_per_s
    again = 1 + FORWARD if loop.activation_checkpointing else 1
    bf16 = gemm_flops(work, gpu, fp8=False)
    linears_s = again * 6 * work.linear_parameters * tokens / gemm_flops(work, gpu, fp8=loop.scaling is not None)
    attention_s = again * attention_flops_per_token(work) * tokens / attention_rate(work, gpu)
    layer_bytes = model.num_layers * elementwise_bytes_per_token(work)
    elementwise_s = (again * layer_bytes + LOSS_BYTES * model.vocab_size) * tokens / bytes_per_s
    cast_bytes = FP8_CAST_BYTES[loop.scaling].value if loop.scaling else 0
    casts_s = again * cast_bytes * model.num_layers * cast_numbers_per_token(model) * tokens / bytes_per_s
    head_s = 6 * work.head_parameters * tokens / bf16
    compute_s = linears_s + attention_s + elementwise_s + casts_s + head_s
    weights_s = weight_bytes(work) / bytes_per_s
    optimizer_s = OPTIMIZER_BYTES.value * model.num_parameters / work.shards / bytes_per_s
    host_s = COMPILED_HOST_S if loop.compile else EAGER_HOST_S
    launching_s = max(0.0, again * host_s.value * model.num_layers * work.num_micro_batches - compute_s - weights_s)
    device_s = compute_s + weights_s + optimizer_s + launching_s
    return StepTime(
        linears_s=linears_s,
        head_s=head_s,
        attention_s=attention_s,
        elementwise_s=elementwise_s,
        casts_s=casts_s,
        weights_s=weights_s,
        optimizer_s=optimizer_s,
        network_s=network_s(
            work, gpu, backward_s=(1 - FORWARD) * compute_s / work.num_micro_batches, device_s=device_s
        ),
        launching_s=launching_s,
    )


def gemm_flops(work: Work, gpu: Hardware, *, fp8: bool) -> float:
    """FLOP/s of the products: of the FP8-computed linears, or of everything else."""
    if work.loop.precision == "fp32":
        return gpu.gemm_share * gpu.fp32_flops
    faster = FP8_GEMM[work.loop.scaling].value if fp8 and work.loop.scaling else 1.0
    return gpu.gemm_share * gpu.peak_flops * faster


def attention_flops_per_token(work: Work) -> float:
    """As `ModelConfig.flops_per_token` counts them, at the head dim that the kernels compute."""
    model = work.model
    padded = -(-model.head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP
    whole = model.flops_per_token(work.sequence_length) - 6 * (work.linear_parameters + work.head_parameters)
    return whole * padded / model.head_dim


def attention_rate(work: Work, gpu: Hardware) -> float:
    """FLOP/s of attention, forward and backward together."""
    peak = gpu.fp32_flops if work.loop.precision == "fp32" else gpu.peak_flops
    return gpu.attention_share(work.loop.attention) * peak


def elementwise_bytes_per_token(work: Work) -> int:
    """Bytes that a layer's kernels between its products move for one token, forward and backward.

    Compiled, what belongs together is one kernel that reads its inputs and writes its results; eager, each operation is
    one. Counted from the layer, with an fp32 residual stream and everything else in bf16.
    """
    model = work.model
    per_hidden, per_head, per_ffn = FUSED if work.loop.compile else EAGER
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    return per_hidden * model.hidden_size + per_head * heads + per_ffn * model.intermediate_size


def cast_numbers_per_token(model: ModelConfig) -> int:
    """Numbers a layer casts to FP8 for one token: inputs of its products (qkv, o, gate-up, down), and gradients."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    inputs = 2 * model.hidden_size + queries + model.intermediate_size
    gradients = queries + 2 * keys + 2 * model.hidden_size + 2 * model.intermediate_size
    return inputs + gradients


def weight_bytes(work: Work) -> float:
    """Bytes moved a step for the weights: their casts, and each micro-batch's gradient, cast to fp32 and added up.

    FP8's casts are kept for the whole step.
    """
    passes, linears, head = work.num_micro_batches, work.linear_parameters, work.head_parameters
    added = 3 * FP32_BYTES * (passes - 1)
    if work.loop.precision == "fp32":
        return added * (linears + head)
    to_bf16, gradient_cast = FP32_BYTES + 2, 2 + FP32_BYTES
    to_fp8 = 2 * FP32_BYTES + 2  # its maximum first; two layouts
    casts = to_fp8 * linears + passes * to_bf16 * head if work.loop.scaling else passes * to_bf16 * (linears + head)
    return casts + (passes * gradient_cast + added) * (linears + head)


def network_s(work: Work, gpu: Hardware, *, backward_s: float, device_s: float) -> float:
    """Seconds in which a GPU waits for the others, beyond what their exchange hides behind one backward pass.

    In units of one pass of all fp32 gradients or weights over the links: an all-reduce is two. DDP reduces with the
    last micro-batch, beside its backward pass. ZeRO-1 reduces after it and gathers the weights; ZeRO-2 reduces beside
    every backward pass; ZeRO-3 scatters gradients and gathers the weights for every forward and backward pass.
    """
    if work.num_gpus == 1:
        return 0.0
    unit_s = FP32_BYTES * work.model.num_parameters * (1 - 1 / work.num_gpus) / gpu.link_bytes_per_s
    passes = work.num_micro_batches
    hideable, times, exposed = {0: (2, 1, 0), 1: (0, 0, 3), 2: (2, passes, 1), 3: (3, passes, 0)}[work.zero_stage]
    waits = times * max(hideable * unit_s - backward_s, (1 - OVERLAP.value) * hideable * unit_s)
    return exposed * unit_s + waits + (1 / STRAGGLING.value - 1) * device_s
