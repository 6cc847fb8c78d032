"""FP8 watched by bf16: the same weights on the same held-out batches, computed both ways."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from danube_ray.config import LoopConfig
from danube_ray.model.precision import plain, to_bf16
from danube_ray.train.metrics import mean_loss
from danube_ray.train.protocol import Context, StepReader, Strategy, Task
from danube_ray.train.step import validate

Verdict = Literal["good", "warn", "bf16"]

BF16 = {"precision": "bf16", "fp8_scaling": None, "fp8_guard_every_steps": 0}  # a loop's settings without FP8


@dataclass(frozen=True)
class Gap:
    """Mean losses of the same batches in nats a trained unit, over all sources and ranks."""

    fp8_loss: float
    bf16_loss: float

    @property
    def relative(self) -> float:
        """How far FP8's loss lies above bf16's, as a part of bf16's."""
        return (self.fp8_loss - self.bf16_loss) / self.bf16_loss


class Guard:
    """Every `fp8_guard_every_steps` steps measures what FP8 costs, and says what the settings want done about it.

    `settings` are the loop's as they hold now: after a fall-back their precision is bf16, and nothing is due any more.
    Every rank calls every method, and as a gap is summed over ranks, every rank comes to the same verdict.
    """

    def __init__(self, settings: LoopConfig) -> None:
        self.settings = settings

    def due(self, steps_done: int) -> bool:
        every = self.settings.fp8_guard_every_steps
        return every > 0 and steps_done % every == 0

    def measure(
        self, task: Task, strategy: Strategy, readers: Mapping[str, StepReader], context: Context, micro_batch_size: int
    ) -> Gap:
        """Evaluate `readers`, a task's held-out data, in FP8 and in bf16; NaN losses where there is none."""
        in_bf16 = dataclasses.replace(self.settings, **BF16)
        fp8 = validate(task, strategy, readers, self.settings, context, micro_batch_size)
        with plain(strategy.module):
            bf16 = validate(task, strategy, readers, in_bf16, context, micro_batch_size)
        return Gap(mean_loss(fp8), mean_loss(bf16))

    def judge(self, gap: Gap) -> Verdict:
        """What to do: FP8 is bad where its loss is too far above bf16's, or no number where bf16's is one."""
        within = gap.relative <= self.settings.fp8_guard_max_gap
        if within or not math.isfinite(gap.bf16_loss):
            return "good"
        return self.settings.fp8_guard_action

    def fall_back(self, strategy: Strategy) -> None:
        """Go on in bf16, with the same weights, moments and state dict."""
        to_bf16(strategy.module)
        self.settings = dataclasses.replace(self.settings, **BF16)
