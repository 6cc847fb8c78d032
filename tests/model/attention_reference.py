"""Attention as its formula says, in float64, for every kernel to be held against. Legend: B, T, H, K, D as there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danube_ray.model.attention import Attend


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None, document_ids: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(D)) v with every rule spelled out; window W is the query and the W - 1 before it."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    position = torch.arange(q.shape[1], device=q.device)
    hidden = position[None, :] > position[:, None]  # (T, T): what comes later
    if window is not None:
        hidden = hidden | (position[None, :] <= position[:, None] - window)
    if document_ids is not None:
        hidden = hidden | (document_ids[:, :, None] != document_ids[:, None, :])[:, None]
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def packed_ids(rows: list[list[int]], device: str = "cpu") -> Tensor:
    """Document ids (B, T) of rows given as the lengths of their documents."""
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    return torch.stack(ids).to(device)


@dataclass(frozen=True)
class Run:
    """The heads and the gradients of q, k and v under one random gradient of the heads."""

    heads: Tensor
    gradients: tuple[Tensor, ...]


def inputs(
    batch_size: int, length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient that the heads will get. v is a slice of a wider tensor, as a joint projection's is."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    num_heads, num_kv_heads = heads
    q, k = draw(batch_size, length, num_heads, head_dim), draw(batch_size, length, num_kv_heads, head_dim)
    v = draw(batch_size, length, (num_kv_heads + 1) * head_dim)[..., head_dim:].unflatten(-1, (num_kv_heads, head_dim))
    return [q, k, v], draw(batch_size, length, num_heads, head_dim)


def run(attend: Attend, qkv: list[Tensor], upstream: Tensor) -> Run:
    leaves = [part.detach().requires_grad_() for part in qkv]
    heads = attend(*leaves)
    return Run(heads.detach(), torch.autograd.grad(heads, leaves, upstream.to(heads.dtype)))


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN anywhere is infinitely far."""
    error = (found.double() - expected).norm() / expected.norm()
    return error.item() if torch.isfinite(error) else float("inf")
