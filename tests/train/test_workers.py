"""Two, four, then three workers on one run: the same tokens, the same first gradient, losses that stay together."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from danube_ray.artifacts import read_json_lines
from danube_ray.config import RunConfig
from danube_ray.train.metrics import METRICS
from tests.runtime.text import small_run, write_text

pytestmark = pytest.mark.slow

STEPS = 50
RANK = """
import sys
from pathlib import Path
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from danube_ray.model.transformer import Transformer
from danube_ray.train.context import torchrun_context
from danube_ray.train.loop import fit
from danube_ray.train.pretrain import PretrainTask
from danube_ray.train.step import accumulate
from danube_ray.train.strategy import build_strategy
from tests.train.test_workers import fifty_steps
import torch

what, tokens, output, last = sys.argv[1:]
with torchrun_context() as context:
    run = fifty_steps(Path(tokens), Path(output), context.world_size)
    task = PretrainTask(run)
    if what == "gradient":
        torch.manual_seed(run.loop.seed)
        strategy = build_strategy(task.build_model(), run.optimizer, run.loop, context)
        batch = task.reader(0, context.rank, context.world_size)
        save_arrays(batch, f"{output}/batch-{context.world_size}-{context.rank}.safetensors")
        accumulate(task, strategy, batch, 0, run.loop, context)
        if context.rank == 0:
            gradients = {name: weight.grad for name, weight in strategy.module.named_parameters()}
            save_file(gradients, f"{output}/gradient-{context.world_size}.safetensors")
    else:
        asked = []
        context.stop_requested = lambda: asked.append(1) or ("enough" if len(asked) >= int(last) else None)
        fit(task, Path(output) / what, run.loop, run.optimizer, context)
"""


def fifty_steps(tokens: Path, output: Path, num_workers: int) -> RunConfig:
    """Two stages of 25 steps: 8 windows a step, then 4, which three workers can't share evenly."""
    run = small_run(tokens, output, "run", num_workers)
    stages = tuple(dataclasses.replace(stage, tokens=STEPS // 2 * run.global_batch_tokens) for stage in run.stages)
    loop = dataclasses.replace(run.loop, validate_every_steps=STEPS)
    return dataclasses.replace(run, stages=stages, loop=loop, max_epochs=50.0)


def torchrun(workers: int, folder: Path, *arguments: str) -> None:
    script = folder / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    done = subprocess.run(
        [*launcher, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "tokens")


def test_any_number_of_workers_has_the_same_tokens_and_the_same_first_gradient(tokens: Path, tmp_path: Path):
    seen, gradients = {}, {}
    for workers in (2, 3, 4):
        torchrun(workers, tmp_path, "gradient", str(tokens), str(tmp_path), "0")
        batches = [load_arrays(tmp_path / f"batch-{workers}-{rank}.safetensors") for rank in range(workers)]
        seen[workers] = np.concatenate([batch["tokens"][batch["weight"] == 1] for batch in batches])
        parts = load_file(tmp_path / f"gradient-{workers}.safetensors")
        gradients[workers] = torch.cat([parts[name].flatten().double() for name in sorted(parts)])
    assert len(seen[2]) == 8
    for workers in (3, 4):
        assert np.array_equal(seen[workers], seen[2])
        difference = (gradients[workers] - gradients[2]).norm() / gradients[2].norm()
        assert difference < 1e-5


def test_a_run_that_changes_from_two_to_four_to_three_workers_keeps_its_losses(tokens: Path, tmp_path: Path):
    torchrun(2, tmp_path, "constant", str(tokens), str(tmp_path), "1000")
    for workers, steps in ((2, 17), (4, 16), (3, 1000)):
        torchrun(workers, tmp_path, "changing", str(tokens), str(tmp_path), str(steps))
    logs = {name: read_json_lines(tmp_path / name / METRICS) for name in ("constant", "changing")}
    losses = {name: [row["loss"] for row in rows if row["kind"] == "train"] for name, rows in logs.items()}
    assert [row["step"] for row in logs["changing"] if row["kind"] == "train"] == list(range(1, STEPS + 1))
    events = read_json_lines(tmp_path / "changing" / "events.jsonl")
    expected = [("stopped", 17), ("resumed", 17), ("stopped", 33), ("resumed", 33)]
    assert [(row["event"], row["step"]) for row in events] == expected
    assert losses["changing"] == pytest.approx(losses["constant"], abs=1e-3)
    assert losses["constant"][-1] < losses["constant"][0] - 0.5
