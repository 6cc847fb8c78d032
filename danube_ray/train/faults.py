"""What goes wrong in a run, written down and answered: steps whose loss is not to be trusted."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from danube_ray.artifacts import append_json_lines, read_json_lines
from danube_ray.config import LoopConfig

EVENTS = "events.jsonl"
RECENT_STEPS, ENOUGH_STEPS = 128, 32  # losses that a spike is measured against, and how few don't say anything yet

Verdict = Literal["update", "skip", "rollback"]


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not to be trusted, and the settings leave nothing else to try."""


class RunStopped(RuntimeError):
    """The run was asked to end before its last step: it has saved, and goes on when it is started again."""


class Events:
    """`events.jsonl` of a run: what happened to it, in the order in which it happened. Only rank 0 writes.

    Unlike metrics, events of steps that are trained again stay: they are how often things went wrong. Steps count from
    1, as in the metrics.
    """

    def __init__(self, run_folder: Path, writes: bool = True) -> None:
        self.path, self.writes = run_folder / EVENTS, writes

    def write(self, event: str, step: int, detail: str) -> None:
        if self.writes:
            append_json_lines(self.path, [{"time": time.time(), "step": step, "event": event, "detail": detail}])

    def read(self) -> list[dict[str, Any]]:
        return read_json_lines(self.path)


class BadSteps:
    """Judges each step before its update: a loss or gradient that is no number, or a loss far above the recent ones.

    The limit of `max_bad_steps` counts different steps over the whole run, restarts included.
    """

    def __init__(self, settings: LoopConfig, events: Events) -> None:
        self.settings, self.events = settings, events
        answered = [row for row in events.read() if row["event"] in ("skip", "rollback")]
        self.bad = {row["step"] for row in answered}
        self.rolled_back = {row["step"] for row in answered if row["event"] == "rollback"}
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    @property
    def recent(self) -> list[float]:
        """The recent good losses, oldest first: part of a checkpoint, so that a resumed run judges alike."""
        return list(self._recent)

    def remember(self, losses: Iterable[float]) -> None:
        """Forget the recent losses for these."""
        self._recent = deque(losses, maxlen=RECENT_STEPS)

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """What to do with `step`, counted from 1; raises `TrainingDiverged` where the run should end.

        Takes numbers that are the same on every rank, so every rank comes to the same verdict.
        """
        reason = self.reason(loss, grad_norm)
        if reason is None:
            self._recent.append(loss)
            return "update"
        self.bad.add(step)
        answer = self.settings.on_bad_step
        if answer == "stop" or len(self.bad) > self.settings.max_bad_steps:
            limit = "" if answer == "stop" else f", after max_bad_steps={self.settings.max_bad_steps} others"
            detail = f"{reason} at step {step}{limit}: lower the learning rate, or look at the data of this step"
            self.events.write("diverged", step, detail)
            raise TrainingDiverged(detail)
        if answer == "rollback" and step not in self.rolled_back:
            self.rolled_back.add(step)
            self.events.write("rollback", step, reason)
            return "rollback"
        self.events.write("skip", step, reason)
        return "skip"

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with this loss and gradient norm is bad, or None."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss} and gradient norm {grad_norm}"
        allowed = self.settings.spike_deviations
        if allowed is None or len(self._recent) < ENOUGH_STEPS:
            return None
        mean, deviation = statistics.fmean(self._recent), statistics.pstdev(self._recent)
        if loss <= mean + allowed * deviation:
            return None
        return f"loss {loss:.4f}, over {allowed:g} standard deviations of {deviation:.4f} above the recent {mean:.4f}"
