"""One optimizer step, and one pass over held-out data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from danube_ray.config import LoopConfig
from danube_ray.model.precision import autocast
from danube_ray.train.protocol import Batch, Context, StepReader, Task, TensorBatch
from danube_ray.train.strategy import DataParallel


@dataclass(frozen=True)
class StepResult:
    """Over all ranks: sum of the losses, count of the trained units, the gradient's norm. Scalars on the device."""

    loss_sum: torch.Tensor
    count: torch.Tensor
    grad_norm: torch.Tensor


def micro_batches(batch: Batch, size: int, device: torch.device) -> Iterator[TensorBatch]:
    """Split a rank's rows into micro-batches of at most `size` rows, as tensors on the device."""
    rows = len(next(iter(batch.values())))
    for start in range(0, rows, size):
        yield {
            name: torch.from_numpy(array[start : start + size]).to(device, non_blocking=True)
            for name, array in batch.items()
        }


def train_step(
    task: Task,
    strategy: DataParallel,
    batch: Batch,
    step: int,
    learning_rate: float,
    settings: LoopConfig,
    context: Context,
) -> StepResult:
    """Accumulate the gradient of the mean loss over the units of the whole step, all ranks together, and step."""
    torch.manual_seed(settings.seed + step * context.world_size + context.rank)  # dropout is a function of the step
    parts = list(micro_batches(batch, task.micro_batch_size(step), context.device))
    counted = torch.stack([task.count(part) for part in parts]).sum().to(torch.float32)
    count = strategy.sum_over_ranks(counted.clone())
    loss_sum = torch.zeros((), device=context.device)
    for index, part in enumerate(parts):
        with strategy.accumulating(last=index == len(parts) - 1):
            with autocast(settings.precision, context.device):
                loss = task.loss(strategy.model, part)
            strategy.backward(loss / count)
        loss_sum += loss.detach()
    grad_norm = strategy.step(learning_rate)
    return StepResult(strategy.sum_over_ranks(loss_sum), count, grad_norm)


@torch.no_grad()
def validate(
    task: Task, strategy: DataParallel, readers: Mapping[str, StepReader], settings: LoopConfig, context: Context
) -> dict[str, tuple[float, float]]:
    """Sum of the losses and count of the units of each source's held-out data, over all ranks."""
    strategy.module.eval()
    results = {}
    for source, reader in readers.items():
        totals = torch.zeros(2, device=context.device)
        for step in range(reader.num_steps):
            for part in micro_batches(reader(step, context.rank, context.world_size), 8, context.device):
                with autocast(settings.precision, context.device):
                    totals[0] += task.loss(strategy.module, part)
                totals[1] += task.count(part)
        loss_sum, count = strategy.sum_over_ranks(totals).tolist()
        results[source] = (loss_sum, count)
    strategy.module.train()
    return results
