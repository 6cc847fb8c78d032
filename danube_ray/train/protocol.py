"""What the training loop asks of a task and of its surroundings.

The loop knows neither what it trains (a `Task`: pretraining, SFT, DPO) nor where it runs (a `Context`: one process,
torchrun, Ray Train). Data reaches it through a `StepReader`, a pure function of the step: that makes every run
resumable at any step with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

Batch = dict[str, np.ndarray]
TensorBatch = dict[str, torch.Tensor]


class StepReader(Protocol):
    """The data of every step: `reader(step, rank, world_size)` gives that rank's rows, and depends on nothing else.

    Every rank gets equally many rows; where they don't divide, the last ranks pad with rows of `weight` (uint8) 0.
    """

    @property
    def num_steps(self) -> int: ...

    def __call__(self, step: int, rank: int, world_size: int) -> Batch: ...


class Task(Protocol):
    """What is trained: the model, its data, and its loss.

    `data_hash` names the order of the data; a checkpoint of another order is refused. `count` is how many units
    (tokens, pairs) of a micro-batch are trained, `loss` the sum of their losses: the loop divides by the count of the
    whole step over all ranks, so neither micro-batches nor workers change what a unit weighs.
    """

    name: str

    @property
    def reader(self) -> StepReader: ...

    @property
    def data_hash(self) -> str: ...

    def build_model(self) -> nn.Module: ...

    def micro_batch_size(self, step: int) -> int: ...

    def position(self, steps_done: int) -> dict[str, Any]:
        """Facts that metrics carry after so many steps: `tokens` and whatever names the place in the run."""
        ...

    def count(self, batch: TensorBatch) -> torch.Tensor: ...

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor: ...

    def validation(self, step: int) -> Mapping[str, StepReader]:
        """Held-out data by source, for the stage that `step` belongs to."""
        ...


class Context(Protocol):
    """Where the loop runs: which of how many workers, on which device, and how data comes in and progress goes out."""

    rank: int
    world_size: int
    device: torch.device

    def batches(self, reader: StepReader, start_step: int) -> Iterator[tuple[int, Batch]]:
        """This rank's `(step, batch)` from `start_step` on, in order."""
        ...

    def report(self, metrics: dict[str, Any]) -> None:
        """Tell the surroundings of a committed checkpoint. Every rank calls it; it is a barrier."""
        ...
