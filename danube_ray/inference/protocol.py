"""What evaluation asks of a model, whatever runs it: token ids in, logits, log-probabilities and token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class LanguageModel(Protocol):
    """A causal language model over token ids. T tokens a sequence, at most `context_length`; V is `vocab_size`."""

    vocab_size: int
    context_length: int
    eos_id: int

    def logits(self, ids: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Next-token logits at every position of one sequence: (T, V) float32; or only at `rows`, ascending."""
        ...

    def log_probs(self, batch: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each sequence, the log-probability (nats) of every token but its first: (T - 1,) float32 each."""
        ...

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> list[int]:
        """Up to `max_tokens` new ids after the prompt `ids`, ending before the end-of-sequence id.

        Temperature 0 takes the likeliest token. `repetition_penalty` (CTRL, Keskar et al., 2019; Danube's evaluation
        uses 1.1) divides positive and multiplies negative logits of every token in prompt and answer so far.
        """
        ...
