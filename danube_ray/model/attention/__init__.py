"""Causal attention with grouped key-value heads, a sliding window and a document mask: one call over five kernels.

    attend = prepare("auto", config, x, document_ids)   # once a forward pass: who sees whom, as the kernel wants it
    heads = attend(q, k, v)                             # in every layer: softmax(q k' / sqrt(D)) v

q is (B, T, H, D), k and v are (B, T, K, D) with H a multiple of K; query heads h*H/K .. (h+1)*H/K - 1 read kv head h,
as in Llama. The result is (B, T, H, D) in q's dtype.

Legend: B batch, T time, E hidden size, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danube_ray.config import AttentionBackend, ModelConfig, Precision
from danube_ray.model.attention.choice import BACKENDS, Choice, choose
from danube_ray.model.attention.machine import Machine, Need, machine_of, refusal
from danube_ray.model.attention.visibility import Attend, Visibility

__all__ = [
    "BACKENDS",
    "Attend",
    "Choice",
    "Machine",
    "Need",
    "Visibility",
    "check_attention",
    "choose",
    "machine_of",
    "prepare",
    "refusal",
]


def prepare(name: AttentionBackend, config: ModelConfig, x: Tensor, document_ids: Tensor | None) -> Attend:
    """How every layer attends in a forward pass over hidden states `x` (B, T, E).

    `document_ids` (B, T) don't decrease along a row; a position sees only its own document. Where they lie on a GPU,
    flash, te and varlen wait for it here, once; where they are left on the CPU, nothing does. The window is read from
    `config` each time: a stage may change it. Raises `ConfigError` where the named backend can't serve.
    """
    from danube_ray.model.attention import kernels  # with torch's compiler: seconds that reading a model needn't spend

    return kernels.prepare(name, config, x, document_ids)


def check_attention(
    name: AttentionBackend,
    head_dim: int,
    precision: Precision,
    device: torch.device,
    *,
    deterministic: bool = False,
) -> Choice:
    """What training packed documents on `device` will attend with, and why; `ConfigError` where `name` can't.

    For the start of a run, before data is read, and for `danube doctor`.
    """
    in_full = precision == "fp32" or device.type == "cpu"
    need = Need(
        dtype=torch.float32 if in_full else torch.bfloat16,
        head_dim=head_dim,
        training=True,
        masked=True,
        deterministic=deterministic,
    )
    return choose(name, need, machine_of(device))
