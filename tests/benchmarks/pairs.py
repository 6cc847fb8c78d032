"""Side-by-side measurement: two ways of doing a thing, run in turn, compared pair by pair.

A machine's speed drifts; the ratio of two runs next to each other drifts far less. Which of the two goes first
alternates, and the median ratio comes with the distribution-free interval that order statistics give.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from danube_ray.artifacts import provenance, write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """Median of the pairwise ratios with an interval that holds the true median with about 95 % confidence."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.pairs} pairs"


def median_interval(values: list[float]) -> tuple[float, float]:
    """The narrowest symmetric pair of order statistics that covers the median with at least 95 % (or the extremes)."""
    ordered, n = sorted(values), len(values)
    for rank in range(n // 2, -1, -1):
        outside = 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n
        if outside <= 0.05:
            index = max(0, rank - 1)
            return ordered[index], ordered[n - 1 - index]
    return ordered[0], ordered[-1]


def share_interval(hits: int, number: int) -> tuple[float, float]:
    """Wilson's interval for a share of which `hits` of `number` were seen, with 95 % confidence."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, weight = hits / number, 1 + z * z / number
    center = (share + z * z / (2 * number)) / weight
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number)) / weight
    return center - half, center + half


def compare(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int
) -> tuple[Ratio, list[tuple[float, float]]]:
    """Run both `pairs` times in turn; the ratio ours / theirs of what they return, and the figures themselves."""
    figures = []
    for index in range(pairs):
        if index % 2:
            b = theirs()
            figures.append((ours(), b))
        else:
            a = ours()
            figures.append((a, theirs()))
    ratios = [a / b for a, b in figures]
    return Ratio(statistics.median(ratios), *median_interval(ratios), pairs), figures


def record(name: str, result: dict[str, Any]) -> Path:
    """Write a result with the machine it was measured on to `results/NAME.json`."""
    machine = {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "load_average_15_min": os.getloadavg()[2],  # what else ran shows in it
        "python": platform.python_version(),
    }
    plain = {key: asdict(value) if isinstance(value, Ratio) else value for key, value in result.items()}
    path = RESULTS / f"{name}.json"
    write_json(path, {**plain, "machine": machine, "provenance": provenance()})
    return path


def processor() -> str:
    """The processor's name, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
