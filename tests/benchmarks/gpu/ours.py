"""The package's own training step, built and called as the loop does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from danube_ray.config import LoopConfig, OptimizerConfig, RunConfig
from danube_ray.model.attention import check_attention
from danube_ray.train.build import build_module
from danube_ray.train.context import LocalContext
from danube_ray.train.optimizer import learning_rate_at
from danube_ray.train.pretrain import PretrainTask
from danube_ray.train.protocol import Batch, Context
from danube_ray.train.step import accumulate
from danube_ray.train.strategy import DataParallel


class Ours:
    """`PretrainTask` under `DataParallel` in this process alone."""

    def __init__(self, run: RunConfig, device: torch.device, optimizer_shards: int = 1) -> None:
        self.run, self.optimizer_shards = run, optimizer_shards
        self.task, self.context, self.step = PretrainTask(run), LocalContext(), 0
        self.context.device = device
        with device:  # drawn there: minutes sooner than on the CPU
            module = build_module(self.task, run.loop, device)
        self.strategy = OneOfMany(module, run.optimizer, self.context, optimizer_shards)
        self.task.enter_step(module, 0)

    def train(self, batch: Batch) -> tuple[float | Tensor, float | Tensor]:
        run = self.task.run
        gradient = accumulate(self.task, self.strategy, batch, self.step, run.loop, self.context)
        self.strategy.step(learning_rate_at(self.step, run.num_steps, run.optimizer))
        self.step += 1
        return gradient.loss, gradient.norm

    def tensors(self) -> list[Tensor]:
        weights, moments = self.strategy.state()
        return [*weights.values(), *moments.values()]

    def facts(self) -> dict[str, Any]:
        loop, head_dim = self.run.loop, self.run.model.head_dim
        choice = check_attention(loop.attention, head_dim, loop.precision, self.context.device)
        return {
            "contestant": "danube_ray",
            "precision": loop.precision,
            "fp8_scaling": loop.scaling,
            "attention": choice.name,
            "attention_reason": choice.reason,
            "compile": compiled(loop),
            "activation_checkpointing": loop.activation_checkpointing,
            "weights": "float32",
            "optimizer": optimizer_name(self.optimizer_shards),
        }


def compiled(loop: LoopConfig) -> str:
    """What torch.compile sees; it can't trace transformer-engine's linears."""
    if not loop.compile:
        return "no"
    return "what lies between the linears" if loop.precision == "fp8-te" else "each block"


def optimizer_name(shards: int) -> str:
    if shards == 1:
        return "fused AdamW on all parameters, float32 moments"
    return f"fused AdamW on 1 of {shards} parts (as a rank of ZeRO-1, whose exchange is not measured), float32 moments"


class OneOfMany(DataParallel):
    """Data parallel with the optimizer's share of one of `shards` ranks: a stand-in for ZeRO-1 on one GPU.

    All gradients are computed and counted in the norm; only the first part of the parameters is updated, and nothing
    is exchanged.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, context: Context, shards: int) -> None:
        super().__init__(module, config, context, deterministic=False)
        keep_share(self.optimizer, shards)

    def discard(self) -> None:
        self.module.zero_grad(set_to_none=True)


def keep_share(optimizer: torch.optim.Optimizer, shards: int) -> None:
    """Drop parameters from the optimizer until it has a `shards`-th of their numbers, rounded up to whole tensors."""
    left = sum(p.numel() for group in optimizer.param_groups for p in group["params"]) / shards
    for group in optimizer.param_groups:
        kept = []
        for parameter in group["params"]:
            if left > 0:
                kept.append(parameter)
                left -= parameter.numel()
        group["params"] = kept
