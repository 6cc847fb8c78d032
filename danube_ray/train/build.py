"""A task's model, made ready to train."""

from __future__ import annotations

import torch
from torch import nn

from danube_ray.config import LoopConfig
from danube_ray.model.acceleration import checkpoint_activations, compile_blocks, compile_elementwise
from danube_ray.model.precision import check_precision, convert
from danube_ray.train.protocol import Task


def build_module(task: Task, settings: LoopConfig, device: torch.device) -> nn.Module:
    """The task's model on `device`, its fresh weights drawn by the seed, in the precision and ways of the settings."""
    check_precision(settings.precision, device, settings.scaling)
    torch.manual_seed(settings.seed)
    module = convert(task.build_model().to(device), settings.precision, settings.scaling)
    if settings.activation_checkpointing:
        checkpoint_activations(module)
    if settings.compile:  # transformer-engine's products can't be compiled, what lies between them can
        compile_elementwise(module) if settings.precision == "fp8-te" else compile_blocks(module)
    return module
