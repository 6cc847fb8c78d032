"""What a search varies, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from danube_ray.artifacts import read_json, write_json
from danube_ray.config import require, require_positive

TRIALS = "trials.json"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Ranges of a run's settings by dotted path, sampled on a log scale, and how many trials to give them."""

    ranges: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"optimizer.learning_rate": (3e-4, 1e-2), "optimizer.weight_decay": (0.01, 0.3)}
    )
    num_trials: int = 8
    max_concurrent: int = 2
    seed: int = 1234

    def __post_init__(self) -> None:
        require_positive(self, "num_trials", "max_concurrent")
        require(bool(self.ranges), "Study.ranges", self.ranges, "at least one setting")
        for path, (low, high) in self.ranges.items():
            require(0 < low < high, f"Study.ranges[{path!r}]", (low, high), "0 < low < high")


@dataclass(frozen=True)
class Trial:
    """One proxy run: the settings tried, its validation loss (None when it failed) and why it failed."""

    config: dict[str, float]
    loss: float | None
    steps: int
    error: str | None = None


def write_trials(folder: Path, trials: list[Trial]) -> None:
    """Write `trials.json`, best first."""
    write_json(folder / TRIALS, [vars(trial) for trial in ranked(trials)])


def read_trials(folder: Path) -> list[Trial]:
    """The trials of a finished search, best first."""
    rows: list[dict[str, Any]] = read_json(folder / TRIALS)
    return [Trial(**row) for row in rows]


def ranked(trials: list[Trial]) -> list[Trial]:
    """Trials by loss, failed ones last."""
    return sorted(trials, key=lambda trial: (trial.loss is None, trial.loss or 0.0))
