"""Number formats of a training step: fp32, bf16 autocast, and FP8 through transformer-engine.

Weights are held in fp32 throughout; autocast computes the matrix products in fewer bits. FP8 covers every linear of
attention and MLP; the head, the embeddings and the norms stay bf16, as in the Danube report (section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from danube_ray.config import ConfigError, Precision, require

ModelT = TypeVar("ModelT", bound=nn.Module)

FP8_COMPUTE_CAPABILITY = (9, 0)  # Hopper; transformer-engine also knows Ada (8.9), where nothing here was tried


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise `ConfigError` where `device` or the installation can't compute in `precision`, before work starts."""
    require(precision in ("fp32", "bf16", "fp8-te"), "precision", precision, "'fp32', 'bf16' or 'fp8-te'")
    if precision != "fp8-te":
        return
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_COMPUTE_CAPABILITY
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    require(is_hopper, "precision", f"fp8-te on {where}", "a GPU of Hopper or later", "use precision bf16")
    _transformer_engine()


@contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute what lies within in `precision`. fp32 switches off any autocast around it."""
    if precision == "fp8-te":
        from transformer_engine.common.recipe import Float8CurrentScaling  # pyright: ignore[reportMissingImports]

        engine = _transformer_engine()
        # Current scaling keeps no history: nothing to save in checkpoints, nothing to all-reduce.
        with torch.autocast(device.type, torch.bfloat16), engine.autocast(enabled=True, recipe=Float8CurrentScaling()):
            yield
    else:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield


def convert(model: ModelT, precision: Precision) -> ModelT:
    """Ready `model` for `precision`, in place: under fp8-te every linear but `lm_head` becomes transformer-engine's.

    Parameters keep their names and tensors, so state dicts and optimizers see no difference.
    """
    device = next(model.parameters()).device
    check_precision(precision, device)
    if precision == "fp8-te":
        engine = _transformer_engine()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head":
                fp8 = engine.Linear(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    params_dtype=module.weight.dtype,
                    device=device,
                )
                fp8.weight = module.weight
                if module.bias is not None:
                    fp8.bias = module.bias
                model.set_submodule(name, fp8)
    return model


def _transformer_engine() -> Any:
    try:
        import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:  # OSError: a CUDA library that it wants is not there
        remedy = "pip install 'danube-ray[gpu]', or use precision bf16"
        raise ConfigError("precision", "fp8-te", f"with transformer-engine importable ({error})", remedy) from None
    return engine
