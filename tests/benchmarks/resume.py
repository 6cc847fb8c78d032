"""How long a user waits for the first step of a run that goes on: after a worker's death, and from the command."""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

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
tokens, output, cpus, name, steps, saved = sys.argv[1:]
pretrain(resumable(Path(tokens), Path(output), int(cpus), name, int(steps), int(saved)))
"""


def resumable(tokens: Path, output: Path, cpus: int, name: str, steps: int, saved: int):
    run = nano_run(tokens, output, name, steps, cpus)
    loop = dataclasses.replace(run.loop, checkpoint_every_steps=saved, max_restarts=1_000)
    return dataclasses.replace(run, loop=loop)


def main(times: int = 10) -> None:
    cpus = str(max(1, (os.cpu_count() or 2) - 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-c", DRIVE, str(write_noise(folder / "tokens")), name, cpus]
        figures = {
            "from a worker's death": deaths(folder, command, times),
            "from the command, Ray's start included": commands(folder, command, times),
        }
    for since, seconds in figures.items():
        low, high = median_interval(seconds)
        median = statistics.median(seconds)
        print(f"first step again {since}: {median:.1f} s [{low:.1f}, {high:.1f}] over {times} times  (aim: under 15 s)")
    after_death, after_command = figures.values()
    record("resume", {"seconds_after_death": after_death, "seconds": after_command})


def deaths(folder: Path, command: list[str], times: int) -> list[float]:
    """Seconds from a worker's SIGKILL to the next step, again and again in one run."""
    driver = subprocess.Popen([*command, "killed", "2000", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, since = [], 0.0

    def wait_for_steps(number: int) -> list[float]:
        while len(steps := steps_after(folder / "killed", since)) < number:
            assert driver.poll() is None, "the run has ended"
            time.sleep(0.2)
        return steps

    for _ in range(times):
        wait_for_steps(6)  # by then one is saved
        since = time.time()
        for process in psutil.Process(driver.pid).children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
        seconds.append(wait_for_steps(1)[0] - since)
    driver.send_signal(signal.SIGTERM)
    driver.wait()
    return seconds


def commands(folder: Path, command: list[str], times: int) -> list[float]:
    """Seconds from the start of a driver's process to the first step."""
    run, arguments = folder / "resumed", [*command, "resumed", str(STEPS), str(SAVED)]
    subprocess.run(arguments, check=True, capture_output=True)
    seconds = []
    for _ in range(times):
        # What is left is a run that died after its first checkpoint.
        (run / MANIFEST).unlink()
        (checkpoint_folder(run / "checkpoints", STEPS) / MANIFEST).unlink()
        began = time.time()
        subprocess.run(arguments, check=True, capture_output=True)
        seconds.append(steps_after(run, began)[0] - began)
    return seconds


def steps_after(run: Path, moment: float) -> list[float]:
    """When steps were logged after `moment`."""
    return [row["time"] for row in read_json_lines(run / METRICS) if row["kind"] == "train" and row["time"] > moment]


if __name__ == "__main__":
    main()
