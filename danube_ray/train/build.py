"""A task's model, made ready to train."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from danube_ray.config import LoopConfig
from danube_ray.model.acceleration import checkpoint_activations, compile_blocks, compile_elementwise
from danube_ray.model.precision import check_precision, convert
from danube_ray.train.protocol import Task


class Undrawn(TorchFunctionMode):
    """Within, what draws random numbers into a tensor leaves it as it is."""

    DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWS:
            return args[0] if args else kwargs["tensor"]  # torch.nn.init hands its own on by name
        return func(*args, **kwargs)


def build_module(task: Task, settings: LoopConfig, device: torch.device, drawn: bool = True) -> nn.Module:
    """The task's model on `device`, its fresh weights drawn by the seed, in the precision and ways of the settings.

    Not `drawn`, its fresh weights are anything, for a checkpoint's to take their place: drawing takes 15 s a billion.
    """
    check_precision(settings.precision, device, settings.scaling)
    torch.manual_seed(settings.seed)
    with nullcontext() if drawn else Undrawn():
        module = task.build_model()
    module = convert(module.to(device), settings.precision, settings.scaling)
    if settings.activation_checkpointing:
        checkpoint_activations(module)
    if settings.compile:  # transformer-engine's products can't be compiled, what lies between them can
        compile_elementwise(module) if settings.precision == "fp8-te" else compile_blocks(module)
    return module
