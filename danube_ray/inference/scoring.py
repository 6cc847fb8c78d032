"""Numbers from a model's logits: log-probabilities, and means over tokens with honest error bars.

Tokens of one window depend on each other, so an error bar counts windows, not tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, nan, sqrt

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (NaN where there is only one window)."""

    value: float
    error: float

    def exp(self) -> Estimate:
        """The exponential of the mean (nats a token -> perplexity), its error by the delta method."""
        return Estimate(exp(self.value), exp(self.value) * self.error)


def token_mean(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Mean over all tokens of windows with these sums and counts, and its standard error over the windows.

    The mean is a ratio of two totals; the error is the usual linearised one of a ratio under cluster sampling
    (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    total, size = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean = float(total.sum() / size.sum())
    num_windows = len(total)
    if num_windows < 2:
        return Estimate(mean, nan)
    residual = float(np.square(total - mean * size).sum())
    return Estimate(mean, sqrt(residual * num_windows / (num_windows - 1)) / float(size.sum()))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (T, V) float64 of logits (T, V)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def windows(tokens: np.ndarray, length: int) -> list[list[int]]:
    """Consecutive windows of `length` ids; a last one of at least two ids may be shorter."""
    parts = [tokens[start : start + length].tolist() for start in range(0, len(tokens), length)]
    return [part for part in parts if len(part) > 1]
