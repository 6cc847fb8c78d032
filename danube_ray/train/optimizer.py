"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from danube_ray.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; weight decay on matrices, none on norms."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of `step` (0-based): linear warm-up, then the schedule, from the peak to the minimum at the end.

    Cosine falls all the way; wsd holds the peak and falls linearly over the last `decay_fraction` of all steps, or
    over what the warm-up leaves of them; constant never falls.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    steps_after_warmup = max(1, num_steps - config.warmup_steps)
    left = max(0, num_steps - step)
    if config.schedule == "cosine":
        height = 0.5 * (1 - math.cos(math.pi * left / steps_after_warmup))
    elif config.schedule == "wsd":
        height = min(1.0, left / min(steps_after_warmup, max(1, round(config.decay_fraction * num_steps))))
    else:
        height = 1.0
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)
