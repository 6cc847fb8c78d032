"""What Ray costs a training step: the same loop and data under Ray Train and in a plain process, in turn."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from danube_ray.artifacts import read_json_lines
from danube_ray.runtime.session import session
from danube_ray.runtime.training import pretrain
from danube_ray.train.metrics import METRICS
from tests.benchmarks.nano import nano_run, write_noise
from tests.benchmarks.pairs import compare, record

STEPS, WARMUP_STEPS = 40, 8
# At the priority that Ray gives its workers: what else this machine does is not Ray's cost.
LOCAL = """
import os, sys
os.nice(15)
from pathlib import Path
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from danube_ray.train.pretrain import PretrainTask
from tests.benchmarks.nano import nano_run
tokens, output, name, steps, cpus = sys.argv[1:]
run = nano_run(Path(tokens), Path(output), name, int(steps), int(cpus))
fit(PretrainTask(run), Path(output) / name, run.loop, run.optimizer, LocalContext())
"""


def speed(run_folder: Path) -> tuple[float, float]:
    """Tokens/s and share of time spent waiting for data, over the steps after the warm-up."""
    rows = [row for row in read_json_lines(run_folder / METRICS) if row["kind"] == "train"][WARMUP_STEPS:]
    seconds = sum(row["step_s"] for row in rows)
    tokens = sum(row["tokens_per_s"] * row["step_s"] for row in rows)
    return tokens / seconds, sum(row["data_wait_share"] * row["step_s"] for row in rows) / seconds


def main(pairs: int = 10) -> None:
    cpus = max(1, (os.cpu_count() or 2) - 1)  # a core is left for Ray
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as folder, session():
        root = Path(folder)
        tokens = write_noise(root / "tokens")
        names = iter(range(10_000))

        def under_ray() -> float:
            run = nano_run(tokens, root, f"ray-{next(names)}", STEPS, cpus)
            pretrain(run)
            tokens_per_s, wait = speed(root / run.name)
            waits.append(wait)
            return tokens_per_s

        def local() -> float:
            name = f"local-{next(names)}"
            arguments = [str(tokens), str(root), name, str(STEPS), str(cpus)]
            subprocess.run([sys.executable, "-c", LOCAL, *arguments], check=True, capture_output=True)
            return speed(root / name)[0]

        ratio, figures = compare(under_ray, local, pairs)
    wait = statistics.median(waits)
    print(f"Ray Train / local context, tokens/s: {ratio}  (aim: at least 0.98)")
    print(f"data wait, share of step time: {wait:.4%}  (aim: under 1 %)")
    record("loop_under_ray", {"tokens_per_s_ratio": ratio, "tokens_per_s": figures, "data_wait_share": wait})


if __name__ == "__main__":
    main()
