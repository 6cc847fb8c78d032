"""MB/s of quantization by cores: spans of tensors as Ray tasks, and in threads of one process, in turn.

Four layers at danube3_500m's width, to Q4_K_M, on 1, 2 and 4 cores each. A MB is 10^6 bytes of the bfloat16 folder.
Both ways write the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from danube_ray import presets
from danube_ray.artifacts import file_hash
from danube_ray.quantize.gguf import converting
from danube_ray.quantize.spans import Span, write_span
from danube_ray.runtime.quantization import write_spans
from danube_ray.runtime.session import session
from tests.benchmarks.pairs import median_interval, record
from tests.quantize.random_model import write_random_model

LEVEL = "Q4_K_M"
CORES = (1, 2, 4)
SHAPE = dataclasses.replace(presets.danube3_500m().model, num_layers=4, vocab_size=8192)


def in_threads(cores: int, spans: list[Span]) -> None:
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(write_span, spans))


def in_tasks(cores: int, spans: list[Span]) -> None:
    write_spans(spans, cpus_per_span=max(CORES) / cores)


def megabytes_per_s(write: Callable[[list[Span]], None], model: Path, out: Path) -> float:
    with converting(model, {LEVEL: out}) as conversion:
        began = time.perf_counter()
        write(conversion.spans)
        taken_s = time.perf_counter() - began
    return 2 * SHAPE.num_parameters / 1e6 / taken_s


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (at Ray's 15 whatever else runs here goes before tasks alone)
    ways = {
        f"{cores} {name}": partial(way, cores)
        for cores in CORES
        for name, way in (("tasks", in_tasks), ("threads", in_threads))
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    hashes = set()
    with tempfile.TemporaryDirectory() as folder, session(num_cpus=max(CORES)):
        model, out = write_random_model(Path(folder) / "model", SHAPE), Path(folder) / "model.gguf"
        megabytes_per_s(ways[f"{max(CORES)} tasks"], model, out)  # workers start, and files are read once
        for _ in range(rounds):
            for name, way in ways.items():
                speeds[name].append(megabytes_per_s(way, model, out))
                hashes.add(file_hash(out))
    assert len(hashes) == 1, "not the same bytes"
    gain = {
        name: [there / here for there, here in zip(figures, speeds[f"1 {name.split()[1]}"], strict=True)]
        for name, figures in speeds.items()
    }
    for name, figures in speeds.items():
        low, high = median_interval(gain[name])
        print(f"{name}: {statistics.median(figures):.1f} MB/s, "
              f"{statistics.median(gain[name]):.2f} [{low:.2f}, {high:.2f}] times one")  # fmt: skip
    ratios = [a / b for a, b in zip(speeds["4 tasks"], speeds["4 threads"], strict=True)]
    middle, (low, high) = statistics.median(ratios), median_interval(ratios)
    print(f"tasks / threads on 4 cores (aim 0.9): {middle:.3f} [{low:.3f}, {high:.3f}] over {rounds} rounds")
    record("quantize_speed", {"megabytes_per_s": speeds, "gain": gain, "tasks_over_threads": ratios})


if __name__ == "__main__":
    main()
