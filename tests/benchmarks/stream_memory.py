"""Whether a stream's memory stays flat: 10,000 steps read through Ray Data, resident memory along the way."""

from __future__ import annotations

import tempfile
from pathlib import Path

import psutil

from danube_ray.data.windows import MixtureReader
from danube_ray.runtime.session import session
from danube_ray.runtime.streaming import read_stream, steps_dataset, stream
from tests.benchmarks.nano import nano_run, write_noise
from tests.benchmarks.pairs import record

STEPS = 10_000
MIB = 2**20


def resident_mib() -> float:
    """Memory of this process and everything Ray started under it, each page counted once."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / MIB


def main() -> None:
    readings = []
    with tempfile.TemporaryDirectory() as folder, session():
        tokens = write_noise(Path(folder) / "tokens")
        reader = MixtureReader(nano_run(tokens, Path(folder), "stream", STEPS, 1))
        for step, _ in read_stream(stream(steps_dataset(reader, 0), reader, rank=0, world_size=1)):
            if (step + 1) % (STEPS // 10) == 0:
                readings.append((step + 1, round(resident_mib(), 1)))
    early, late = readings[1][1], readings[-1][1]
    print("memory of the stream, MiB by step: " + ", ".join(f"{step:,}: {mib:,.0f}" for step, mib in readings))
    print(f"growth from step {readings[1][0]:,} to {STEPS:,}: {late - early:+.1f} MiB ({late / early - 1:+.1%})")
    record("stream_memory", {"mib_by_step": readings, "growth_mib": late - early})


if __name__ == "__main__":
    main()
