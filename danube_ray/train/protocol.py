"""What the training loop asks of a task and of its surroundings.

The loop knows neither what it trains (a `Task`: pretraining, SFT, DPO) nor where it runs (a `Context`: one process,
torchrun, Ray Train). Data reaches it through a `StepReader`, a pure function of the step: that makes every run
resumable at any step with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
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

    `identity` is what the trained weights depend on beside the optimizer (model, plan, tokenizer), as nested JSON-able
    values: a checkpoint of another identity is refused, naming the first field that differs. `count` is how many units
    (tokens, pairs) of a micro-batch are trained, `loss` the sum of their losses: the loop divides by the count of the
    whole step over all ranks, so neither micro-batches nor workers change what a unit weighs.
    """

    name: str

    @property
    def reader(self) -> StepReader: ...

    def identity(self) -> dict[str, Any]: ...

    def build_model(self) -> nn.Module: ...

    def enter_step(self, module: nn.Module, step: int) -> None:
        """Set in the bare module what the stage of `step` changes, such as its attention window."""
        ...

    def micro_batch_size(self, step: int) -> int: ...

    def learning_rate_scale(self, step: int) -> float:
        """What the schedule's learning rate is multiplied with at `step`."""
        ...

    def flops_per_token(self, step: int) -> float:
        """FLOP of forward and backward a token, by the formula of `ModelConfig.flops_per_token`; 0 where unknown."""
        ...

    def position(self, steps_done: int) -> dict[str, Any]:
        """Facts that metrics carry after so many steps: `tokens` and whatever names the place in the run."""
        ...

    def count(self, batch: TensorBatch) -> torch.Tensor: ...

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor: ...

    def validation(self, step: int) -> Mapping[str, StepReader]:
        """Held-out data by source, for the stage that `step` belongs to."""
        ...

    def samples(self, module: nn.Module) -> list[dict[str, str]]:
        """Texts that the model writes now, to look at; none where the task has no prompts."""
        ...


class Context(Protocol):
    """Where the loop runs: which of how many workers, on which device, and how data comes in and progress goes out."""

    rank: int
    world_size: int
    device: torch.device

    def batches(self, reader: StepReader, start_step: int) -> Iterator[tuple[int, Batch]]:
        """This rank's `(step, batch)` from `start_step` on, in order."""
        ...

    def stop_requested(self) -> str | None:
        """Why the run should save and end now, such as a signal to this process, or None. Cheap: asked each step."""
        ...

    def preemption_notice(self) -> str | None:
        """A notice, new since the last call, that a node is about to be taken away, or None.

        Every rank calls it at the same step and gets the same answer. The run saves, and goes on until it dies.
        """
        ...

    def report(self, metrics: dict[str, Any]) -> None:
        """Tell the surroundings of a committed checkpoint. Every rank calls it; it is a barrier."""
        ...


class Strategy(Protocol):
    """How one step's gradient becomes an update on all ranks: DDP, or DeepSpeed's ZeRO.

    `module` is the bare model, `model` what the forward pass calls. Full weights and moments go in and out by parameter
    name, in float32 and unsharded, so a checkpoint fits any strategy and any number of workers.
    """

    module: nn.Module
    model: nn.Module

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: gradients cross the network only with the last one."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, this rank's part of a sum over ranks."""
        ...

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm of the step's whole gradient, the same on every rank; called once, after the last backward."""
        ...

    def step(self, learning_rate: float) -> None:
        """Clip by the norm asked for just before, update the weights, clear the gradients."""
        ...

    def discard(self) -> None:
        """Clear the gradients without an update."""
        ...

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """`value` summed over all ranks, on every rank (in place)."""
        ...

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Trainable weights by name, and AdamW's moments as `NAME.exp_avg` and `NAME.exp_avg_sq`.

        Every rank calls it; only rank 0's result counts. The tensors may be the live ones, on any device: whoever keeps
        them copies them before the next step. Moments are missing before the first update.
        """
        ...

    def load(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], updates: int) -> None:
        """Put back what `state` gave after `updates` updates, in place, on every rank."""
        ...

    def communication_s(self) -> float:
        """Seconds of the last step in which this rank waited for others' gradients; NaN where nothing measures it."""
        ...
