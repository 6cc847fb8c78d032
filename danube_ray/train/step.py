"""One step's gradient, and one pass over held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from danube_ray.config import LoopConfig
from danube_ray.model.precision import autocast
from danube_ray.train.protocol import Batch, Context, StepReader, Strategy, Task, TensorBatch

Beat = Callable[[int, str], None]


@dataclass(frozen=True)
class Gradient:
    """What a step's gradient, not yet applied, came from: numbers over all ranks, the same on each.

    `loss_sum` in nats over `count` trained units, the gradient's L2 norm, and what the ranks told each other: the sum
    of each flag.
    """

    loss_sum: float
    count: float
    norm: float
    flags: tuple[float, ...]

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count if self.count else float("nan")


def to_device(batch: Batch, device: torch.device) -> TensorBatch:
    """A rank's rows as tensors on the device, through pinned memory where that lets the copy run beside the compute."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return tensors


def micro_batches(batch: TensorBatch, size: int) -> Iterator[TensorBatch]:
    """Split a rank's rows into micro-batches of at most `size` rows."""
    rows = len(next(iter(batch.values())))
    for start in range(0, rows, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def accumulate(
    task: Task,
    strategy: Strategy,
    batch: Batch,
    step: int,
    settings: LoopConfig,
    context: Context,
    flags: tuple[float, ...] = (),
    beat: Beat = lambda step, phase: None,
) -> Gradient:
    """The gradient of the mean loss over the units of the whole step, all ranks together, left in the strategy.

    `flags` are this rank's words to the others; they travel with the loss, so that a step costs one small exchange.
    """
    torch.manual_seed(settings.seed + step * context.world_size + context.rank)  # dropout is a function of the step
    parts = list(micro_batches(to_device(batch, context.device), task.micro_batch_size(step)))
    counted = torch.stack([task.count(part) for part in parts]).sum().to(torch.float32)
    count = strategy.sum_over_ranks(counted.clone())
    loss_sum = torch.zeros((), device=context.device)
    divisor = count.clamp(min=1)  # a step of padding alone has a gradient of zero
    for index, part in enumerate(parts):
        with strategy.accumulating(last=index == len(parts) - 1):
            beat(step, f"forward of micro-batch {index + 1}")
            with autocast(settings.precision, context.device, settings.scaling, first_micro_batch=index == 0):
                loss = task.loss(strategy.model, part)
            beat(step, f"backward of micro-batch {index + 1}")
            strategy.backward(loss / divisor)
        loss_sum += loss.detach()
    norm = strategy.gradient_norm()
    beat(step, "exchange of the loss")
    told = torch.tensor(flags, device=context.device)
    shared = strategy.sum_over_ranks(torch.cat((loss_sum.view(1), told)))
    # The one place where the host waits for the device: the verdict on the step needs the numbers.
    numbers = torch.cat((shared[:1], count.view(1), norm.view(1), shared[1:])).tolist()
    return Gradient(*numbers[:3], flags=tuple(numbers[3:]))


@torch.no_grad()
def validate(
    task: Task,
    strategy: Strategy,
    readers: Mapping[str, StepReader],
    settings: LoopConfig,
    context: Context,
    micro_batch_size: int,
) -> dict[str, tuple[float, float]]:
    """Sum of the losses and count of the units of each source's held-out data, over all ranks."""
    strategy.module.eval()
    results = {}
    for source, reader in readers.items():
        totals = torch.zeros(2, device=context.device)
        for step in range(reader.num_steps):
            batch = to_device(reader(step, context.rank, context.world_size), context.device)
            for part in micro_batches(batch, micro_batch_size):
                with autocast(settings.precision, context.device, settings.scaling):
                    totals[0] += task.loss(strategy.module, part)
                totals[1] += task.count(part)
        loss_sum, count = strategy.sum_over_ranks(totals).tolist()
        results[source] = (loss_sum, count)
    strategy.module.train()
    return results
