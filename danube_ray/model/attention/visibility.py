"""Who sees whom in a batch, and the forms in which kernels want to hear it: a bool mask, or sequences end to end.

Legend: B batch, T time, H query heads, K kv heads, D head dim, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Kernels work on tiles of 64 to 128 queries: a bound below that saves nothing.
TILE_TOKENS = 128


class Attend(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k' / sqrt(D)) v (B, T, H, D) over what is visible; q (B, T, H, D), k and v (B, T, K, D)."""
        ...


@dataclass(frozen=True)
class Packed:
    """A batch (B, T) as sequences that lie end to end in B*T tokens.

    `cu_seqlens` (N + 1,) int32, on the batch's device, is where each begins, then B*T; None where every row is one
    sequence. None is longer than `longest`. `window` is None where it hides nothing.
    """

    cu_seqlens: Tensor | None
    longest: int
    window: int | None


@dataclass(frozen=True)
class Visibility:
    """Position i of a row of T sees j when j <= i, i - j < `window` (Mistral's rule: itself and the window - 1 before
    it), and both carry the same id in `document_ids` (B, T), which don't decrease along a row."""

    batch_size: int
    length: int
    window: int | None  # None where it hides nothing
    document_ids: Tensor | None
    device: torch.device

    @classmethod
    def of(
        cls, batch_size: int, length: int, window: int | None, document_ids: Tensor | None, device: torch.device
    ) -> Visibility:
        """Of a batch (B, T) on `device`; a window as long as the rows is dropped, so that the plain kernels run."""
        hides = window is not None and window < length
        return cls(batch_size, length, window if hides else None, document_ids, device)

    @property
    def masked(self) -> bool:
        return self.window is not None or self.document_ids is not None

    def mask(self) -> Tensor | None:
        """What each position (row) may see, bool (B or 1, 1, T, T), or None where plain causal order says all."""
        if not self.masked:
            return None
        position = torch.arange(self.length, device=self.device)
        distance = position[:, None] - position[None, :]  # (T, T): how far back the column lies
        visible = (distance >= 0) & (distance < (self.window or self.length))
        if self.document_ids is None:
            return visible[None, None]
        ids = self.document_ids.to(self.device, non_blocking=True)
        return ((ids[:, :, None] == ids[:, None, :]) & visible)[:, None]

    def packed(self) -> Packed:
        """The batch's documents as sequences.

        Their number is a shape, so it must be known here: ids on a GPU are waited for, once a forward pass. A table
        padded to a fixed length would not wait, but every empty sequence costs each layer a row of thread blocks and,
        in flash-attention's backward pass, 128 rows of fp32 scratch.
        """
        if self.document_ids is None:
            return Packed(None, self.length, self.window)
        begins = torch.ones_like(self.document_ids, dtype=torch.bool)
        begins[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        starts = begins.flatten().nonzero().flatten()  # (N,)
        if len(starts) == self.batch_size:
            return Packed(None, self.length, self.window)
        cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=begins.numel()).to(torch.int32)
        # Few values, so that what is compiled or planned for one serves many batches: powers of two, T/4 at least.
        longest = max(TILE_TOKENS, self.length // 4, int(cu_seqlens.diff().max()))
        longest = min(self.length, 1 << (longest - 1).bit_length())
        window = self.window if self.window is not None and self.window < longest else None
        return Packed(cu_seqlens.to(self.device, non_blocking=True), longest, window)
