"""Causal attention with grouped key-value heads, a sliding window and a document mask: who sees whom, and the product.

Legend: B batch, T time, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visibility(
    sequence_length: int,
    *,
    sliding_window: int | None,
    document_ids: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """The bool mask (B or 1, 1, T, T) of what each position (row) may see, or None where plain causal order says all.

    Position i sees j when j <= i, when i - j < `sliding_window` (Mistral's rule: itself and the window - 1 before it),
    and when both carry the same id in `document_ids` (B, T). Made once a forward pass, shared by every layer.
    """
    window = sequence_length if sliding_window is None else min(sliding_window, sequence_length)
    if document_ids is None and window == sequence_length:
        return None
    position = torch.arange(sequence_length, device=device)
    distance = position[:, None] - position[None, :]  # (T, T): how far back the column lies
    visible = (distance >= 0) & (distance < window)
    if document_ids is None:
        return visible[None, None]
    same_document = document_ids[:, :, None] == document_ids[:, None, :]  # (B, T, T)
    return (same_document & visible)[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the visible positions, through torch's SDPA.

    q (B, T, H, D), k and v (B, T, K, D) with H a multiple of K; `visible` as `visibility` makes it. Returns
    (B, T, H, D) in q's dtype. Query heads h*H/K .. (h+1)*H/K - 1 read kv head h, as in Llama.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    if visible is not None and q.is_cuda:
        # Of the CUDA kernels that take a mask, the memory-efficient one wants equal head counts.
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    heads = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return heads.transpose(1, 2)
