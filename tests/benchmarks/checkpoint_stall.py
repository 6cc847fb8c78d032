"""How long training stands still for a checkpoint: steps around a save against steps without, in the same run."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from pathlib import Path

from danube_ray.artifacts import read_json_lines
from danube_ray.config import RunConfig
from danube_ray.presets import PRESETS
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from danube_ray.train.metrics import METRICS
from danube_ray.train.pretrain import PretrainTask
from tests.benchmarks.nano import nano_run, write_noise
from tests.benchmarks.pairs import median_interval, record

EVERY, AFTER, WARMUP_STEPS = 10, 5, 10


def main(saves: int = 12) -> None:
    cpus = max(1, (os.cpu_count() or 2) // 2)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_noise(Path(folder) / "tokens")
        nano = nano_run(tokens, Path(folder), "nano", EVERY * saves + EVERY + WARMUP_STEPS, cpus)
        # A larger model on the same data: sixteen times the weights to copy and write.
        model = dataclasses.replace(PRESETS["proxy_20m"]().model, vocab_size=nano.model.vocab_size)
        for run in (nano, dataclasses.replace(nano, name="proxy_20m", model=model)):
            megabytes = 12 * run.model.num_parameters / 1e6
            stalls, step_s = stalls_of(run)
            low, high = median_interval(stalls)
            median = statistics.median(stalls)
            print(
                f"{run.name}: a checkpoint of {megabytes:.0f} MB costs {median:.2f} steps [{low:.2f}, {high:.2f}] of "
                f"{step_s:.3f} s, over {len(stalls)} saves  (aim: under 2)"
            )
            result[run.name] = {"megabytes": megabytes, "stalls_steps": stalls, "step_s": step_s}
    record("checkpoint_stall", result)


def stalls_of(run: RunConfig) -> tuple[list[float], float]:
    """For each save, by how many median steps the `AFTER` steps from it on took longer; and that median in seconds.

    The save falls into the time of the step after it; the steps that follow share the machine with the writing thread.
    """
    loop = dataclasses.replace(run.loop, checkpoint_every_steps=EVERY)
    folder = Path(run.output_dir) / run.name
    fit(PretrainTask(run), folder, loop, run.optimizer, LocalContext())
    seconds = {row["step"]: row["step_s"] for row in read_json_lines(folder / METRICS) if row["kind"] == "train"}
    quiet = statistics.median(s for step, s in seconds.items() if step > WARMUP_STEPS and not 0 < step % EVERY <= AFTER)
    saves = range(WARMUP_STEPS, run.num_steps - EVERY, EVERY)
    return [sum(seconds[save + step] - quiet for step in range(1, AFTER + 1)) / quiet for save in saves], quiet


if __name__ == "__main__":
    main()
