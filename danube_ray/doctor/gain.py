"""Whether FP8 pays on this GPU: the products of each linear of a preset in bf16 and in FP8, measured.

A linear y = x W' is three products: forward y, the input's gradient dy W, the weight's gradient dy' x. FP8 computes
them from rounded copies: x and W in e4m3, dy in e5m2 (transformer-engine's hybrid format), one scale a tensor. Each is
copied into two layouts, since FP8 kernels want both operands contiguous along the summed dimension. That time counts,
but for the weight's copies, which serve all micro-batches of a step.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from danube_ray.config import ModelConfig

WARM_UP = 5
REPEATS = 20
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Product:
    """One of a linear's matrix products, in seconds."""

    name: str
    bf16_s: float
    fp8_s: float

    @property
    def gain(self) -> float:
        return self.bf16_s / self.fp8_s


@dataclass(frozen=True)
class Linear:
    """A linear's products, what casting its input and its output's gradient takes, and all of it in transformer-engine.

    `te_s` is forward and backward of its linear with weights cast before; None where it is not installed.
    """

    name: str
    in_features: int
    out_features: int
    products: tuple[Product, ...]
    cast_s: float
    te_s: float | None

    @property
    def bf16_s(self) -> float:
        return sum(product.bf16_s for product in self.products)

    @property
    def parts_s(self) -> float:
        return sum(product.fp8_s for product in self.products) + self.cast_s

    @property
    def fp8_s(self) -> float:
        """The better of the parts together and transformer-engine's whole."""
        return self.parts_s if self.te_s is None else min(self.parts_s, self.te_s)

    @property
    def gain(self) -> float:
        return self.bf16_s / self.fp8_s

    @property
    def pays(self) -> bool:
        return self.gain > 1


@dataclass(frozen=True)
class Gain:
    """What was measured, on `device` with `tokens` a micro-batch; `casts` says how the copies were made."""

    device: str
    tokens: int
    casts: str
    linears: tuple[Linear, ...]

    @property
    def layer(self) -> float:
        """bf16's time of all linears of a layer over FP8's."""
        return sum(linear.bf16_s for linear in self.linears) / sum(linear.fp8_s for linear in self.linears)

    @property
    def verdict(self) -> str:
        bad = ", ".join(linear.name for linear in self.linears if not linear.pays)
        answer = "pays" if self.layer > 1 else "does not pay: use precision bf16"
        return f"FP8 {answer}: {self.layer:.2f} times as fast over a layer's linears" + (
            f", but not in {bad}" * bool(bad)
        )


def shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's linears, those that share an input joined, as training computes them."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "qkv": (model.hidden_size, queries + 2 * keys),
        "o": (queries, model.hidden_size),
        "gate-up": (model.hidden_size, 2 * model.intermediate_size),
        "down": (model.intermediate_size, model.hidden_size),
    }


def measure(model: ModelConfig, tokens: int, device: torch.device, repeats: int = REPEATS) -> Gain:
    """Time every linear of a layer of `model` with `tokens` a micro-batch.

    The caller sees to it that the device computes FP8 (`check_precision`); a CPU does, slowly, for tests.
    """
    clock = Clock(device, repeats)
    casts, how = caster(device)
    linears = []
    for name, (in_features, out_features) in shapes(model).items():
        x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
        weight = torch.randn(out_features, in_features, device=device, dtype=torch.bfloat16) * in_features**-0.5
        gradient = torch.randn(tokens, out_features, device=device, dtype=torch.bfloat16)
        linears.append(
            Linear(
                name,
                in_features,
                out_features,
                products=(
                    product("forward", x, weight.t(), E4M3, E4M3, clock),
                    product("input gradient", gradient, weight, E5M2, E4M3, clock),
                    product("weight gradient", gradient.t(), x, E5M2, E4M3, clock),
                ),
                cast_s=clock(lambda x=x: casts(x, E4M3)) + clock(lambda gradient=gradient: casts(gradient, E5M2)),
                te_s=transformer_engine_s(x, weight, gradient, clock) if device.type == "cuda" else None,
            )
        )
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Gain(named, tokens, how, tuple(linears))


def product(name: str, a: Tensor, b: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype, clock: Clock) -> Product:
    """a (M, K) times b (K, N), timed in bf16 as they lie, and in FP8 as its kernels want them."""
    # Only the forward product accumulates fast, as in transformer-engine: gradients need the digits.
    fp8 = fp8_product(a, b, a_dtype, b_dtype, fast=name == "forward")
    return Product(name, clock(lambda: a @ b), clock(fp8))


def fp8_product(
    a: Tensor, b: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype, *, fast: bool
) -> Callable[[], Tensor]:
    """a (M, K) times b (K, N) of copies already cast, to bf16: rows of a and columns of b lie contiguous."""
    rows, row_scale = quantize(a.contiguous(), a_dtype)
    columns, column_scale = quantize(b.t().contiguous(), b_dtype)
    return partial(
        torch._scaled_mm,
        rows,
        columns.t(),
        scale_a=row_scale,
        scale_b=column_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in `dtype`, and the fp32 scale that undoes it: the largest magnitude becomes the format's largest number."""
    limit = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / limit
    return (x.float() / scale).clamp(-limit, limit).to(dtype), scale


def quantize_both_ways(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x as rows and as columns: contiguous for the product over its last dimension, and for that over its first."""
    rows, scale = quantize(x, dtype)
    return rows, rows.t().contiguous(), scale


def caster(device: torch.device) -> tuple[Callable[[Tensor, torch.dtype], object], str]:
    """The cast as training makes it: compiled into few kernels where there is a compiler for them."""
    if device.type == "cuda" and find_spec("triton") and (shutil.which("gcc") or shutil.which("cc")):
        return torch.compile(quantize_both_ways, dynamic=False), "torch.compile"
    return quantize_both_ways, "eager torch, which is slower than training's"


def transformer_engine_s(x: Tensor, weight: Tensor, gradient: Tensor, clock: Clock) -> float | None:
    """Forward and backward of transformer-engine's linear, weight cast before; None where it is not installed."""
    if not find_spec("transformer_engine"):
        return None
    import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]
    from transformer_engine.common.recipe import Float8CurrentScaling  # pyright: ignore[reportMissingImports]

    linear = engine.Linear(weight.shape[1], weight.shape[0], bias=False, params_dtype=weight.dtype, device=x.device)
    with torch.no_grad():
        linear.weight.copy_(weight)
    leaf = x.detach().requires_grad_()

    def step(first: bool = False) -> None:
        with engine.autocast(enabled=True, recipe=Float8CurrentScaling()):
            y = linear(leaf, is_first_microbatch=first)
        y.backward(gradient)
        leaf.grad = linear.weight.grad = None

    step(first=True)
    return clock(step)


class Clock:
    """Median seconds of a call over `repeats`, after a warm-up; on a GPU by its own clock."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.on_gpu = device.type == "cuda"
        self.repeats = repeats

    def __call__(self, call: Callable[[], object]) -> float:
        for _ in range(min(WARM_UP, self.repeats)):
            call()
        if not self.on_gpu:
            return statistics.median(self.cpu_s(call) for _ in range(self.repeats))
        pairs = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1_000

    @staticmethod
    def cpu_s(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
