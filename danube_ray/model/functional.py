"""What the model computes between its matrix products, with gradients written by hand.

Autograd chains elementary steps, each of which writes its result to memory, and keeps most of them for the backward
pass. Here a function keeps its inputs and walks over memory as seldom as plain torch can: on the CPU that is a tenth of
a training step of the nano model, and SwiGLU keeps a fifth less of each layer's activations. The loss goes further: it
makes its gradient in the forward pass, chunk by chunk, so that the logits of a batch never exist at once.

Legend: B batch, T time, N tokens of a chunk, E hidden size, F ffn, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

IGNORED = -100  # a label that is not trained

# Logits (N * V) that exist at once. On a CPU they stay in its cache; on a GPU they keep it busy (2,097 tokens of 32,000
# pieces: 0.5 GB) and the head's gradient, as large as its weight, is added to seldom.
CHUNK_LOGITS = {"cpu": 2**19, "cuda": 2**26}

# Cosines, and sines with the sign that each half of a head takes the other with: (T, 1, D) each, fp32.
Rotation = tuple[Tensor, Tensor]
LogitGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension of x (..., E), fp32 throughout."""
    if x.is_cpu:
        return RmsNormOnCpu.apply(x, weight, epsilon)
    return F.rms_norm(x, weight.shape, weight, epsilon)  # one kernel each way


class RmsNormOnCpu(Function):
    """y = x r w with r = 1/rms(x): dw = sum of dy x r, and dx = dy r w - x r^3 mean(dy x w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return own((x * r).mul_(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        dx = gradients[0] * r
        dw = dx * x
        along_x = (dw @ weight)[..., None].mul_(r).mul_(r).div_(-x.shape[-1])
        return dx.mul_(weight).addcmul_(x, along_x), dw.flatten(0, -2).sum(0), None


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate the heads of x (B, T, heads, D) in fp32; a pair is (d, d + D/2), Hugging Face's rotate-half convention."""
    return Rotate.apply(x.float(), *by)


class Rotate(Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return own(turned(x, cosine, sine))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return turned(gradients[0], cosine, -sine), None, None


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, dims=-1).mul_(sine).addcmul_(x, cosine)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of (B, T, F) each."""
    return SwiGlu.apply(gate, up)


class SwiGlu(Function):
    """Computes silu(gate) again in the backward pass rather than keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return own(F.silu(gate).mul_(up))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), F.silu(gate).mul_(gradients[0])


def own(output: Tensor) -> Tensor:
    """What a `Function` returns when its last operation wrote in place: torch 2.11 compiles that to a gradient of zero,
    but not that of a view."""
    return output.view_as(output)


def logit_gradient(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (N, 1), fp32, of the pieces `target` (N, 1) under logits (N, V); and the gradient (N, V), in
    logits' dtype, of its negative by the logits: the probabilities, less 1 at the target."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    of_target = log_p.gather(1, target)
    gradient = log_p.exp_().to(logits.dtype)
    gradient.scatter_(1, target, of_target.expm1().to(logits.dtype))  # p - 1, before it is rounded
    return of_target, gradient


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, gradient_of: LogitGradient = logit_gradient
) -> Tensor:
    """The cross-entropy in nats, an fp32 scalar, of hidden @ weight.T with labels, summed over those not ignored.

    hidden (B, T, E), weight (V, E), labels (B, T) int64. Computes as a linear would, so in autocast's dtype where that
    is on, and sums in fp32. The upstream gradient is a scalar: the sum may be divided, not weighted by token.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat = hidden.flatten(0, 1).to(dtype)
    return CrossEntropySum.apply(flat, weight, labels.flatten(), gradient_of, torch.is_grad_enabled())


class CrossEntropySum(Function):
    """Makes its gradient on the way forward, where a chunk's logits are at hand; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, gradient_of: LogitGradient, with_gradient: bool
    ) -> Tensor:
        trained = (labels != IGNORED)[:, None]
        target, head = labels[:, None].where(trained, 0), weight.to(hidden.dtype)
        log_p = torch.empty_like(target, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradient and weight.requires_grad else None
        for n in chunks(len(hidden), len(weight), hidden.device):
            log_p[n], d_logits = gradient_of(hidden[n] @ head.t(), target[n])
            if with_gradient:
                torch.mm(d_logits, head, out=d_hidden[n])
            if d_weight is not None:
                add_product(d_weight, d_logits.t(), hidden[n] * trained[n])
        if with_gradient:
            ctx.save_for_backward(d_hidden.mul_(trained), d_weight)
            ctx.weight_dtype = weight.dtype
        return -log_p.where(trained, 0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        d_weight = None if d_weight is None else (d_weight * gradients[0]).to(ctx.weight_dtype)
        return d_hidden * gradients[0], d_weight, None, None, None


def chunks(num_tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    size = max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]) // vocab_size)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total += first @ second, where total is fp32 and the others may have fewer bits."""
    if first.dtype == total.dtype:
        total.addmm_(first, second)
    else:
        total += first @ second
