"""Losses as sums over the trained positions, so that the loop can weigh every token of a step alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def trained_labels(tokens: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) of tokens (B, T+1): the next token where `trained` (B, T+1) marks it, -100 elsewhere."""
    return tokens[:, 1:].masked_fill(~trained[:, 1:], -100)


def sequence_log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability (B,) of each row's trained labels. Logits (B, T, V), labels (B, T); float32 inside."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return -losses.sum(dim=1)


def document_ids(tokens: torch.Tensor, bos_id: int) -> torch.Tensor:
    """Which document each position belongs to, (B, T): a document begins at its `<s>`."""
    return (tokens == bos_id).cumsum(dim=1)
