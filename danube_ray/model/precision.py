"""Number formats of a training step: fp32, bf16 autocast, and FP8 by transformer-engine, torchao or emulation.

Weights are held in fp32 throughout; autocast computes the matrix products in fewer bits. FP8 covers every linear of
attention and MLP, with q, k and v as one product, gate and up as another; the head, the embeddings and the norms stay
bf16, as in the Danube report (section 3). Parameters, names and state dict are the same in every precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danube_ray.config import FP8_SCALINGS, ConfigError, Fp8Scaling, ModelConfig, Precision, require
from danube_ray.model.fp8 import ALIGNMENT, REGION, EmulatedProduct
from danube_ray.model.projections import Product, fuse, products, replace_linears

ModelT = TypeVar("ModelT", bound=nn.Module)

PRECISIONS = ("fp32", "bf16", *FP8_SCALINGS)
FP8_COMPUTE_CAPABILITY = (9, 0)  # Hopper; Ada (8.9) has FP8 too, but nothing here was tried on it


def check_precision(precision: Precision, device: torch.device, scaling: Fp8Scaling | None = None) -> None:
    """Raise `ConfigError` where `device` or the installation can't compute in `precision`, before work starts."""
    require(precision in PRECISIONS, "precision", precision, f"one of {', '.join(PRECISIONS)}")
    scalings = FP8_SCALINGS.get(precision, ())
    allowed = f"one of {', '.join(scalings)}" if scalings else "None without FP8"
    require(scaling is None or scaling in scalings, f"fp8_scaling of precision {precision}", scaling, allowed)
    if precision == "fp8-te" or (precision == "fp8-torchao" and device.type != "cpu"):  # torchao emulates on the CPU
        is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_COMPUTE_CAPABILITY
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        remedy = "use precision bf16, or fp8-emulated to try a recipe out"
        require(is_hopper, "precision", f"{precision} on {where}", "a GPU of Hopper or later", remedy)
    if scalings:
        fp8_product(precision)


def check_shapes(
    precision: Precision, model: ModelConfig, sequence_length: int, named: str = "sequence_length"
) -> None:
    """Raise `ConfigError` where FP8 kernels don't take the matrices of `model`; needs no device.

    Every dimension must be a multiple of 16, also the tokens of a micro-batch: a sequence length that is one makes any
    number of sequences one. `named` is the setting that the length comes from.
    """
    if precision not in FP8_SCALINGS:
        return
    sizes = {
        "ModelConfig.hidden_size": model.hidden_size,
        "ModelConfig.intermediate_size": model.intermediate_size,
        "num_heads * head_dim": model.num_heads * model.head_dim,
        "num_kv_heads * head_dim": model.num_kv_heads * model.head_dim,
        named: sequence_length,
    }
    for name, size in sizes.items():
        allowed = f"a multiple of {ALIGNMENT} in precision {precision}"
        require(size % ALIGNMENT == 0, name, size, allowed, "use precision bf16, or another size")


def convert(model: ModelT, precision: Precision, scaling: Fp8Scaling | None = None) -> ModelT:
    """Ready `model` for `precision`, in place, on the device it is on; bf16 and fp32 need nothing.

    FP8 lays the weights that are used together end to end, so convert before something else keeps their addresses.
    """
    device = next(model.parameters()).device
    check_precision(precision, device, scaling)
    if precision in FP8_SCALINGS:
        make = partial(fp8_product(precision), scaling=scaling or FP8_SCALINGS[precision][0])
        replace_linears(model, make)
        fuse(model, make)
    return model


@contextmanager
def autocast(
    precision: Precision,
    device: torch.device,
    scaling: Fp8Scaling | None = None,
    *,
    first_micro_batch: bool | None = None,
) -> Iterator[None]:
    """Compute what lies within in `precision`. fp32 switches off any autocast around it.

    `first_micro_batch` lets FP8 cast weights once a step: True casts and keeps them, False takes what was kept, None
    casts at every use. The numbers are the same, but for delayed scaling, where a kept cast keeps its scale too.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
        if precision not in FP8_SCALINGS:
            yield
            return
        REGION.number += torch.is_grad_enabled()  # evaluation moves no scales
        REGION.first_micro_batch = first_micro_batch
        try:
            with transformer_engine_autocast(scaling) if precision == "fp8-te" else nullcontext():
                yield
        finally:
            REGION.first_micro_batch = None if first_micro_batch is None else False


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Within, an FP8 model computes as a bf16 model does (under `autocast("bf16", ...)`), with the same weights."""
    holders = [holder for _, holder in products(model)]
    kept = [holder.product for holder in holders]
    to_bf16(model)
    try:
        yield
    finally:
        for holder, product in zip(holders, kept, strict=True):
            holder.product = product


def to_bf16(model: nn.Module) -> None:
    """Make an FP8 model a bf16 one for good, in place: parameters stay, FP8's copies of them are freed."""
    for _, holder in products(model):
        holder.product = F.linear


@runtime_checkable
class Stateful(Protocol):
    """A product whose scales depend on what it has seen."""

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: dict[str, Tensor]) -> None: ...


def scaling_state(model: nn.Module) -> dict[str, Tensor]:
    """The scales and amax histories of delayed scaling by name; empty in every other precision.

    It belongs into a checkpoint, beside the weights: a run that goes on without it starts with scales of 1, which
    lose small gradients until the first use has been seen.
    """
    stateful = {name: holder.product for name, holder in products(model) if isinstance(holder.product, Stateful)}
    return {f"{name}.{key}": value for name, product in stateful.items() for key, value in product.state().items()}


def load_scaling_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `scaling_state` gave; a product of which `state` says nothing begins anew."""
    for name, holder in products(model):
        part = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if part and isinstance(holder.product, Stateful):
            holder.product.load(part)


def fp8_product(precision: Precision) -> Callable[..., Product]:
    """What makes an FP8 precision's product for a weight (out, in), given `scaling`.

    Raises `ConfigError` where the precision's library can't be imported.
    """
    try:
        if precision == "fp8-te":
            from danube_ray.model.fp8_te import TransformerEngineProduct

            return TransformerEngineProduct
        if precision == "fp8-torchao":
            from danube_ray.model.fp8_torchao import TorchaoProduct

            return TorchaoProduct
    except (ImportError, OSError) as error:  # OSError: a CUDA library that transformer-engine wants is not there
        remedy = "pip install 'danube-ray[gpu]', or use precision bf16"
        raise ConfigError("precision", precision, f"with its library importable ({error})", remedy) from None
    return EmulatedProduct


def transformer_engine_autocast(scaling: Fp8Scaling | None) -> Any:
    from danube_ray.model import fp8_te

    return fp8_te.autocast(scaling or "current")
