"""The one training loop: pretraining, SFT and DPO, in one process, under torchrun or under Ray Train."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from danube_ray.config import LoopConfig, OptimizerConfig
from danube_ray.model.precision import check_precision, convert
from danube_ray.train import checkpoint
from danube_ray.train.metrics import MetricsLog, StepClock, mean_loss
from danube_ray.train.optimizer import learning_rate_at
from danube_ray.train.protocol import Context, Task
from danube_ray.train.step import train_step, validate
from danube_ray.train.strategy import DataParallel


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a number."""


@dataclass(frozen=True)
class FitResult:
    """Steps done, where the last checkpoint lies, and the last validation loss (None where nothing is held out)."""

    steps: int
    checkpoint: Path
    validation_loss: float | None


def fit(task: Task, run_folder: Path, settings: LoopConfig, optimizer: OptimizerConfig, context: Context) -> FitResult:
    """Train `task` to its last step, starting at the newest verified checkpoint under `run_folder/checkpoints`.

    Every rank calls it with the same arguments. Rank 0 writes metrics and checkpoints; a step counts as done when the
    checkpoint after it is committed.
    """
    return Fit(task, run_folder, settings, optimizer, context).run()


class Fit:
    """One rank's pass through the loop: what `fit` keeps between steps."""

    def __init__(
        self, task: Task, run_folder: Path, settings: LoopConfig, optimizer: OptimizerConfig, context: Context
    ) -> None:
        check_precision(settings.precision, context.device)
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
        if context.device.type == "cpu":
            torch.set_num_threads(settings.cpus_per_worker)
        self.task, self.settings, self.optimizer, self.context = task, settings, optimizer, context
        self.checkpoints = run_folder / "checkpoints"
        torch.manual_seed(settings.seed)
        module = convert(task.build_model().to(context.device), settings.precision)
        if settings.compile:
            module.compile()
        self.strategy = DataParallel(module, optimizer, context, settings.deterministic)
        self.start = self.restore()
        self.validation_loss: float | None = None
        self.log = MetricsLog(run_folder, self.start) if context.rank == 0 else None

    def restore(self) -> int:
        newest = checkpoint.newest_verified(self.checkpoints)
        if newest is not None:
            checkpoint.restore(newest, self.strategy.module, self.strategy.optimizer, self.task.data_hash)
        return checkpoint.step_of(newest)

    def run(self) -> FitResult:
        last = self.task.reader.num_steps
        with self.log or nullcontext():
            if self.start < last:
                self.train(last)
        folder = checkpoint.checkpoint_folder(self.checkpoints, last)
        return FitResult(steps=last, checkpoint=folder, validation_loss=self.validation_loss)

    def train(self, last: int) -> None:
        settings, clock = self.settings, StepClock()
        loss_sum = torch.zeros((), device=self.context.device)
        count = torch.zeros((), device=self.context.device)
        tokens_logged = self.task.position(self.start)["tokens"]
        batches = iter(self.context.batches(self.task.reader, self.start))
        for step in range(self.start, last):
            asked = time.perf_counter()
            arrived, batch = next(batches)
            if arrived != step:
                raise RuntimeError(f"the stream delivered step {arrived} where step {step} was due")
            clock.add(waited_s=time.perf_counter() - asked)
            learning_rate = learning_rate_at(step, last, self.optimizer)
            result = train_step(self.task, self.strategy, batch, step, learning_rate, settings, self.context)
            loss_sum += result.loss_sum
            count += result.count
            done = step + 1
            if done % settings.log_every_steps == 0 or done == last:
                place = {"step": done, **self.task.position(done)}
                facts = self.measured(loss_sum, count, result.grad_norm, learning_rate, done)
                self.write("train", {**place, **facts, **clock.read(place["tokens"] - tokens_logged)})
                tokens_logged = place["tokens"]
                loss_sum.zero_()
                count.zero_()
            self.after_step(done, last)

    def measured(
        self, loss_sum: torch.Tensor, count: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float, done: int
    ) -> dict[str, float]:
        """The numbers of a log line; reading them is what makes a GPU wait, so it happens only here."""
        loss, norm = (loss_sum / count).item(), grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(f"loss {loss} and gradient norm {norm} at step {done}: lower the learning rate")
        return {"loss": loss, "learning_rate": learning_rate, "grad_norm": norm}

    def after_step(self, done: int, last: int) -> None:
        """Validate and save where the settings, or the end of the run, say so."""
        if done % self.settings.validate_every_steps == 0 or done == last:
            self.validate(done)
        if done % self.settings.checkpoint_every_steps == 0 or done == last:
            self.save(done)

    def validate(self, done: int) -> None:
        readers = self.task.validation(done - 1)
        if not readers:
            return
        results = validate(self.task, self.strategy, readers, self.settings, self.context)
        self.validation_loss = mean_loss(results)
        by_source = {source: loss / count for source, (loss, count) in results.items() if count}
        place = {"step": done, **self.task.position(done)}
        self.write("validation", {**place, "loss": self.validation_loss, "by_source": by_source})

    def save(self, done: int) -> None:
        """Commit a checkpoint on rank 0, then let every rank know."""
        if self.context.rank == 0:
            state = {
                "step": done,
                **self.task.position(done),
                "data_hash": self.task.data_hash,
                "seed": self.settings.seed,
                "task": self.task.name,
            }
            checkpoint.save(self.checkpoints, self.strategy.module, self.strategy.optimizer, state)
            checkpoint.keep_newest(self.checkpoints, self.settings.keep_checkpoints)
        self.context.report({"step": done, "validation_loss": self.validation_loss})

    def write(self, kind: str, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(kind, row)
