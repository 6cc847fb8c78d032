"""How far a quantized model has moved from its reference: KL divergence first, because perplexity alone misranks.

Quantization noise can lower the perplexity of one text by luck; the divergence of the whole distribution cannot go
below zero. The measures are those of llama.cpp's tables (`llama-perplexity --kl-divergence`).
"""

from __future__ import annotations

from collections.abc import Iterable
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


def compare(pairs: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Divergence:
    """Divergence from windows of (reference logits (T, V), quantized logits (T, V), ids (T,)).

    The last position of a window predicts nothing that is known, so T - 1 count. One window is held at a time.
    """
    kld_sums, same_sums, losses, reference_losses, counts = [], [], [], [], []
    divergences: list[np.ndarray] = []
    for reference, quantized, ids in pairs:
        kld, same, loss, reference_loss = _window(reference[:-1], quantized[:-1], np.asarray(ids[1:], dtype=np.int64))
        divergences.append(kld.astype(np.float32))
        kld_sums.append(float(kld.sum()))
        same_sums.append(same)
        losses.append(loss)
        reference_losses.append(reference_loss)
        counts.append(len(kld))
    kld_mean, same_top = token_mean(kld_sums, counts), token_mean(same_sums, counts)
    perplexity = token_mean(losses, counts).exp()
    return Divergence(
        positions=sum(counts),
        kld_mean=kld_mean.value,
        kld_error=kld_mean.error,
        kld_p99=float(np.quantile(np.concatenate(divergences), 0.99)),
        same_top=same_top.value,
        same_top_error=same_top.error,
        perplexity=perplexity.value,
        perplexity_error=perplexity.error,
        reference_perplexity=token_mean(reference_losses, counts).exp().value,
    )


def _window(reference: np.ndarray, quantized: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """KL(reference || quantized) at each position (T,), positions with the same top, and both losses, summed."""
    kld = np.empty(len(labels))
    same = loss = reference_loss = 0.0
    for start in range(0, len(labels), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        wanted, got = log_softmax(reference[rows]), log_softmax(quantized[rows])
        kld[rows] = (np.exp(wanted) * (wanted - got)).sum(axis=1)
        same += float((wanted.argmax(axis=1) == got.argmax(axis=1)).sum())
        at = np.arange(len(wanted)), labels[rows]
        loss -= float(got[at].sum())
        reference_loss -= float(wanted[at].sum())
    return kld, same, loss, reference_loss
