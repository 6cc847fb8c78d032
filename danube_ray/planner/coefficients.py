"""The numbers of the planner that are not counted from the model: each with its unit, where it is from, and how sure.

None of them is fitted to this project's own measurements: the plan prints how far off its formula is, so that a number
that proves wrong is changed here, by hand, with its new source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danube_ray.config import LoopConfig
from danube_ray.planner.hardware import GPUS_PER_NODE, USABLE, Hardware

Basis = Literal["measured", "published", "estimate"]


@dataclass(frozen=True)
class Coefficient:
    """`basis`: measured by this project, published by others, or an estimate."""

    what: str
    value: float
    unit: str
    basis: Basis
    source: str


# FP8 products over bf16's. transformer-engine's documentation measures whole linears on an H200: delayed 1.69, current
# 1.58, block 1.40. Casts are counted apart here, so tensor scaling keeps delayed's figure, and block the ratio of
# block's to current's. Rowwise: torchao's on an 8B model is half-way between bf16 and tensor scaling (torchtitan).
FP8_GEMM: dict[str, Coefficient] = {
    scaling: Coefficient(f"FP8 products, {scaling} scaling, over bf16's", value, "times", "estimate", source)
    for scaling, value, source in (
        ("current", 1.69, "transformer-engine's GEMM figures (H200), casts counted apart"),
        ("delayed", 1.69, "transformer-engine's GEMM figures (H200)"),
        ("block", 1.50, "transformer-engine's GEMM figures (H200), casts counted apart"),
        ("rowwise", 1.30, "torchtitan 8B: about half of tensor scaling's gain"),
    )
}

FP8_CAST_BYTES: dict[str, Coefficient] = {
    scaling: Coefficient(f"bytes moved to cast a number to FP8, {scaling} scaling", value, "bytes", "estimate", source)
    for scaling, value, source in (
        ("current", 6, "read twice (its maximum first), written in two layouts"),
        ("delayed", 4, "read once, written in two layouts"),
        ("block", 6, "as current: a block's maximum, then two layouts"),
        ("rowwise", 8, "read twice for each of two layouts, each with its own scales, written twice"),
    )
}

OPTIMIZER_BYTES = Coefficient(
    "AdamW and clipping, a parameter a step", 40, "bytes", "estimate", "counted: norm 4, clip 8, update 28 in fp32"
)
OVERLAP = Coefficient(
    "gradient exchange hidden behind the last backward pass", 0.85, "of its time", "estimate", "DDP's buckets"
)
BETWEEN_NODES = Coefficient(
    "links between nodes", 1, "of those within", "estimate", "8 x 400 Gb/s a node are as fast, slower ones are not"
)
STRAGGLING = Coefficient(
    "speed of several GPUs, which wait for the slowest", 0.98, "times", "estimate", "clocks differ by about 2 %"
)
EAGER_HOST_S = Coefficient(
    "launching a layer's kernels, eager, forward and backward", 1.5e-3, "s", "estimate", "about 150 launches of 10 us"
)
COMPILED_HOST_S = Coefficient(
    "launching a layer's kernels, compiled, forward and backward", 0.4e-3, "s", "estimate", "about 40 launches of 10 us"
)


def used(loop: LoopConfig, gpu: Hardware, num_gpus: int) -> list[Coefficient]:
    """What a plan rests on beside counts and data sheets."""
    fp8 = [FP8_GEMM[loop.scaling], FP8_CAST_BYTES[loop.scaling]] if loop.scaling else []
    network = [
        Coefficient("links between GPUs", gpu.link_bytes_per_s / 1e9, "GB/s", "published", gpu.link_source),
        *[BETWEEN_NODES] * (num_gpus > GPUS_PER_NODE),
        OVERLAP,
        STRAGGLING,
    ]
    return [
        Coefficient("products", gpu.gemm_share, "of the peak", "estimate", gpu.share_source),
        Coefficient(
            f"attention ({loop.attention})",
            gpu.attention_share(loop.attention),
            "of the bf16 peak",
            "estimate",
            gpu.share_source,
        ),
        Coefficient("memory traffic", gpu.memory_share, "of the bandwidth", "estimate", gpu.share_source),
        Coefficient("memory that a run may use", USABLE, "of it", "estimate", "the rest: CUDA, NCCL, fragments"),
        *fp8,
        OPTIMIZER_BYTES,
        COMPILED_HOST_S if loop.compile else EAGER_HOST_S,
        *network * (num_gpus > 1),
    ]
