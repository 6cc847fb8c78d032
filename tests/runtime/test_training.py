"""Training on a real cluster: a worker killed with SIGKILL costs time and nothing else."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from danube_ray.artifacts import ArtifactError, read_json, read_json_lines
from danube_ray.config import ConfigError, FinetuneConfig, LoopConfig, RunConfig, to_dict
from danube_ray.runtime.training import (
    CHECKPOINT_BYTES,
    check_settings,
    pretrain,
    require_room,
    settings_identity,
)
from danube_ray.train.checkpoint import MODEL, checkpoint_folder, checkpoint_steps
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from danube_ray.train.metrics import METRICS
from danube_ray.train.pretrain import PretrainTask
from tests.models import tiny_model
from tests.runtime.text import small_run, write_text

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "tokens")


def long_run(tokens: Path, output: Path, name: str, num_workers: int) -> RunConfig:
    """Two stages of 60 steps, a checkpoint every 25: none falls on the stage's end."""
    run = small_run(tokens, output, name, num_workers)
    stages = tuple(dataclasses.replace(stage, tokens=60 * run.global_batch_tokens) for stage in run.stages)
    loop = dataclasses.replace(run.loop, checkpoint_every_steps=25, validate_every_steps=100)
    return dataclasses.replace(run, stages=stages, loop=loop, max_epochs=50.0)


def losses(run: RunConfig) -> list[float]:
    rows = read_json_lines(Path(run.output_dir) / run.name / METRICS)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, run.num_steps + 1))
    return [row["loss"] for row in rows if row["kind"] == "train"]


def kill_a_worker_in_the_middle(run: RunConfig) -> int:
    """SIGKILL one training worker once a checkpoint is committed in the first stage; the pid."""
    checkpoints = Path(run.output_dir) / run.name / "checkpoints"
    tick = threading.Event()
    while not any((checkpoints / f"step-{step:08d}" / "manifest.json").is_file() for step in (25, 50)):
        tick.wait(0.01)
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(workers) == run.loop.num_workers
    os.kill(workers[-1].pid, signal.SIGKILL)
    return workers[-1].pid


@pytest.fixture(scope="module")
def whole(ray_session, tokens, tmp_path_factory) -> RunConfig:
    run = long_run(tokens, tmp_path_factory.mktemp("whole"), "whole", num_workers=2)
    pretrain(run)
    return run


@pytest.mark.slow
def test_a_killed_worker_changes_no_bit(whole, tokens, tmp_path):
    run = long_run(tokens, tmp_path, "killed", num_workers=2)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(pretrain, run)
        pid = kill_a_worker_in_the_middle(run)
        killed = load_file(training.result() / MODEL)
    assert not psutil.pid_exists(pid)
    expected = load_file(Path(whole.output_dir) / whole.name / "checkpoints" / "step-00000120" / MODEL)
    assert all(torch.equal(killed[name], weight) for name, weight in expected.items())
    assert losses(run) == losses(whole)


def test_two_workers_train_what_one_process_does_and_go_on_where_it_stopped(whole, tokens, tmp_path, monkeypatch):
    """Half of the run in one process without Ray, the rest on the cluster with two workers; relative paths."""
    monkeypatch.chdir(tmp_path)
    run = long_run(Path(os.path.relpath(tokens)), Path(), "resized", num_workers=2)

    class Stops(LocalContext):
        def batches(self, reader, start_step):
            for step, batch in super().batches(reader, start_step):
                if step == 58:
                    raise InterruptedError
                yield step, batch

    with pytest.raises(InterruptedError):
        fit(PretrainTask(run), tmp_path / "resized", run.loop, run.optimizer, Stops())
    assert checkpoint_steps(tmp_path / "resized" / "checkpoints")[-1] == 50
    pretrain(run)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-3)


def test_a_finished_run_returns_at_once_and_says_what_made_it(whole):
    folder = Path(whole.output_dir) / whole.name
    before = (folder / METRICS).read_bytes()
    assert pretrain(whole).name == "step-00000120"
    assert (folder / METRICS).read_bytes() == before
    assert read_json(folder / "config.json")["stages"][1]["sequence_length"] == 64
    assert read_json(folder / "provenance.json")["versions"]["torch"] == torch.__version__


def test_a_run_of_other_settings_or_data_is_not_gone_on_with(whole, tokens, tmp_path):
    other = dataclasses.replace(whole, optimizer=dataclasses.replace(whole.optimizer, learning_rate=5e-3))
    with pytest.raises(ArtifactError, match=r"made with optimizer\.learning_rate = 0\.\d+, this run has 0\.005"):
        pretrain(other)
    with pytest.raises(ArtifactError, match=r"made with plan\.seed = 1234, this run has 1"):
        pretrain(dataclasses.replace(whole, loop=dataclasses.replace(whole.loop, seed=1)))
    smaller = tuple(dataclasses.replace(stage, micro_batch_size=1, name=f"{stage.name}!") for stage in whole.stages)
    moved = dataclasses.replace(whole, loop=dataclasses.replace(whole.loop, num_workers=1, log_every_steps=7))
    assert (
        pretrain(dataclasses.replace(moved, stages=smaller)).name == "step-00000120"
    )  # where and how often: the same run


def test_lengths_that_fp8_does_not_take_are_one_error_before_work(tmp_path):
    config = FinetuneConfig(
        name="odd", base=str(tiny_model(tmp_path)), data="", max_length=185, loop=LoopConfig(precision="fp8-emulated")
    )
    with pytest.raises(ConfigError, match=r"^FinetuneConfig\.max_length is 185, allowed is a multiple of 16"):
        check_settings(config, config.loop)
    check_settings(dataclasses.replace(config, max_length=None), config.loop)


def test_a_run_that_goes_on_needs_room_for_the_checkpoints_to_come_alone(tmp_path):
    parameters = shutil.disk_usage(tmp_path).free // (3 * CHECKPOINT_BYTES)  # about three checkpoints fit
    with pytest.raises(ArtifactError, match="keeping 3 checkpoints takes"):
        require_room(tmp_path / "run", 3, parameters)
    for step in (10, 20, 30):
        checkpoint_folder(tmp_path / "run" / "checkpoints", step).mkdir(parents=True)
    require_room(tmp_path / "run", 3, parameters)


def test_a_source_may_be_called_like_a_setting_that_decides_nothing(tokens, tmp_path):
    run = small_run(tokens, tmp_path, "called")

    def sharing(**shares: int) -> dict:
        stages = tuple(dataclasses.replace(stage, shares={"web": 1, **shares}) for stage in run.stages)
        return settings_identity(to_dict(dataclasses.replace(run, stages=stages)))

    assert sharing(name=2)["stages"][1]["shares"] == {"web": 1, "name": 2}
    assert len({str(sharing(**{source: share})) for source in ("name", "kind", "data") for share in (1, 2)}) == 6


def test_more_workers_than_the_cluster_has_is_one_error_before_any_starts(ray_session, tokens, tmp_path):
    with pytest.raises(ConfigError, match="num_workers is 64, allowed is at most 4 on this cluster of 4 CPUs"):
        pretrain(small_run(tokens, tmp_path, "crowd", num_workers=64))


def test_missing_shards_are_one_error_before_the_cluster_is_asked(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.*danube tokenize"):
        pretrain(small_run(tmp_path / "nowhere", tmp_path, "lost"))
