"""The one training loop: pretraining, SFT and DPO, in one process, under torchrun or under Ray Train."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from danube_ray.config import LoopConfig, OptimizerConfig
from danube_ray.model.precision import autocast, load_scaling_state, scaling_state
from danube_ray.train import checkpoint
from danube_ray.train.build import build_module
from danube_ray.train.faults import BadSteps, Events, Verdict
from danube_ray.train.guard import Guard
from danube_ray.train.memory import keep_freed_memory
from danube_ray.train.metrics import MetricsLog, StepClock, mean_loss
from danube_ray.train.optimizer import learning_rate_at
from danube_ray.train.profiling import StepProfiler
from danube_ray.train.protocol import Batch, Context, Task
from danube_ray.train.saving import Saver
from danube_ray.train.step import Gradient, accumulate, validate
from danube_ray.train.strategy import build_strategy
from danube_ray.train.watchdog import Watchdog

LOOK_FOR_PREEMPTION_S = 5.0

Batches = Iterator[tuple[int, Batch]]


@dataclass(frozen=True)
class FitResult:
    """Steps done, where the last checkpoint lies, the last validation loss (None where nothing is held out).

    `stopped` says why the run ended before its last step, where it was asked to.
    """

    steps: int
    checkpoint: Path
    validation_loss: float | None
    stopped: str | None = None


def fit(task: Task, run_folder: Path, settings: LoopConfig, optimizer: OptimizerConfig, context: Context) -> FitResult:
    """Train `task` to its last step, starting at the newest verified checkpoint under `run_folder/checkpoints`.

    Every rank calls it with the same arguments. Rank 0 writes metrics, events and checkpoints; a step counts as done
    when the checkpoint after it is committed. Raises `TrainingDiverged` where bad steps leave nothing else to try, and
    `ArtifactError` for checkpoints of another model, plan or tokenizer.
    """
    return Fit(task, run_folder, settings, optimizer, context).run()


class Fit:
    """One rank's pass through the loop: what `fit` keeps between steps."""

    def __init__(
        self, task: Task, run_folder: Path, settings: LoopConfig, optimizer: OptimizerConfig, context: Context
    ) -> None:
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
        if context.device.type == "cpu":
            torch.set_num_threads(settings.cpus_per_worker)
            keep_freed_memory()
        self.task, self.settings, self.optimizer, self.context = task, settings, optimizer, context
        self.identity = task.identity() if context.rank == 0 else {}
        self.run_folder, self.checkpoints = run_folder, run_folder / "checkpoints"
        self.last = task.reader.num_steps
        self.events = Events(run_folder, writes=context.rank == 0)
        found = self.find()
        module = build_module(task, settings, context.device, drawn=found == 0)
        self.strategy = build_strategy(module, optimizer, settings, context)
        self.bad_steps = BadSteps(settings, self.events)
        self.saver = Saver(self.checkpoints, settings.keep_checkpoints, settings.milestone_every_steps)
        self.saving: dict[str, Any] | None = None  # what to report of the checkpoint that is being written
        self.saved = 0  # the step of the last checkpoint
        self.watchdog = Watchdog(run_folder, context.rank, context.world_size, settings.hang_timeout_s)
        self.clock = StepClock(context.device, context.world_size)
        profiled = settings.profile_steps if context.rank == 0 else 0
        self.profiler = StepProfiler(run_folder / "profile", profiled, context.device)
        self.log: MetricsLog | None = None
        self.validation_loss: float | None = None
        self.guard = Guard(settings)
        self.updates = 0  # steps that changed the weights: a skipped one doesn't count for AdamW's bias correction
        self.restore(found)
        self.start_from(found)
        if self.step:
            self.events.write("resumed", self.step, f"with {context.world_size} workers")

    def run(self) -> FitResult:
        stopped = None
        with self.watchdog, ExitStack() as closing:
            closing.push(lambda *error: self.log.__exit__(*error) if self.log else None)
            closing.enter_context(self.profiler)
            if self.step < self.last:
                stopped = self.train()
        folder = checkpoint.checkpoint_folder(self.checkpoints, self.step)
        return FitResult(self.step, folder, self.validation_loss, stopped)

    def find(self) -> int:
        """Steps done at the newest verified checkpoint, as rank 0 finds it; 0 without one."""
        found = torch.zeros((), dtype=torch.int64, device=self.context.device)
        if self.context.rank == 0:
            folder, passed_over = checkpoint.verified(self.checkpoints)
            for step, wrong in passed_over.items():
                self.events.write("checkpoint passed over", step, wrong)
            if folder is not None:
                checkpoint.require_identity(folder, self.identity)
            found += checkpoint.step_of(folder)
        if self.context.world_size > 1:
            dist.broadcast(found, src=0)
        return int(found.item())

    def restore(self, step: int) -> None:
        """Load the checkpoint that was found after `step` steps; no change where there was none."""
        if step:
            folder = checkpoint.checkpoint_folder(self.checkpoints, step)
            snapshot = checkpoint.read(folder, set(checkpoint.trainable(self.strategy.module)))
            self.updates = snapshot.state["updates"]
            self.strategy.load(snapshot.weights, snapshot.moments, self.updates)
            load_scaling_state(self.strategy.module, snapshot.scales)
            if self.settings.scaling and snapshot.state["precision"] == "bf16":  # the guard had given FP8 up
                self.fall_back()
            self.bad_steps.remember(snapshot.state["recent_losses"])
        self.saved = step

    def start_from(self, step: int) -> None:
        """Begin, or begin again, after `step` steps: nothing logged past it stays."""
        self.step = step
        self.loss_sum, self.count, self.flops = 0.0, 0.0, 0.0  # since the last line of the log
        self.tokens_logged = self.task.position(step)["tokens"]
        if self.context.rank == 0:
            if self.log is not None:
                self.log.__exit__(None, None, None)
            self.log = MetricsLog(self.run_folder, step, self.settings.tracker)
        self.looked_s = time.monotonic()
        self.clock.restart()

    def train(self) -> str | None:
        """Train to the last step; why it ended before, where it was asked to."""
        batches = ahead(self.context.batches(self.task.reader, self.step))
        while self.step < self.last:
            step = self.step
            gradient = self.gradient(self.next_batch(batches))
            stop, look, committed = gradient.flags
            if committed:
                self.report_saved()
            verdict = self.bad_steps.judge(step + 1, gradient.loss, gradient.norm) if gradient.count else "skip"
            if verdict == "rollback" and self.roll_back():
                batches = chain(self.read_again(step + 1), batches)
                continue
            self.apply(gradient, verdict)
            self.profiler.step()
            self.after_step()
            if look and (notice := self.context.preemption_notice()):
                self.events.write("preemption", self.step, notice)
                self.save()
                self.finish_saving()
            if stop and self.step < self.last:
                self.save()
                reason = self.context.stop_requested() or "another worker was asked to stop"
                self.events.write("stopped", self.step, reason)
                self.finish_saving()
                return reason
        self.finish_saving()
        return None

    def next_batch(self, batches: Batches) -> Batch:
        self.watchdog.beat(self.step, "waiting for data")
        asked = time.perf_counter()
        arrived, batch = next(batches)
        self.waited_s = time.perf_counter() - asked
        if arrived != self.step:
            raise RuntimeError(f"the stream delivered step {arrived} where step {self.step} was due")
        return batch

    def gradient(self, batch: Batch) -> Gradient:
        """The gradient of the step, with what the ranks say to each other; no gradient for a step to be passed over."""
        self.task.enter_step(self.strategy.module, self.step)
        stop = self.context.stop_requested() is not None
        look = self.context.rank == 0 and time.monotonic() - self.looked_s > LOOK_FOR_PREEMPTION_S
        if look:
            self.looked_s = time.monotonic()
        flags = (float(stop), float(look), float(self.saver.just_committed()))
        if self.step + 1 in self.settings.skip_steps:
            told = self.strategy.sum_over_ranks(torch.tensor(flags, device=self.context.device))
            return Gradient(loss_sum=0.0, count=0.0, norm=0.0, flags=tuple(told.tolist()))
        return accumulate(
            self.task, self.strategy, batch, self.step, self.settings, self.context, flags, self.watchdog.beat
        )

    def roll_back(self) -> bool:
        """Go back to the newest verified checkpoint; False, and no change, where there is none yet."""
        self.strategy.discard()
        self.finish_saving()
        found = self.find()
        if found:
            self.restore(found)
            self.start_from(found)
        else:
            self.events.write("skip", self.step + 1, "there is no checkpoint yet to roll back to")
        return found > 0

    def read_again(self, end: int) -> Batches:
        """The steps from here to `end`, past which the stream has moved on, straight from the reader."""
        for step in range(self.step, end):
            yield step, self.task.reader(step, self.context.rank, self.context.world_size)

    def apply(self, gradient: Gradient, verdict: Verdict) -> None:
        """Update the weights where the verdict says so, and log the step."""
        step, tokens_before = self.step, self.task.position(self.step)["tokens"]
        learning_rate = learning_rate_at(step, self.last, self.optimizer) * self.task.learning_rate_scale(step)
        if verdict == "update":
            self.strategy.step(learning_rate)
            self.updates += 1
            self.loss_sum += gradient.loss_sum
            self.count += gradient.count
        else:
            self.strategy.discard()
        self.step += 1
        place = {"step": self.step, **self.task.position(self.step)}
        self.flops += (place["tokens"] - tokens_before) * self.task.flops_per_token(step)
        self.clock.add(self.waited_s, self.strategy.communication_s())
        if self.count and (self.step % self.settings.log_every_steps == 0 or self.step == self.last):
            facts = {"loss": self.loss_sum / self.count, "learning_rate": learning_rate, "grad_norm": gradient.norm}
            speed = self.clock.read(place["tokens"] - self.tokens_logged, self.flops)
            self.write("train", {**place, **facts, **speed})
            self.loss_sum, self.count, self.flops, self.tokens_logged = 0.0, 0.0, 0.0, place["tokens"]

    def after_step(self) -> None:
        """Validate and save where the settings, or the end of the run, say so."""
        at_end = self.step == self.last
        if self.step % self.settings.validate_every_steps == 0 or at_end:
            with self.clock.paused():
                self.validate()
        if self.guard.due(self.step):
            with self.clock.paused():
                self.compare_with_bf16()
        if self.step % self.settings.checkpoint_every_steps == 0 or at_end:
            self.save()

    def validate(self) -> None:
        """Loss by source on held-out data, and texts that the model writes now."""
        self.watchdog.beat(self.step - 1, "validation")
        place = {"step": self.step, **self.task.position(self.step)}
        if readers := self.task.validation(self.step - 1):
            size = self.task.micro_batch_size(self.step - 1)
            results = validate(self.task, self.strategy, readers, self.settings, self.context, size)
            self.validation_loss = mean_loss(results)
            by_source = {source: loss / count for source, (loss, count) in results.items() if count}
            self.write("validation", {**place, "loss": self.validation_loss, "by_source": by_source})
        with autocast(self.settings.precision, self.context.device, self.settings.scaling):
            samples = self.task.samples(self.strategy.module)  # by every rank: under ZeRO-3 each holds a part
        if self.log is not None:
            self.log.write_samples(place, samples)
            if self.step == self.last:
                self.log.write_report(finished=True)

    def compare_with_bf16(self) -> None:
        """Measure what FP8 costs on held-out data; warn, or go on in bf16, where it is more than the settings allow."""
        self.watchdog.beat(self.step - 1, "comparison with bf16")
        readers, size = self.task.validation(self.step - 1), self.task.micro_batch_size(self.step - 1)
        gap = self.guard.measure(self.task, self.strategy, readers, self.context, size)
        row = {"loss": gap.fp8_loss, "loss_bf16": gap.bf16_loss, "gap": gap.relative}
        self.write("guard", {"step": self.step, **self.task.position(self.step), **row})
        verdict = self.guard.judge(gap)
        if verdict != "good":
            what = "going on in bf16" if verdict == "bf16" else "going on"
            self.events.write("fp8 guard", self.step, f"loss {gap.relative:+.2%} against bf16's: {what}")
        if verdict == "bf16":
            self.fall_back()

    def fall_back(self) -> None:
        """Compute in bf16 from here on."""
        self.guard.fall_back(self.strategy)
        self.settings = self.guard.settings

    def save(self) -> None:
        """Begin to write a checkpoint; the loop goes on as soon as the weights are copied."""
        if self.saved == self.step:
            return
        self.finish_saving()
        self.watchdog.beat(self.step - 1, "copying the checkpoint")
        weights, moments = self.strategy.state()
        if self.context.rank == 0:
            state = {
                "step": self.step,
                **self.task.position(self.step),
                "updates": self.updates,
                "precision": self.settings.precision,
                "recent_losses": self.bad_steps.recent,
                "task": self.task.name,
                "identity": self.identity,
            }
            self.saver.begin(weights, moments, scaling_state(self.strategy.module), state)
        self.saved, self.saving = self.step, {"step": self.step, "validation_loss": self.validation_loss}

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written, if any, is committed."""
        if self.saving is not None:
            self.watchdog.beat(self.step - 1, "writing the checkpoint")
            self.saver.wait()
            self.strategy.sum_over_ranks(torch.zeros(1, device=self.context.device))  # rank 0 has written
            self.report_saved()

    def report_saved(self) -> None:
        """Tell the surroundings of the checkpoint that has just been committed; every rank does so at the same step."""
        assert self.saving is not None
        self.context.report(self.saving)
        self.saving = None

    def write(self, kind: str, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(kind, row)


def ahead(batches: Batches) -> Batches:
    """The same batches, the next one fetched by a thread while this one is trained on."""
    reading = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        coming = reading.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reading.submit(next, batches, None)
            yield batch
    finally:
        reading.shutdown(wait=False, cancel_futures=True)
