"""FP8 by torchao's float8 training: tensorwise (`current`) or rowwise scales, emulated on the CPU.

Importing this needs torchao; `precision` does so where it is asked for. On a GPU it pays only under torch.compile,
which merges the casts with what comes before them. Written against torchao 0.18.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torchao.float8 import Float8LinearConfig, Float8TrainingTensor, GemmInputRole, LinearMMConfig
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic

from danube_ray.config import Fp8Scaling
from danube_ray.model.fp8 import FORWARD, REGION, WeightCache, compute_dtype, require_aligned

RECIPES = {"current": "tensorwise", "rowwise": "rowwise"}


class TorchaoProduct:
    """x @ weight.T in FP8, for one weight.

    Under tensorwise scales the weight's cast is kept over the micro-batches of a step. Rowwise scales need it cast
    along both axes, and torchao's product does that itself, each time.
    """

    def __init__(self, weight: Tensor, scaling: Fp8Scaling) -> None:
        named = Float8LinearConfig.from_recipe_name(RECIPES[scaling])
        self.config = dataclasses.replace(named, emulate=weight.device.type == "cpu")
        out_size, in_size = weight.shape
        with torch.device("meta"):  # to see how torchao sets the three multiplications up
            self.multiplications = Float8Linear(in_size, out_size, bias=False, config=self.config).linear_mm_config
        self.caches = scaling == "current"
        self.cache = WeightCache()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        require_aligned(x)
        operand = weight.t()
        if self.caches and REGION.first_micro_batch is not None:
            data, scale = self.cache(lambda: self.cast(operand.detach()))
            operand = CachedOperand.apply(operand, data, scale, self.multiplications)
        return matmul_with_hp_or_float8_args.apply(x.to(compute_dtype(x)), operand, self.multiplications, self.config)

    def cast(self, operand: Tensor) -> tuple[Tensor, Tensor]:
        """The operand (in, out) in FP8, and its scale, as torchao's product would cast it."""
        cast = hp_tensor_to_float8_dynamic(
            operand,
            FORWARD,
            self.multiplications,
            gemm_input_role=GemmInputRole.WEIGHT,
            round_scales_to_power_of_2=self.config.round_scales_to_power_of_2,
        )
        return cast._data, cast._scale


@torch._dynamo.allow_in_graph
class CachedOperand(torch.autograd.Function):
    """The weight's cast in its place; the weight gets the gradient."""

    @staticmethod
    def forward(ctx: Any, operand: Tensor, data: Tensor, scale: Tensor, multiplications: LinearMMConfig) -> Tensor:
        return Float8TrainingTensor(data, scale, operand.dtype, multiplications, GemmInputRole.WEIGHT)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None, None
