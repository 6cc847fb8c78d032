"""An encoder that tells good passages from raw ones, as a task of the loop."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from danube_ray.artifacts import content_hash, file_hash
from danube_ray.config import EncoderConfig
from danube_ray.data.permutation import permutation
from danube_ray.data.windows import rank_rows
from danube_ray.train.checkpoint import MODEL
from danube_ray.train.initial import weights_hashes
from danube_ray.train.protocol import Batch, StepReader, TensorBatch

TOKENIZER = "tokenizer.json"


def write_passages(path: Path, tokens: Sequence[Sequence[int]], good: np.ndarray) -> None:
    """What `PassageReader` reads: N token sequences and whether each is good, (N,) bool."""
    columns = {"tokens": pa.array(tokens, pa.list_(pa.int32())), "good": pa.array(good, pa.bool_())}
    pq.write_table(pa.table(columns), path)


class PassageReader:
    """A `StepReader` over labelled passages, read when it is made; each epoch has a keyed order of its own.

    Both classes weigh the same, whatever their numbers.
    """

    def __init__(self, data: Path, *, batch_size: int, epochs: float, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        table = pq.read_table(data)
        self._tokens = [np.array(tokens, np.int32) for tokens in table["tokens"].to_pylist()]
        self._good = table["good"].to_numpy(zero_copy_only=False).astype(bool)
        share = self._good.mean()
        self._weights = np.where(self._good, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)
        self._num_rows = max(1, round(epochs * len(self._tokens)))
        self.num_steps = -(-self._num_rows // batch_size)
        self.hash = content_hash([file_hash(data), batch_size, epochs, seed])

    def __call__(self, step: int, rank: int, world_size: int) -> Batch:
        """tokens (n, T) int32, seen (n, T) uint8, good (n,) float32, weight (n,) float32; T is the step's longest.

        Rows come in the order of their lengths, so that micro-batches hold little padding once cut to their longest.
        """
        rows = sorted(map(self._passage, self._rows(step)), key=lambda row: len(self._tokens[row]))
        length = len(self._tokens[rows[-1]])
        own, share = rank_rows(len(rows), rank, world_size)
        batch = {
            "tokens": np.zeros((share, length), np.int32),
            "seen": np.zeros((share, length), np.uint8),
            "good": np.zeros(share, np.float32),
            "weight": np.zeros(share, np.float32),
        }
        batch["seen"][:, 0] = 1  # a row of padding has to attend to something
        for place, row in enumerate(rows[number] for number in own):
            tokens = self._tokens[row]
            batch["tokens"][place, : len(tokens)] = tokens
            batch["seen"][place, : len(tokens)] = 1
            batch["good"][place], batch["weight"][place] = self._good[row], self._weights[row]
        return batch

    def tokens_at(self, steps_done: int) -> int:
        """Tokens that the first `steps_done` steps hold, padding not counted."""
        return int(self._tokens_by_step[steps_done - 1]) if steps_done else 0

    @cached_property
    def _tokens_by_step(self) -> np.ndarray:
        sizes = [len(self._tokens[self._passage(row)]) for row in range(self._num_rows)]
        return np.add.reduceat(sizes, range(0, self._num_rows, self.batch_size)).cumsum()

    def _rows(self, step: int) -> range:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        return range(step * self.batch_size, min(self._num_rows, (step + 1) * self.batch_size))

    def _passage(self, row: int) -> int:
        epoch, place = divmod(row, len(self._tokens))
        return permutation(len(self._tokens), self.seed, "passages", epoch)(place)


class EncoderTask:
    """Binary cross-entropy of one log-odds a passage; a passage is the unit that the loop averages over."""

    name = "encoder"

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        self.reader = PassageReader(
            Path(config.data), batch_size=config.batch_size, epochs=config.epochs, seed=config.loop.seed
        )

    def identity(self) -> dict[str, Any]:
        return {"base": weights_hashes(Path(self.config.base)), "data": self.reader.hash}

    def build_model(self) -> nn.Module:
        return load_classifier(Path(self.config.base)).train()

    def enter_step(self, module: nn.Module, step: int) -> None:
        """Every step is the same."""

    def micro_batch_size(self, step: int) -> int:
        return self.config.micro_batch_size

    def learning_rate_scale(self, step: int) -> float:
        return 1.0

    def flops_per_token(self, step: int) -> float:
        return 0.0  # unknown: encoders differ in shape

    def position(self, steps_done: int) -> dict[str, Any]:
        return {"tokens": self.reader.tokens_at(steps_done), "stage": self.name}

    def count(self, batch: TensorBatch) -> torch.Tensor:
        return batch["weight"].sum()

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor:
        longest = int(batch["seen"].sum(dim=1).max())
        tokens, seen = (batch[name][:, :longest].long() for name in ("tokens", "seen"))
        logits = model(input_ids=tokens, attention_mask=seen).logits[:, 0].float()
        losses = F.binary_cross_entropy_with_logits(logits, batch["good"], reduction="none")
        return (losses * batch["weight"]).sum()

    def validation(self, step: int) -> Mapping[str, StepReader]:
        return {}

    def samples(self, module: nn.Module) -> list[dict[str, str]]:
        return []


def load_classifier(folder: Path) -> nn.Module:
    """A folder's encoder in float32 with a head of one log-odds."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


def export(checkpoint: Path, base: Path, folder: Path) -> None:
    """The trained encoder as a Hugging Face folder with the base's tokenizer."""
    model: Any = load_classifier(base)
    model.load_state_dict(load_file(checkpoint / MODEL))
    model.save_pretrained(folder)
    shutil.copy(base / TOKENIZER, folder / TOKENIZER)
