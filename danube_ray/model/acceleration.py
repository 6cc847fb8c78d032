"""What a built model may be told before it trains: recompute instead of keep, and compile.

All work in place, on a bare model or one with adapters, and before DDP or DeepSpeed wrap it. Parameters, their names
and the state dict stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from danube_ray.model.transformer import MLP, Attention, Decoder, Head, Layer, RMSNorm

# Versions that torch keeps of one compiled function before it gives up and runs it eagerly; its own limit is 8. A
# layer's are: lengths of the stages x training, validation x plain, masked x FP8, the guard's bf16.
MAX_VERSIONS = 64


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only each layer's input for the backward pass and compute the layer again there: a third more compute.

    Gradients stay the same to the bit. A forward pass without gradient is unchanged.
    """
    for module in model.modules():
        if isinstance(module, Decoder):
            module.checkpoint_layers = True


def compile_blocks(model: nn.Module) -> None:
    """Compile each layer, and what the loss computes of a chunk's logits, with torch.compile.

    Layers share their compiled code. Each length of sequence is compiled anew, when it first comes. For fp8-te see
    `compile_elementwise`.
    """
    options = compile_options()
    for module in model.modules():
        if isinstance(module, Layer):
            module.compile(**options)
        elif isinstance(module, Head):
            module.logit_gradient = torch.compile(module.logit_gradient, **options)


def compile_elementwise(model: nn.Module) -> None:
    """Compile what lies between the matrix products, where they can't be compiled: under fp8-te.

    Norms, RoPE, SwiGLU and the loss each become one kernel forward and one or two backward.
    """
    options = compile_options()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.compile(**options)
        elif isinstance(module, Attention):
            module.rotate = torch.compile(module.rotate, **options)
        elif isinstance(module, MLP):
            module.activate = torch.compile(module.activate, **options)
        elif isinstance(module, Head):
            module.logit_gradient = torch.compile(module.logit_gradient, **options)


def compile_options() -> dict[str, Any]:
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_VERSIONS)
    return {"dynamic": False}
