"""A run's metrics: JSON lines that survive a crash without a repeated step, and TensorBoard beside them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from danube_ray.artifacts import append_json_lines, read_json_lines, write_atomically

METRICS = "metrics.jsonl"


class MetricsLog:
    """Writes `metrics.jsonl` and `tensorboard/` of a run, continuing after `steps_done` steps.

    Lines past the checkpoint that the run resumes from are dropped: those steps are trained, and logged, again.
    """

    def __init__(self, run_folder: Path, steps_done: int) -> None:
        self.path = run_folder / METRICS
        kept = [row for row in read_json_lines(self.path) if row["step"] <= steps_done]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.tensorboard = SummaryWriter(str(run_folder / "tensorboard"), purge_step=steps_done + 1)

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append one line, and its numbers to TensorBoard under `kind/`."""
        append_json_lines(self.path, [{"kind": kind, **row, "time": time.time()}])
        for name, value in row.items():
            values = value if isinstance(value, dict) else {"": value}
            for key, number in values.items():
                if isinstance(number, int | float) and name != "step":
                    self.tensorboard.add_scalar("/".join(filter(None, (kind, name, key))), number, row["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tensorboard.close()


class StepClock:
    """Where the time of the steps since the last log line went."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited_s = 0.0
        self.steps = 0

    def add(self, waited_s: float) -> None:
        self.waited_s += waited_s
        self.steps += 1

    def read(self, tokens: int) -> dict[str, float]:
        """Speed of the `tokens` trained since the last reading, and the share of time data was waited for; restarts."""
        elapsed = time.perf_counter() - self.began
        facts = {
            "tokens_per_s": tokens / elapsed,
            "step_s": elapsed / max(1, self.steps),
            "data_wait_share": self.waited_s / elapsed,
        }
        self.__init__()
        return facts


def mean_loss(results: dict[str, tuple[float, float]]) -> float:
    """Mean over sources' (loss sum, count), every unit weighing the same; NaN when nothing was held out."""
    count = sum(count for _, count in results.values())
    return sum(loss for loss, _ in results.values()) / count if count else math.nan
