"""The loop's promises: what a unit weighs, what a crash costs, and what another number of workers changes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from danube_ray.artifacts import ArtifactError, read_json, read_json_lines
from danube_ray.train import checkpoint
from danube_ray.train.build import build_module
from danube_ray.train.context import LocalContext
from danube_ray.train.faults import TrainingDiverged
from danube_ray.train.loop import fit
from danube_ray.train.metrics import METRICS
from tests.train.counting import OPTIMIZER, SETTINGS, CountingTask


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest_verified(folder / "checkpoints")
    assert newest is not None
    return load_file(newest / checkpoint.MODEL)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(folder / METRICS) if row["kind"] == "train"]


class Crash(Exception):
    pass


class CrashingContext(LocalContext):
    """Dies when the stream reaches a step, as a worker does: nothing after the last checkpoint is kept."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def batches(self, reader, start_step):
        for step, batch in super().batches(reader, start_step):
            if step == self.at:
                raise Crash
            yield step, batch


def test_the_loss_falls_and_everything_is_logged_once(tmp_path):
    result = fit(CountingTask(), tmp_path, SETTINGS, OPTIMIZER, LocalContext())
    rows = read_json_lines(tmp_path / METRICS)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 11))
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [4, 8, 10]
    assert rows[0]["tokens"] == 96 and 0 <= rows[0]["data_wait_share"] <= 1 and rows[0]["tokens_per_s"] > 0
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert result.steps == 10 and result.checkpoint == checkpoint.newest_verified(tmp_path / "checkpoints")
    assert result.validation_loss == rows[-1]["loss"] == pytest.approx(rows[-1]["by_source"]["counting"])


def test_micro_batches_do_not_change_the_step(tmp_path):
    for size in (6, 1, 4):  # 4 leaves a short last micro-batch
        fit(CountingTask(5, micro_batch_size=size), tmp_path / str(size), SETTINGS, OPTIMIZER, LocalContext())
    for size in ("1", "4"):
        assert losses(tmp_path / size) == pytest.approx(losses(tmp_path / "6"), abs=1e-5)
        for name, expected in weights(tmp_path / "6").items():
            torch.testing.assert_close(weights(tmp_path / size)[name], expected, atol=1e-5, rtol=0)


# Delayed FP8 scales look back, so they are a part of what a checkpoint must hold.
DELAYED = dataclasses.replace(SETTINGS, precision="fp8-emulated", fp8_scaling="delayed")


@pytest.mark.parametrize(
    ("crash_at", "settings"), [(2, SETTINGS), (4, SETTINGS), (7, SETTINGS), (9, SETTINGS), (7, DELAYED)]
)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, crash_at, settings):
    fit(CountingTask(), tmp_path / "whole", settings, OPTIMIZER, LocalContext())
    with pytest.raises(Crash):
        fit(CountingTask(), tmp_path / "killed", settings, OPTIMIZER, CrashingContext(crash_at))
    fit(CountingTask(), tmp_path / "killed", settings, OPTIMIZER, LocalContext())
    for name, expected in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "killed")[name], expected), name
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_model_that_a_checkpoint_will_fill_draws_no_weights():
    """Drawing is what takes long in building: the generator stands where the seed put it."""
    drawn = build_module(CountingTask(), SETTINGS, torch.device("cpu"))
    torch.manual_seed(SETTINGS.seed)
    state = torch.get_rng_state()
    undrawn = build_module(CountingTask(), SETTINGS, torch.device("cpu"), drawn=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert undrawn.state_dict().keys() == drawn.state_dict().keys()


def test_a_torn_or_damaged_checkpoint_is_passed_over(tmp_path):
    fit(CountingTask(), tmp_path, SETTINGS, OPTIMIZER, LocalContext())
    folder = tmp_path / "checkpoints"
    (checkpoint.checkpoint_folder(folder, 10) / "manifest.json").unlink()  # died before the commit
    assert checkpoint.step_of(checkpoint.newest_verified(folder)) == 8
    model = checkpoint.checkpoint_folder(folder, 8) / checkpoint.MODEL
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    assert checkpoint.step_of(checkpoint.newest_verified(folder)) == 4


def test_a_run_goes_on_in_the_precision_that_is_asked_for(tmp_path):
    """Only a run that FP8's guard has brought to bf16 stays there."""
    bf16 = dataclasses.replace(SETTINGS, precision="bf16")
    with pytest.raises(Crash):
        fit(CountingTask(), tmp_path, bf16, OPTIMIZER, CrashingContext(6))
    fit(CountingTask(), tmp_path, SETTINGS, OPTIMIZER, LocalContext())
    newest = checkpoint.newest_committed(tmp_path / "checkpoints")
    assert newest is not None and read_json(newest / checkpoint.STATE)["precision"] == "fp32"


def test_what_a_run_is_is_told_by_a_checkpoint_whose_state_can_be_read(tmp_path):
    fit(CountingTask(), tmp_path, SETTINGS, OPTIMIZER, LocalContext())
    steps = [checkpoint.checkpoint_folder(tmp_path / "checkpoints", step) for step in (8, 10)]
    assert checkpoint.newest_committed(tmp_path / "checkpoints") == steps[1]
    (steps[1] / checkpoint.STATE).write_text('{"step": 10, "ident')
    assert checkpoint.newest_committed(tmp_path / "checkpoints") == steps[0]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every_steps=2, keep_checkpoints=2)
    fit(CountingTask(), tmp_path, settings, OPTIMIZER, LocalContext())
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [8, 10]


def test_a_checkpoint_of_another_plan_is_refused_with_the_first_field_that_differs(tmp_path):
    fit(CountingTask(4), tmp_path, SETTINGS, OPTIMIZER, LocalContext())
    other = CountingTask(8)
    other.stride = 5
    with pytest.raises(ArtifactError, match=r"plan\.stride = 3, this run has 5: give this run another name"):
        fit(other, tmp_path, SETTINGS, OPTIMIZER, LocalContext())


def test_a_checkpoint_of_another_model_is_refused_with_parameters_that_differ(tmp_path):
    weights = {name: torch.ones(1) for name in ("a", "b")}
    folder = checkpoint.write(tmp_path, checkpoint.Snapshot(weights, weights, {}, {"step": 1}))
    assert checkpoint.read(folder, {"a", "b"}).weights.keys() == {"a", "b"}
    with pytest.raises(ArtifactError, match=r"holds other parameters than the model, such as b, c$"):
        checkpoint.read(folder, {"a", "c"})


def test_a_loss_that_is_no_number_stops_the_run_with_its_step(tmp_path):
    class Diverging(CountingTask):
        def loss(self, model, batch):
            return super().loss(model, batch) * float("nan")

    stop = dataclasses.replace(SETTINGS, on_bad_step="stop")
    with pytest.raises(TrainingDiverged, match="at step 1"):
        fit(Diverging(), tmp_path, stop, OPTIMIZER, LocalContext())
    assert checkpoint.newest_verified(tmp_path / "checkpoints") is None


RANK = """
from pathlib import Path
import sys
from danube_ray.train.context import torchrun_context
from danube_ray.train.loop import fit
from tests.train.counting import OPTIMIZER, SETTINGS, CountingTask
with torchrun_context() as context:
    fit(CountingTask(int(sys.argv[2])), Path(sys.argv[1]), SETTINGS, OPTIMIZER, context)
"""


def torchrun(workers: int, folder: Path, steps: int) -> None:
    """Run the loop in `workers` processes of one gloo group."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    script = folder.with_suffix(".py")
    script.write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), str(folder), str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_four_workers_train_what_one_does(tmp_path):
    """Six windows over four ranks: two each, the last rank only padding."""
    fit(CountingTask(), tmp_path / "one", SETTINGS, OPTIMIZER, LocalContext())
    torchrun(4, tmp_path / "four", steps=10)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    for name, expected in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "four")[name], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_three_workers_resume_to_the_bit(tmp_path):
    """Three ranks: the case in which DDP's regrouped buckets would change the order of addition."""
    torchrun(3, tmp_path / "whole", steps=8)
    torchrun(3, tmp_path / "stopped", steps=8)
    for step in checkpoint.checkpoint_steps(tmp_path / "stopped" / "checkpoints")[1:]:
        (checkpoint.checkpoint_folder(tmp_path / "stopped" / "checkpoints", step) / "manifest.json").unlink()
    assert checkpoint.step_of(checkpoint.newest_verified(tmp_path / "stopped" / "checkpoints")) == 4
    torchrun(3, tmp_path / "stopped", steps=8)
    for name, expected in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "stopped")[name], expected), name


def test_metrics_are_json_without_a_torn_line(tmp_path):
    fit(CountingTask(4), tmp_path, SETTINGS, OPTIMIZER, LocalContext())
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert all(json.loads(line)["kind"] in ("train", "validation") for line in lines)
