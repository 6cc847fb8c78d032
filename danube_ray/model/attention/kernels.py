"""The five kernels: how each wants to hear who sees whom, and its call.

An instance is one forward pass's state, shared by all layers. What a kernel can't do stands in `machine`. Importing
this imports torch's compiler, which takes seconds: `prepare` does so when the first forward pass comes.

Legend: B batch, T time, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from danube_ray.config import AttentionBackend, ModelConfig
from danube_ray.model.attention.choice import announce, choose
from danube_ray.model.attention.machine import Need, machine_of
from danube_ray.model.attention.visibility import Attend, Packed, Visibility

# torch 2.13 asks whether kv heads may be fewer; before, its kernels took them without asking.
VARLEN_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def eager(function: FunctionT) -> FunctionT:
    """`function`, left out of the graph that torch.compile makes of what is around it."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


class Kernel(Attend, Protocol):
    @classmethod
    def prepare(cls, visibility: Visibility) -> Attend: ...


@dataclass(frozen=True)
class Sdpa:
    """torch's scaled_dot_product_attention: the reference, everywhere. A mask costs T*T bytes a row of the batch."""

    mask: Tensor | None

    @classmethod
    def prepare(cls, visibility: Visibility) -> Sdpa:
        mask = visibility.mask()
        if mask is not None and mask.is_cpu:  # what torch's CPU kernel adds to the scores: made here, not in each layer
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        return cls(mask)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if self.mask is not None and q.is_cuda:
            # Of the CUDA kernels that take a mask, the memory-efficient one wants equal head counts.
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        heads = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return heads.transpose(1, 2)


@dataclass(frozen=True)
class Flash:
    """The flash-attn package (FlashAttention-2)."""

    packed: Packed

    @classmethod
    def prepare(cls, visibility: Visibility) -> Flash:
        return cls(of_any_number(visibility.packed()))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        starts, longest, window = self.packed.cu_seqlens, self.packed.longest, left_and_right(self.packed.window)
        exact = torch.are_deterministic_algorithms_enabled()
        options: dict[str, Any] = {"causal": True, "window_size": window, "deterministic": exact}
        if starts is None:
            return flash_attn_func(q, k, v, **options)
        flat = end_to_end(q, k, v)
        return flash_attn_varlen_func(*flat, starts, starts, longest, longest, **options).view(q.shape)


@dataclass(frozen=True)
class Varlen:
    """torch's own FlashAttention-2 over sequences that lie end to end; it follows torch's deterministic mode."""

    packed: Packed

    @classmethod
    def prepare(cls, visibility: Visibility) -> Varlen:
        logging.getLogger("torch.nn.attention.varlen").setLevel(logging.WARNING)  # it tells of every call
        packed, rows, length = visibility.packed(), visibility.batch_size, visibility.length
        if packed.cu_seqlens is None:
            ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=visibility.device)
            packed = replace(packed, cu_seqlens=ends)
        return cls(of_any_number(packed))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts, longest, window = self.packed.cu_seqlens, self.packed.longest, left_and_right(self.packed.window)
        assert starts is not None
        flat_q, flat_k, flat_v = end_to_end(q, k, v)
        heads: Any = varlen_attn(
            flat_q, flat_k, flat_v, starts, starts, longest, longest, window_size=window, **VARLEN_GROUPED
        )
        return heads.view(q.shape)


@dataclass(frozen=True)
class TransformerEngine:
    """transformer-engine's DotProductAttention, held to its cuDNN kernels, in 16 bits whatever the linears compute in.

    cuDNN plans a kernel for a number of sequences, so their table is filled up with empty ones to a power of two.
    """

    packed: Packed

    @classmethod
    def prepare(cls, visibility: Visibility) -> TransformerEngine:
        packed = visibility.packed()
        if packed.cu_seqlens is not None:
            sequences = len(packed.cu_seqlens) - 1
            empty = max(32, 1 << (sequences - 1).bit_length()) - sequences
            end = visibility.batch_size * visibility.length
            packed = replace(packed, cu_seqlens=F.pad(packed.cu_seqlens, (0, empty), value=end))
        return cls(packed)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_with_cudnn(self.packed, q, k, v)


@eager  # transformer-engine's own graphs need more than torch 2.11 to 2.13 have
def attend_with_cudnn(packed: Packed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from transformer_engine import pytorch as engine  # pyright: ignore[reportMissingImports]

    attend, shape = dot_product_attention(q.shape[-2], k.shape[-2], q.shape[-1]), q.shape
    options: dict[str, Any] = {"window_size": left_and_right(packed.window)}
    if packed.cu_seqlens is None:
        options |= {"qkv_format": "bshd", "attn_mask_type": "causal"}
    else:
        q, k, v = end_to_end(q, k, v)
        options |= {"qkv_format": "thd", "attn_mask_type": "padding_causal"}
        options |= {"cu_seqlens_q": packed.cu_seqlens, "cu_seqlens_kv": packed.cu_seqlens}
        options |= {"max_seqlen_q": packed.longest, "max_seqlen_kv": packed.longest}
    with engine.autocast(enabled=False):
        return attend(q, k, v, **options).view(shape)


@cache
def dot_product_attention(num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    """One module for all layers: it has no weights, and outside the model it leaves the state dict alone."""
    # Its other kernels are flash-attn's, which `flash` calls without detour, and one that holds all T*T scores.
    os.environ.setdefault("NVTE_FLASH_ATTN", "0")
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    from transformer_engine import pytorch as engine  # pyright: ignore[reportMissingImports]

    return engine.DotProductAttention(num_heads, head_dim, num_gqa_groups=num_kv_heads)


@dataclass(frozen=True)
class Flex:
    """torch's FlexAttention: a Triton kernel compiled for the mask; on CPUs without compilation, and forward only."""

    block_mask: BlockMask
    kernel: Callable[..., Any]

    @classmethod
    def prepare(cls, visibility: Visibility) -> Flex:
        window = visibility.window or visibility.length
        ids = visibility.document_ids
        ids = None if ids is None else ids.to(visibility.device, non_blocking=True)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = (j <= i) & (i - j < window)
            return seen if ids is None else seen & (ids[b, i] == ids[b, j])

        rows = None if ids is None else visibility.batch_size
        make_mask, kernel = compiled_flex() if visibility.device.type == "cuda" else (create_block_mask, flex_attention)
        length = visibility.length
        return cls(make_mask(visible, rows, None, length, length, device=visibility.device), kernel)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        return self.kernel(q, k, v, block_mask=self.block_mask, enable_gqa=True).transpose(1, 2)


@cache
def compiled_flex() -> tuple[Callable[..., BlockMask], Callable[..., Any]]:
    """Without compilation both hold all T*T scores."""
    return torch.compile(create_block_mask), torch.compile(flex_attention)


KERNELS: dict[str, type[Kernel]] = {
    "flash": Flash,
    "te": TransformerEngine,
    "varlen": Varlen,
    "flex": Flex,
    "sdpa": Sdpa,
}


@eager  # it asks the machine and may wait for the GPU: nothing that a graph could hold
def prepare(name: AttentionBackend, config: ModelConfig, x: Tensor, document_ids: Tensor | None) -> Attend:
    """See the package's `prepare`."""
    batch_size, length = x.shape[:2]
    visibility = Visibility.of(batch_size, length, config.sliding_window, document_ids, x.device)
    need = Need(
        dtype=compute_dtype(x),
        head_dim=config.head_dim,
        training=torch.is_grad_enabled(),
        masked=visibility.masked,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    choice = choose(name, need, machine_of(x.device))
    announce(choice)
    return KERNELS[choice.name].prepare(visibility)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What queries and keys come in: autocast's dtype where it is on, but fp32 on CPUs (`transformer.Attention`)."""
    device = x.device.type
    if device == "cpu":
        return torch.float32
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def left_and_right(window: int | None) -> tuple[int, int]:
    """How flash-attn, torch and cuDNN count a causal window: keys before and after the query, itself not among them."""
    return (-1, 0) if window is None else (window - 1, 0)


def of_any_number(packed: Packed) -> Packed:
    """Tell torch.compile not to compile anew for each number of documents."""
    if packed.cu_seqlens is not None:
        torch._dynamo.maybe_mark_dynamic(packed.cu_seqlens, 0)
    return packed


def end_to_end(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, heads, D) as (B*T, heads, D)."""
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
