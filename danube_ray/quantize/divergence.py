"""How far a quantized model has moved from its reference: KL divergence first, because perplexity alone misranks.

Quantization noise can lower the perplexity of one text by luck; the divergence of the whole distribution cannot go
below zero. The measures are those of llama.cpp's tables (`llama-perplexity --kl-divergence`), which count the second
half of each window alone, and whose errors take tokens as independent: ours are wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from danube_ray.inference.scoring import log_softmax, token_mean

BLOCK_ROWS = 64  # positions at a time in float64: 3 * 64 * V * 8 bytes, 49 MB at 32,000 pieces


@dataclass(frozen=True)
class Divergence:
    """Over `positions` next-token distributions; errors are standard errors over windows. KLD in nats.

    `same_top` is the share (0 to 1) of positions at which both models hold the same token likeliest.
    """

    positions: int
    kld_mean: float
    kld_error: float
    kld_p99: float
    same_top: float
    same_top_error: float
    perplexity: float
    perplexity_error: float
    reference_perplexity: float


@dataclass(frozen=True)
class WindowScores:
    """One window's R positions, each (R,): KLD and both losses in nats, and whether both tops are the same token."""

    kld: np.ndarray
    same: np.ndarray
    loss: np.ndarray
    reference_loss: np.ndarray

    def at(self, chosen: np.ndarray) -> WindowScores:
        """The positions that a mask (R,) marks."""
        return WindowScores(self.kld[chosen], self.same[chosen], self.loss[chosen], self.reference_loss[chosen])


def score(reference: np.ndarray, quantized: np.ndarray, labels: np.ndarray) -> WindowScores:
    """Compare logits (R, V) of both models at R positions whose next tokens are `labels` (R,)."""
    rows = len(labels)
    scores = WindowScores(np.empty(rows), np.empty(rows, dtype=bool), np.empty(rows), np.empty(rows))
    for start in range(0, rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        wanted, got = log_softmax(reference[block]), log_softmax(quantized[block])
        scores.kld[block] = (np.exp(wanted) * (wanted - got)).sum(axis=1)
        scores.same[block] = wanted.argmax(axis=1) == got.argmax(axis=1)
        at = np.arange(len(wanted)), labels[block]
        scores.loss[block], scores.reference_loss[block] = -got[at], -wanted[at]
    return scores


def summarize(windows: Sequence[WindowScores]) -> Divergence:
    """The divergence over all positions of all windows."""
    counts = [len(window.kld) for window in windows]
    kld = token_mean([float(window.kld.sum()) for window in windows], counts)
    same_top = token_mean([float(window.same.sum()) for window in windows], counts)
    perplexity = token_mean([float(window.loss.sum()) for window in windows], counts).exp()
    reference = token_mean([float(window.reference_loss.sum()) for window in windows], counts).exp()
    return Divergence(
        positions=sum(counts),
        kld_mean=kld.value,
        kld_error=kld.error,
        kld_p99=float(np.quantile(np.concatenate([window.kld for window in windows]), 0.99)),
        same_top=same_top.value,
        same_top_error=same_top.error,
        perplexity=perplexity.value,
        perplexity_error=perplexity.error,
        reference_perplexity=reference.value,
    )
