"""How gradients meet across ranks: data parallel here, DeepSpeed's ZeRO in `zero`."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danube_ray.config import LoopConfig, OptimizerConfig
from danube_ray.train.checkpoint import MOMENTS, Tensors, trainable
from danube_ray.train.communication import GradientWait
from danube_ray.train.optimizer import build_optimizer
from danube_ray.train.protocol import Context, Strategy


def build_strategy(module: nn.Module, config: OptimizerConfig, settings: LoopConfig, context: Context) -> Strategy:
    """The strategy that `settings.parallelism` names, around `module` on its device."""
    if settings.parallelism == "ddp":
        return DataParallel(module, config, context, settings.deterministic)
    from danube_ray.train.zero import Zero  # DeepSpeed takes seconds to import, and is an extra

    return Zero(module, config, context, stage=int(settings.parallelism.removeprefix("zero")))


class DataParallel:
    """Every rank holds the whole model; gradients are averaged over ranks while the last micro-batch goes backward.

    `module` is the bare model, `model` what the forward pass calls. `deterministic` fixes DDP's gradient buckets: plain
    DDP regroups them after its first step, so a resumed run of three or more ranks would add in another order.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, context: Context, deterministic: bool) -> None:
        self.module = module
        self.model: nn.Module = module
        self.world_size = context.world_size
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = build_optimizer(module, config)
        self._norm = torch.zeros(())
        self.waiting = GradientWait(context.device) if self.world_size > 1 else None
        if self.world_size > 1:
            devices = [context.device] if context.device.type == "cuda" else None
            self.model = DistributedDataParallel(
                module,
                device_ids=devices,
                gradient_as_bucket_view=True,
                find_unused_parameters=deterministic,
            )

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        scaled = loss * self.world_size  # DDP averages: undo its division
        if self.waiting is None:
            scaled.backward()
        else:
            self.waiting.backward(scaled)

    def gradient_norm(self) -> torch.Tensor:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self._norm = nn.utils.get_total_norm(gradients)
        return self._norm

    def step(self, learning_rate: float) -> None:
        nn.utils.clip_grads_with_norm_(self.module.parameters(), self.max_grad_norm, self._norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def state(self) -> tuple[Tensors, Tensors]:
        parameters = trainable(self.module)
        moments = {
            f"{name}.{moment}": self.optimizer.state[parameter][moment]
            for name, parameter in parameters.items()
            if parameter in self.optimizer.state
            for moment in MOMENTS
        }
        return {name: parameter.detach() for name, parameter in parameters.items()}, moments

    @torch.no_grad()
    def load(self, weights: Tensors, moments: Tensors, updates: int) -> None:
        for name, parameter in trainable(self.module).items():
            parameter.copy_(weights[name])
            self.optimizer.state.pop(parameter, None)
            if f"{name}.{MOMENTS[0]}" in moments:  # none before the first update
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(updates), dtype=torch.float32, device=parameter.device),
                    **{moment: moments[f"{name}.{moment}"].to(parameter.device, copy=True) for moment in MOMENTS},
                }

    def communication_s(self) -> float:
        return math.nan if self.waiting is None else self.waiting.take_s()
