"""From the command to the first step of a run that goes on: everything a user waits for, Ray's start included."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from danube_ray.artifacts import MANIFEST, read_json_lines
from danube_ray.train.checkpoint import checkpoint_folder
from danube_ray.train.metrics import METRICS
from tests.benchmarks.nano import nano_run, write_noise
from tests.benchmarks.pairs import median_interval, record

STEPS, SAVED = 40, 20
DRIVE = """
import sys
from pathlib import Path
from danube_ray.runtime.training import pretrain
from tests.benchmarks.resume import resumable
tokens, output, cpus = sys.argv[1:]
pretrain(resumable(Path(tokens), Path(output), int(cpus)))
"""


def resumable(tokens: Path, output: Path, cpus: int):
    run = nano_run(tokens, output, "resumed", STEPS, cpus)
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, checkpoint_every_steps=SAVED))


def main(times: int = 10) -> None:
    cpus = max(1, (os.cpu_count() or 2) - 1)
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-c", DRIVE, str(write_noise(folder / "tokens")), name, str(cpus)]
        subprocess.run(command, check=True, capture_output=True)
        for _ in range(times):
            undo(folder / "resumed")
            began = time.time()
            subprocess.run(command, check=True, capture_output=True)
            rows = read_json_lines(folder / "resumed" / METRICS)
            first = next(row for row in rows if row["kind"] == "train" and row["step"] == SAVED + 1)
            assert first["time"] > began
            seconds.append(first["time"] - began)
    low, high = median_interval(seconds)
    median = statistics.median(seconds)
    print(f"resume to the first step: {median:.1f} s [{low:.1f}, {high:.1f}] over {times} times  (aim: under 15 s)")
    record("resume", {"seconds": seconds})


def undo(run: Path) -> None:
    """Make the finished run one that died after its first checkpoint."""
    (run / MANIFEST).unlink()
    (checkpoint_folder(run / "checkpoints", STEPS) / MANIFEST).unlink()


if __name__ == "__main__":
    main()
