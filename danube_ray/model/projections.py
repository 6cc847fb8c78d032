"""The linears of attention and MLP, with a matrix product that can be replaced, and joined where they share an input.

`replace_linears` swaps each for a `Projection`, whose product FP8 sets and bf16 puts back: names, parameters and state
dict stay. `fuse` computes q, k and v, and gate and up, as one product each. Their weights stay parameters of
their own, under Hugging Face's names, but lie end to end in memory, so that joining them costs nothing; weights that
something has moved apart since (`.to`, an assigned state dict) are copied together in each forward pass, with the same
result. Adapters keep their linears apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danube_ray.config import require

# x (..., in) and weight (out, in) to x @ weight.T (..., out), without bias.
Product = Callable[[Tensor, Tensor], Tensor]
# Makes the product for a weight (out, in); a product may keep state of its own, so each weight gets one.
MakeProduct = Callable[[Tensor], Product]
# x and the linears that read it to what each of them returns.
Project = Callable[..., tuple[Tensor, ...]]

# The linears of one module that share an input, and all that read or write the residual stream through a layer.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
NAMES = (*SHARED_INPUT[0], "o_proj", *SHARED_INPUT[1], "down_proj")


class Projection(nn.Linear):
    """A linear whose matrix product is replaceable."""

    product: Product

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight)


class JointProjection:
    """The linears of x (..., in) as one product, split into what each would return (views of one tensor)."""

    def __init__(self, product: Product) -> None:
        self.product = product

    def __call__(self, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        weights = [linear.weight for linear in linears if isinstance(linear, nn.Linear)]
        if len(weights) < len(linears):
            return separate(x, *linears)  # an adapter has taken a linear's place: only it knows its weights
        return self.product(x, join(weights)).split([weight.shape[0] for weight in weights], dim=-1)


def separate(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Each linear of x by itself."""
    return tuple(linear(x) for linear in linears)


def replace_linears(model: nn.Module, make: MakeProduct) -> None:
    """Give every linear of attention and MLP a product from `make`, in place; under an adapter, its base linear."""
    for name, module in list(model.named_modules()):
        parts = name.split(".")
        own = parts[-2] if parts[-1] == "base_layer" and len(parts) > 1 else parts[-1]
        if isinstance(module, nn.Linear) and own in NAMES:
            require(module.bias is None, f"bias of {name}", "present", "no bias in attention and MLP")
            with torch.device("meta"):
                projection = Projection(module.in_features, module.out_features, bias=False)
            projection.weight, projection.product = module.weight, make(module.weight)
            model.set_submodule(name, projection.train(module.training))


def fuse(model: nn.Module, make: MakeProduct = lambda weight: F.linear) -> None:
    """Compute the linears that share an input as one product from `make`, in place, but for those with adapters."""
    for module in model.modules():
        for names in SHARED_INPUT:
            linears = [getattr(module, name, None) for name in names]
            weights = [linear.weight for linear in linears if isinstance(linear, nn.Linear)]
            if len(weights) == len(names):
                vars(module)["project"] = JointProjection(make(lay_end_to_end(weights)))


def products(model: nn.Module) -> Iterator[tuple[str, Projection | JointProjection]]:
    """What holds a product in `model`, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Projection):
            yield name, module
        if isinstance(project := getattr(module, "project", None), JointProjection):
            yield f"{name}.project", project


@torch.no_grad()
def lay_end_to_end(weights: Sequence[Tensor]) -> Tensor:
    """Move weights (out_i, in) into one allocation, in order; they stay the same parameters. Returns the whole."""
    whole = torch.cat(tuple(weights))
    for weight, part in zip(weights, whole.split([weight.shape[0] for weight in weights]), strict=True):
        weight.data = part
    return whole


def join(weights: Sequence[Tensor]) -> Tensor:
    """Weights (out_i, in) as one (sum of out_i, in); no copy where they lie end to end.

    torch.compile gets the copy: it sees no addresses, and merges the copy into the cast that follows.
    """
    if torch.compiler.is_compiling() or not lie_end_to_end(weights):
        return torch.cat(tuple(weights))
    return Joined.apply(*weights)


def lie_end_to_end(weights: Sequence[Tensor]) -> bool:
    """Whether weights are contiguous parts of one allocation, each beginning where the one before it ends."""
    first, address = weights[0], weights[0].data_ptr()
    for weight in weights:
        whole = weight.is_contiguous() and weight.dtype == first.dtype
        if not (whole and weight.data_ptr() == address and same_allocation(weight, first)):
            return False
        address += weight.numel() * weight.element_size()
    return True


def same_allocation(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


class Joined(torch.autograd.Function):
    """Weights that lie end to end, seen as one tensor; each gets its rows of the gradient."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.rows = [weight.shape[0] for weight in weights]
        return weights[0].as_strided((sum(ctx.rows), weights[0].shape[1]), weights[0].stride())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return grad_outputs[0].split(ctx.rows)
