"""DeepSpeed's ZeRO as a strategy of the loop: ranks share the moments (stage 1), gradients (2) and weights (3).

DeepSpeed runs as a plain float32 engine: its weights are the master weights, as under DDP, and the precision that the
forward pass computes in stays the caller's affair. The forward pass goes through the bare module: the engine's own
switches any `torch.autocast` around it off on a GPU (deepspeed/runtime/torch_autocast.py).

Bytes a parameter on each of N ranks at the peak of a step (counted, and measured at N = 2 and 4; DDP: 16):

| stage | weights | their master shard | moments | gradients       | sum      | at N = 8 |
| 1     | 4       | 4/N                | 8/N     | 4               | 8 + 12/N | 9.5      |
| 2     | 4       | 4/N                | 8/N     | 4/N, and a copy | 4 + 20/N | 6.5      |
| 3     | 4/N     | 4/N                | 8/N     | 4/N, and a copy | 24/N     | 3        |

Beside them lie buckets of gradients (`BUCKET_ELEMENTS`; two from stage 2 on), and in stage 3 up to 4 GB of gathered
weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from danube_ray.config import LoopConfig, OptimizerConfig, require
from danube_ray.train.checkpoint import MOMENTS, Tensors, trainable
from danube_ray.train.communication import GradientWait
from danube_ray.train.optimizer import build_optimizer
from danube_ray.train.protocol import Context

BUCKET_ELEMENTS = 50_000_000  # gradients that cross the network together: 0.2 GB


class Zero:
    """DeepSpeed's ZeRO of `stage` 1, 2 or 3 around `module`, which lies in float32 on the context's device.

    Every rank of the process group constructs it; a lone process without a group makes its own. Gradients meet in fixed
    buckets, so a run that is resumed with as many workers goes on to the bit.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, context: Context, stage: int) -> None:
        self.deepspeed = import_deepspeed(context.device)
        if not dist.is_initialized():
            backend = "nccl" if context.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.module = self.model = module
        self.rank, self.world_size, self.stage = context.rank, context.world_size, stage
        self.max_grad_norm = config.max_grad_norm
        self.updates = 0
        self.waiting = GradientWait(context.device)
        self._norm = torch.zeros(())
        num_elements = sum(parameter.numel() for parameter in trainable(module).values())
        self.engine, self.optimizer, *_ = self.deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, config),
            config=engine_config(stage, num_elements, context.device),
            dist_init_required=False,
        )
        self.adamw: torch.optim.Optimizer = self.optimizer.optimizer
        # This rank's flat parts of the master weights. AdamW would make their moments at its first step: made here, a
        # checkpoint can be loaded before, and memory that isn't there is missed at once.
        self.shards: list[torch.Tensor] = (
            self.optimizer.fp32_partitioned_groups_flat
            if stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        for shard in self.shards:
            step = torch.zeros((), dtype=torch.float32, device=shard.device)
            self.adamw.state[shard] = {"step": step, **{moment: torch.zeros_like(shard) for moment in MOMENTS}}
        if stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()  # tells each parameter where its moments lie

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        self.optimizer.clear_backward_seen_flag()  # as the engine's forward does: the next backward is a new one
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.waiting.backward(loss * self.world_size, self.engine.backward)  # DeepSpeed averages: undo its division

    def gradient_norm(self) -> torch.Tensor:
        squared = nn.utils.get_total_norm(self._gradients()) ** 2
        self._norm = self.sum_over_ranks(squared).sqrt()
        return self._norm

    def step(self, learning_rate: float) -> None:
        # As torch.nn.utils.clip_grads_with_norm_ does; DeepSpeed's own clipping would ask for the norm again.
        torch._foreach_mul_(self._gradients(), (self.max_grad_norm / (self._norm + 1e-6)).clamp(max=1.0))
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        self.updates += 1

    def discard(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.averaged_gradients.clear()
        if self.stage < 3:
            self.optimizer.all_grad_tensors.clear()  # what stage 2 has accumulated of the micro-batches

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def state(self) -> tuple[Tensors, Tensors]:
        """As `Strategy.state` says: weights live (gathered in stage 3), moments gathered one at a time.

        What is gathered is kept in rank 0's main memory, 8 bytes a parameter (12 in stage 3); a device never holds more
        of it than the largest tensor.
        """
        weights: Tensors = {}
        moments: Tensors = {}
        for name, parameter in trainable(self.module).items():
            if self.stage < 3:
                weights[name] = parameter.detach()
            else:
                self._keep(weights, name, self.deepspeed.utils.safe_get_full_fp32_param(parameter))
            for moment in MOMENTS if self.updates else ():
                full = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)
                self._keep(moments, f"{name}.{moment}", full)
        return weights, moments

    @torch.no_grad()
    def load(self, weights: Tensors, moments: Tensors, updates: int) -> None:
        for shard in self.shards:
            for value in self.adamw.state[shard].values():
                value.zero_()
            self.adamw.state[shard]["step"].fill_(updates)
        for name, parameter in trainable(self.module).items():
            with self.deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.copy_(weights[name])
            for moment in MOMENTS if moments else ():  # none before the first update
                self._set_moment(parameter, moment, moments[f"{name}.{moment}"])
        self.optimizer.refresh_fp32_params()
        self.updates = updates

    def communication_s(self) -> float:
        """Of gradients alone; gathering the updated weights (stage 3: all, in each pass) is not measured."""
        waited_s = self.waiting.take_s()
        return waited_s if self.world_size > 1 else math.nan

    def _gradients(self) -> list[torch.Tensor]:
        """This rank's part of the summed gradient, after the last backward of a step."""
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group]

    def _keep(self, kept: Tensors, name: str, full: torch.Tensor) -> None:
        if self.rank == 0:
            kept[name] = full.cpu()

    def _set_moment(self, parameter: nn.Parameter, moment: str, full: torch.Tensor) -> None:
        if self.stage < 3:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, full, moment)
            return
        # Stage 3 pads what the ranks don't divide, and its setter of full tensors doesn't.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        part = full.flatten()[self.rank * size : (self.rank + 1) * size]
        padded = nn.functional.pad(part, (0, size - part.numel()))
        self.deepspeed.utils.safe_set_local_optimizer_state(parameter, padded, moment)


def engine_config(stage: int, num_elements: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's settings: float32 throughout, no clipping, schedule, timers or messages of its own."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # what it counts samples by, nothing else
        "gradient_accumulation_steps": 1,  # the loop says which micro-batch is the last
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": min(BUCKET_ELEMENTS, num_elements),
            # Stage 1 reduces once a step, the others at every micro-batch, beside the rest of the backward pass.
            "overlap_comm": stage > 1 and device.type == "cuda",
            "compute_grad_norm": stage == 3,  # ours comes before the step; stage 3 insists on its own
        },
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told its device and kept from compiling: nothing here needs its C++ and CUDA extensions.

    Left alone it builds a shared-memory all-reduce for CPUs when it first joins a process group: a C++ compiler and
    20 seconds, for sums in another order than gloo's.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # by which it picks the GPU
    # Its calls of collectives under their old names would be remarked on at each one.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def check_zero(settings: LoopConfig) -> None:
    """Raise `ConfigError` where the settings' ZeRO can't run, before a worker starts. Doesn't import DeepSpeed."""
    parallelism = settings.parallelism
    if parallelism == "ddp":
        return
    remedy = "pip install deepspeed ('danube-ray[gpu]' brings it)"
    installed = importlib.util.find_spec("deepspeed") is not None
    require(installed, "LoopConfig.parallelism", parallelism, "ddp where DeepSpeed is not installed", remedy)
    # Stage 3's hooks fetch and release weights inside every module: torch.compile gives up on each of them.
    remedy = "use zero1 or zero2, or compile=False"
    require(not (settings.compile and parallelism == "zero3"), "LoopConfig.compile", True, "False under zero3", remedy)
