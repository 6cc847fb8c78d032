"""FP8 by transformer-engine: one `te.Linear` a weight, outside the model, which the weight visits for each call.

So the parameters, their names and the state dict stay those of the plain model, and transformer-engine's
`_extra_state`, which is a pickle, exists nowhere. Importing this needs the library; `precision` does so where it is
asked for. Written against transformer-engine 2.20.
"""

from __future__ import annotations

from functools import cache
from typing import Any

# transformer_engine finds its CUDA libraries only once torch has loaded them.
import torch  # noqa: F401
import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]
from torch import Tensor
from transformer_engine.common import recipe  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # pyright: ignore[reportMissingImports]

from danube_ray.config import Fp8Scaling
from danube_ray.model.fp8 import REGION, require_aligned

RECIPES = {
    "current": recipe.Float8CurrentScaling,
    "delayed": recipe.DelayedScaling,
    "block": recipe.Float8BlockScaling,
}


@cache
def recipe_of(scaling: Fp8Scaling) -> Any:
    """The recipe's one object: transformer-engine keeps what it derives from one."""
    return RECIPES[scaling]()


def autocast(scaling: Fp8Scaling) -> Any:
    """The context in which products compute; delayed scales move on when it ends, over all ranks."""
    return engine.autocast(recipe=recipe_of(scaling))


class TransformerEngineProduct:
    """x @ weight.T in FP8, for one weight."""

    def __init__(self, weight: Tensor, scaling: Fp8Scaling) -> None:
        out_size, in_size = weight.shape
        self.scaling: Fp8Scaling = scaling
        # On the meta device it allocates nothing. Its own parameter makes room for the weights that come.
        self.linear = engine.Linear(in_size, out_size, bias=False, params_dtype=weight.dtype, device="meta")
        del self.linear.weight

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        require_aligned(x)
        if FP8GlobalStateManager.is_fp8_enabled():
            return self.compute(x, weight)
        # Outside `precision.autocast`: a forward pass that activation checkpointing repeats during backward.
        with autocast(self.scaling):
            return self.compute(x, weight)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        self.linear.fast_setattr("weight", weight)
        try:
            return self.linear(x, is_first_microbatch=REGION.first_micro_batch)
        finally:
            del self.linear.weight

    def state(self) -> dict[str, Tensor]:
        """What the next steps' scales depend on: nothing but under delayed scaling, nothing before the first use."""
        keys = ("scaling_fwd", "scaling_bwd") if self.scaling == "delayed" else ()
        metas = {key: self.linear.fp8_meta[key] for key in keys if key in self.linear.fp8_meta}
        return {
            f"{key}.{part}": getattr(meta, part) for key, meta in metas.items() for part in ("scale", "amax_history")
        }

    def load(self, state: dict[str, Tensor]) -> None:
        with autocast(self.scaling):
            self.linear.init_fp8_metadata()
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
