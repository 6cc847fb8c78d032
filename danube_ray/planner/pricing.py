"""What a run will need: memory, speed, days and cost a stage, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from danube_ray.config import ConfigError, LoopConfig, Parallelism, RunConfig, StageConfig
from danube_ray.planner.hardware import Hardware
from danube_ray.planner.memory import Memory, largest_micro_batch, memory
from danube_ray.planner.speed import StepTime, step_time
from danube_ray.planner.work import Work, check_hardware

SECONDS_PER_DAY = 86_400
PARALLELISMS: tuple[Parallelism, ...] = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The most windows that a GPU can take at a time in a way of splitting the work; 0 where not one fits."""

    parallelism: Parallelism
    activation_checkpointing: bool
    windows: int


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What to change, as options of the command line, so that every stage fits; and how long the run then takes."""

    options: tuple[str, ...]
    days: float


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage. `tokens_per_s`, `days` and `cost` (dollars) are for all GPUs together."""

    stage: StageConfig
    work: Work
    memory: Memory
    step_time: StepTime
    fits: bool
    tokens_per_s: float
    mfu: float
    days: float
    cost: float
    largest: tuple[Largest, ...]

    @property
    def flops_per_token(self) -> float:
        return self.work.model.flops_per_token(self.work.sequence_length)

    @property
    def padding_share(self) -> float:
        """Of what the GPUs compute, where the batch's windows don't divide by them."""
        batch_tokens = self.tokens_per_s * self.step_time.total_s
        return max(0.0, 1 - batch_tokens / (self.work.tokens * self.work.num_gpus))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's stages on its GPUs. `remedy` is None where all fit, and where nothing would."""

    run: RunConfig
    gpu: Hardware
    num_gpus: int
    stages: tuple[StagePlan, ...]
    remedy: Remedy | None

    @property
    def days(self) -> float:
        return sum(stage.days for stage in self.stages)

    @property
    def cost(self) -> float:
        return sum(stage.cost for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.num_gpus

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)


def plan(run: RunConfig, gpu: Hardware, num_gpus: int) -> Plan:
    """Price `run` on `num_gpus` of `gpu`, whatever number of workers it was made for.

    Raises `ConfigError` for a precision that the GPU does not compute.
    """
    check_hardware(run.loop, gpu)
    stages = tuple(stage_plan(run, stage, gpu, num_gpus) for stage in run.stages)
    fits = all(stage.fits for stage in stages)
    return Plan(
        run=run, gpu=gpu, num_gpus=num_gpus, stages=stages, remedy=None if fits else find_remedy(run, gpu, num_gpus)
    )


def stage_work(run: RunConfig, stage: StageConfig, num_gpus: int) -> Work:
    """A GPU's step in `stage`; where windows don't divide by the GPUs, the short ones get padding."""
    windows = -(-run.global_batch_tokens // (stage.sequence_length * num_gpus))
    return Work(
        model=run.model_in(stage),
        loop=run.loop,
        sequence_length=stage.sequence_length,
        micro_batch_size=min(stage.micro_batch_size, windows),
        windows=windows,
        num_gpus=num_gpus,
    )


def stage_plan(run: RunConfig, stage: StageConfig, gpu: Hardware, num_gpus: int) -> StagePlan:
    work = stage_work(run, stage, num_gpus)
    needed, seconds = memory(work), step_time(work, gpu)
    tokens_per_s = run.global_batch_tokens / seconds.total_s
    days = stage.tokens / tokens_per_s / SECONDS_PER_DAY
    model_flops = tokens_per_s * work.model.flops_per_token(stage.sequence_length)
    return StagePlan(
        stage=stage,
        work=work,
        memory=needed,
        step_time=seconds,
        fits=needed.total_bytes <= gpu.usable_bytes,
        tokens_per_s=tokens_per_s,
        mfu=model_flops / (num_gpus * gpu.peak_flops),
        days=days,
        cost=24 * days * num_gpus * gpu.price_per_hour,
        largest=tuple(
            Largest(
                parallelism=loop.parallelism,
                activation_checkpointing=loop.activation_checkpointing,
                windows=largest_micro_batch(dataclasses.replace(work, loop=loop), gpu),
            )
            for loop in alternatives(run.loop, num_gpus)
        ),
    )


def alternatives(loop: LoopConfig, num_gpus: int) -> Iterator[LoopConfig]:
    """The loop under each parallelism, without activation checkpointing and with it, where the settings allow that."""
    for parallelism in PARALLELISMS if num_gpus > 1 else PARALLELISMS[:1]:
        for checkpointing in (False, True):
            with suppress(ConfigError):
                yield dataclasses.replace(loop, parallelism=parallelism, activation_checkpointing=checkpointing)


def find_remedy(run: RunConfig, gpu: Hardware, num_gpus: int) -> Remedy | None:
    """What makes every stage fit: of the alternatives that do, the one that is fastest by the formula."""
    found = (adapted(run, loop, gpu, num_gpus) for loop in alternatives(run.loop, num_gpus))
    return min((remedy for remedy in found if remedy), key=lambda remedy: remedy.days, default=None)


def adapted(run: RunConfig, loop: LoopConfig, gpu: Hardware, num_gpus: int) -> Remedy | None:
    """`run` under `loop`, each micro-batch as it is or as large as fits; None where a stage does not fit at all."""
    seconds, options = 0.0, list(loop_options(run.loop, loop))
    for index, stage in enumerate(run.stages):
        work = dataclasses.replace(stage_work(run, stage, num_gpus), loop=loop)
        fitting = min(work.micro_batch_size, largest_micro_batch(work, gpu))
        if not fitting:
            return None
        if fitting < work.micro_batch_size:
            options.append(f"--stages.{index}.micro-batch-size {fitting}")
        num_steps = stage.tokens / run.global_batch_tokens
        seconds += num_steps * step_time(dataclasses.replace(work, micro_batch_size=fitting), gpu).total_s
    return Remedy(options=tuple(options), days=seconds / SECONDS_PER_DAY)


def loop_options(was: LoopConfig, now: LoopConfig) -> Iterator[str]:
    if now.parallelism != was.parallelism:
        yield f"--loop.parallelism {now.parallelism}"
    if now.activation_checkpointing != was.activation_checkpointing:
        yield f"--loop.{'' if now.activation_checkpointing else 'no-'}activation-checkpointing"
