"""Readers: from a step, a rank and a world size to that rank's rows of the global batch.

A reader is a pure function of its arguments. It holds paths and settings only, so that it pickles small, and maps the
shards where it runs. Rows of the global batch are dealt in contiguous runs: rank r has slots [r * n, (r + 1) * n) with
n = ceil(rows / world_size), the same for every rank; a rank that runs out gets zero rows of weight 0.

Shapes: n rows of a rank, S sequence length (a row has S + 1 tokens: the last is only a label).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from danube_ray.artifacts import read_manifest
from danube_ray.config import RunConfig, require
from danube_ray.data.plan import MixturePlan
from danube_ray.data.shards import TokenStore, open_sources, open_validation, store_sizes, token_dtype


def rank_rows(rows: int, rank: int, world_size: int) -> tuple[range, int]:
    """The rows of a batch that `rank` has, and how many it must hand over, padding included."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    share = -(-rows // world_size)
    return range(min(rows, rank * share), min(rows, (rank + 1) * share)), share


class MixtureReader:
    """Pretraining batches: the plan's windows, gathered from the memory-mapped shards under `run.tokens_dir`.

    Raises `ConfigError` before any work when the folder is missing, was made with a vocabulary of another size than the
    model's, or doesn't hold what the plan needs.
    """

    def __init__(self, run: RunConfig) -> None:
        self._stores = open_sources(Path(run.tokens_dir))
        vocab_size, model = read_manifest(Path(run.tokens_dir))["vocab_size"], run.model.vocab_size
        remedy = "tokenize with another tokenizer, or build the model for this one"
        require(vocab_size == model, f"vocabulary of {run.tokens_dir}", vocab_size, f"the model's {model}", remedy)
        self._dtype = token_dtype(vocab_size)
        self.plan = MixturePlan(run, store_sizes(self._stores))
        self.plan.check()
        self.num_steps = self.plan.num_steps

    def __call__(self, step: int, rank: int, world_size: int) -> dict[str, np.ndarray]:
        """{"tokens": (n, S + 1) uint16 or uint32, "weight": (n,) uint8} of 0-based `step`."""
        rows, share = rank_rows(self.plan.windows_per_step(step), rank, world_size)
        length = self.plan.sequence_length(step)
        tokens, weight = np.zeros((share, length + 1), self._dtype), np.zeros(share, np.uint8)
        for row, slot in enumerate(rows):
            window = self.plan.window(step, slot)
            tokens[row] = self._stores[window.source][window.bucket].read(window.start_token, length + 1)
        weight[: len(rows)] = 1
        return {"tokens": tokens, "weight": weight}


class ValidationReader:
    """A source's held-out windows, at most `max_windows`, spread evenly over its text; `batch_windows` a batch."""

    def __init__(
        self, tokens_dir: Path, source: str, sequence_length: int, max_windows: int, batch_windows: int = 8
    ) -> None:
        stores = open_validation(tokens_dir)
        require(source in stores, "validation source", source, f"one of {', '.join(stores)}", "tokenize it")
        self._store: TokenStore = stores[source]
        self._length = sequence_length
        available = max(0, self._store.num_tokens - 1) // sequence_length
        need, remedy = f"at least {sequence_length + 1:,}", "give the source more text, or shorten the sequences"
        require(available > 0, f"held-out tokens of source {source!r}", self._store.num_tokens, need, remedy)
        count = min(available, max_windows)
        self._starts = [index * available // count * sequence_length for index in range(count)]
        self._batch = batch_windows
        self.num_steps = -(-count // batch_windows)

    def __call__(self, step: int, rank: int, world_size: int) -> dict[str, np.ndarray]:
        """{"tokens": (n, S + 1), "weight": (n,)} of batch `step`, as `MixtureReader` gives them."""
        starts = self._starts[step * self._batch : (step + 1) * self._batch]
        rows, share = rank_rows(len(starts), rank, world_size)
        tokens, weight = np.zeros((share, self._length + 1), self._store.dtype), np.zeros(share, np.uint8)
        for row, slot in enumerate(rows):
            tokens[row] = self._store.read(starts[slot], self._length + 1)
        weight[: len(rows)] = 1
        return {"tokens": tokens, "weight": weight}
