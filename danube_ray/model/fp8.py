"""FP8 training arithmetic in plain torch: what transformer-engine's per-tensor recipes compute, on any device.

A product's three matrix multiplications (output, gradient of the input, gradient of the weight) take operands cast to
FP8: e4m3 for inputs and weights, e5m2 for gradients, which need its range (the HYBRID format; Micikevicius et al.,
2022). Each tensor has one scale, which moves its largest magnitude onto the format's largest number: from the tensor
itself (current scaling), or from the magnitudes of its last uses (delayed scaling). Sums are kept in fp32, as the
GPU's tensor cores do, and rounded to the dtype of the input. The casts count as straight-through for the gradient.

It is slower than bf16: it tells, without a GPU, what a recipe does to a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from danube_ray.config import Fp8Scaling, require

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
AMAX_HISTORY = 1_024  # uses that delayed scaling looks back on; transformer-engine's default
ALIGNMENT = 16  # cuBLAS multiplies FP8 matrices whose every dimension is a multiple of it

CastT = TypeVar("CastT")


@dataclass
class Region:
    """Where in training the FP8 products are, which `precision.autocast` tells them.

    `number` counts the training regions, after each of which delayed scales move on. `first_micro_batch` says whether
    to cast weights and keep the casts (True), to use those kept (False), or to cast at every use (None). Where casts
    are kept, False stays when autocast has ended: a forward pass that activation checkpointing repeats during backward
    must find what the first one found.
    """

    number: int = 0
    first_micro_batch: bool | None = None


REGION = Region()


class WeightCache:
    """A weight's cast, kept over the micro-batches of a step: the numbers are the same, the casts are saved."""

    def __init__(self) -> None:
        self.kept: Any = None

    def __call__(self, cast: Callable[[], CastT]) -> CastT:
        if REGION.first_micro_batch is None:
            return cast()
        if REGION.first_micro_batch or self.kept is None:
            self.kept = cast()
        return self.kept


def require_aligned(x: Tensor) -> None:
    """Raise `ConfigError` unless x (..., in) holds a number of tokens that the GPU's FP8 kernels take."""
    tokens = x.numel() // x.shape[-1]
    remedy = "pad the sequences, or compute within precision.plain, as bf16 takes any number"
    require(tokens % ALIGNMENT == 0, "tokens of a batch in FP8", tokens, f"a multiple of {ALIGNMENT}", remedy)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast, where it is on, turns the input of a linear into; otherwise its own dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def largest_magnitude(x: Tensor) -> Tensor:
    """The amax of x as an fp32 scalar; NaN where x holds one."""
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high).float()


def scale_for(amax: Tensor, form: torch.dtype, otherwise: Tensor) -> Tensor:
    """What to multiply a tensor with so that its `amax` becomes the largest number of `form`.

    `otherwise` where amax is 0, inf or NaN and says nothing; fp32's largest number where it is too small to divide by.
    """
    scale = (torch.finfo(form).max / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & amax.isfinite(), scale, otherwise)


def cast(x: Tensor, scale: Tensor, form: torch.dtype) -> Tensor:
    """x * scale rounded to FP8, in fp32.

    What exceeds `form` becomes its largest number, as on a GPU; torch's cast alone would make it NaN (e4m3 up to 2.11)
    or inf (e5m2).
    """
    largest = torch.finfo(form).max
    return (x.detach().float() * scale).clamp_(-largest, largest).to(form).float()


class CurrentScale:
    """Scales each tensor by its own amax."""

    def __init__(self, form: torch.dtype, device: torch.device) -> None:
        self.form, self.one = form, torch.ones((), device=device)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x cast to FP8 (values in fp32), and the factor that undoes its scale."""
        scale = scale_for(largest_magnitude(x), self.form, otherwise=self.one)
        return cast(x, scale, self.form), 1 / scale


class DelayedScale:
    """Scales by the largest amax of the last `AMAX_HISTORY` regions, 1 to begin with.

    `history[0]` gathers the amax of the region that runs; before the next, `advance` takes the maximum of all and moves
    them on. Where that is 0 or infinite it says nothing and the scale stays, after one infinite value until it has left
    the history; NaN is passed over.
    """

    def __init__(self, form: torch.dtype, device: torch.device) -> None:
        self.form = form
        self.scale, self.history = torch.ones((), device=device), torch.zeros(AMAX_HISTORY, device=device)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x cast to FP8 (values in fp32), and the factor that undoes its scale."""
        self.history[0] = torch.fmax(self.history[0], largest_magnitude(x))  # passes over NaN
        return cast(x, self.scale, self.form), 1 / self.scale

    def advance(self) -> None:
        self.scale = scale_for(self.history.max(), self.form, otherwise=self.scale)
        self.history = self.history.roll(-1)
        self.history[0] = 0


class EmulatedProduct:
    """x @ weight.T in FP8, for one weight."""

    def __init__(self, weight: Tensor, scaling: Fp8Scaling) -> None:
        make = DelayedScale if scaling == "delayed" else CurrentScale
        self.input, self.weight = make(FORWARD, weight.device), make(FORWARD, weight.device)
        self.gradient = make(BACKWARD, weight.device)
        self.cache = WeightCache()
        self.region: int | None = None  # the last one of training that this was used in

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        require_aligned(x)
        if torch.is_grad_enabled() and self.region != REGION.number:
            self.advance()
        weight8, weight_factor = self.cache(lambda: self.weight(weight))
        return Fp8Matmul.apply(x.to(compute_dtype(x)), weight, weight8, weight_factor, self.input, self.gradient)

    @property
    def delayed(self) -> dict[str, DelayedScale]:
        scales = {"input": self.input, "weight": self.weight, "gradient": self.gradient}
        return {name: scale for name, scale in scales.items() if isinstance(scale, DelayedScale)}

    def advance(self) -> None:
        """Take in the amaxes of the region that has ended, the largest of any rank.

        The weight's scale stays while its cast is kept, so that casting it again (as activation checkpointing does)
        gives the same numbers.
        """
        self.region = REGION.number
        scales = [s for name, s in self.delayed.items() if name != "weight" or REGION.first_micro_batch is not False]
        if scales and dist.is_initialized() and dist.get_world_size() > 1:
            amaxes = torch.stack([scale.history[0] for scale in scales])
            dist.all_reduce(amaxes, dist.ReduceOp.MAX)
            for scale, amax in zip(scales, amaxes, strict=True):
                scale.history[0] = amax
        for scale in scales:
            scale.advance()

    def state(self) -> dict[str, Tensor]:
        """What the next steps' scales depend on: nothing under current scaling, and nothing before the first use."""
        parts = self.delayed.items() if self.region is not None else ()
        return {f"{name}.{part}": getattr(scale, part) for name, scale in parts for part in ("scale", "history")}

    def load(self, state: dict[str, Tensor]) -> None:
        self.region = -1  # one that is over, so that what it gathered is taken in
        for name, scale in self.delayed.items():
            scale.scale.copy_(state[f"{name}.scale"])
            scale.history.copy_(state[f"{name}.history"])


class Fp8Matmul(torch.autograd.Function):
    """y = x @ weight.T of x (..., in) and weight (out, in), given the weight's cast and what casts x and gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight8: Tensor,
        weight_factor: Tensor,
        cast_input: CurrentScale | DelayedScale,
        cast_gradient: CurrentScale | DelayedScale,
    ) -> Tensor:
        x8, x_factor = cast_input(x.flatten(0, -2))
        ctx.save_for_backward(x8, x_factor, weight8, weight_factor)
        ctx.cast_gradient = cast_gradient
        return multiply(x8, weight8.t(), x_factor * weight_factor, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        x8, x_factor, weight8, weight_factor = ctx.saved_tensors
        gradient8, factor = ctx.cast_gradient(gradient.flatten(0, -2))
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = multiply(gradient8, weight8, factor * weight_factor, gradient.dtype)
            dx = dx.unflatten(0, gradient.shape[:-1])
        if ctx.needs_input_grad[1]:
            dweight = multiply(gradient8.t(), x8, factor * x_factor, gradient.dtype)
        return dx, dweight, None, None, None, None


def multiply(first: Tensor, second: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """first @ second * factor, summed in fp32 whatever autocast says, rounded to `dtype`."""
    with torch.autocast(first.device.type, enabled=False):
        return (first @ second).mul_(factor).to(dtype)
