"""How ranks share the work of a step: who averages gradients, clips and steps.

`DataParallel` runs one process alone or many under torch's DDP. What ZeRO does differently fits behind the same calls.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danube_ray.config import OptimizerConfig
from danube_ray.train.optimizer import build_optimizer
from danube_ray.train.protocol import Context


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
        if self.world_size > 1:
            devices = [context.device] if context.device.type == "cuda" else None
            self.model = DistributedDataParallel(
                module,
                device_ids=devices,
                gradient_as_bucket_view=True,
                find_unused_parameters=deterministic,
            )

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: gradients cross the network only with the last one."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, this rank's part of a sum over ranks (DDP averages, so undo its division)."""
        (loss * self.world_size).backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip, step and clear the gradients; the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """`value` summed over all ranks, on every rank (in place)."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value
