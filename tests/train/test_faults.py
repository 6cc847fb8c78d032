"""Faults inside the loop: bad steps are skipped or rolled back, a stop saves, a failed write is no checkpoint."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from danube_ray.artifacts import read_json_lines
from danube_ray.config import LoopConfig
from danube_ray.train import checkpoint
from danube_ray.train.context import LocalContext
from danube_ray.train.faults import EVENTS, BadSteps, Events, TrainingDiverged
from danube_ray.train.loop import fit
from danube_ray.train.metrics import METRICS
from tests.train.counting import OPTIMIZER, SETTINGS, CountingTask

STEPS = 14


class Poisoned(CountingTask):
    """The loss is multiplied with NaN at some steps, the first so many times that each is trained."""

    def __init__(self, at: set[int], times: int = 1_000, factor: float = math.nan) -> None:
        super().__init__(STEPS)
        self.left = dict.fromkeys(at, times)
        self.factor, self.poisons = factor, False

    def enter_step(self, module, step):
        self.poisons = self.left.get(step, 0) > 0
        if self.poisons:
            self.left[step] -= 1

    def loss(self, model, batch):
        return super().loss(model, batch) * (self.factor if self.poisons and model.training else 1.0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.checkpoint_folder(folder / "checkpoints", STEPS) / checkpoint.MODEL)


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_json_lines(folder / METRICS) if row["kind"] == kind]


def events(folder: Path) -> list[tuple[str, int]]:
    return [(row["event"], row["step"]) for row in read_json_lines(folder / EVENTS)]


def run(task: CountingTask, folder: Path, **settings) -> Path:
    fit(task, folder, dataclasses.replace(SETTINGS, **settings), OPTIMIZER, LocalContext())
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    for name, expected in weights(one).items():
        assert torch.equal(weights(other)[name], expected), name
    for kind in ("train", "validation"):
        assert [(r["step"], r["loss"]) for r in rows(one, kind)] == [(r["step"], r["loss"]) for r in rows(other, kind)]


def test_a_skipped_step_equals_a_run_set_to_skip_it(tmp_path):
    skipped = run(Poisoned({6}), tmp_path / "skipped", on_bad_step="skip")
    told = run(CountingTask(STEPS), tmp_path / "told", skip_steps=(7,))
    assert_same_run(skipped, told)
    assert events(skipped) == [("skip", 7)] and events(told) == []
    assert [row["step"] for row in rows(skipped, "train")] == [step for step in range(1, STEPS + 1) if step != 7]
    plain = run(CountingTask(STEPS), tmp_path / "plain")
    assert any(not torch.equal(weights(plain)[name], weights(told)[name]) for name in weights(told))


def test_a_resumed_run_counts_updates_and_not_steps(tmp_path):
    """AdamW's bias correction goes by updates: were it set to the step on resuming, the weights would differ."""
    whole = run(CountingTask(STEPS), tmp_path / "whole", skip_steps=(1, 2, 3))
    resumed = run(CountingTask(STEPS), tmp_path / "resumed", skip_steps=(1, 2, 3))
    for step in checkpoint.checkpoint_steps(resumed / "checkpoints")[1:]:
        (checkpoint.checkpoint_folder(resumed / "checkpoints", step) / "manifest.json").unlink()
    run(CountingTask(STEPS), resumed, skip_steps=(1, 2, 3))
    assert_same_run(whole, resumed)


def test_a_passing_fault_that_is_rolled_back_leaves_no_trace(tmp_path):
    plain = run(CountingTask(STEPS), tmp_path / "plain")
    rolled_back = run(Poisoned({6, 10}, times=1), tmp_path / "rolled_back", on_bad_step="rollback")
    assert_same_run(plain, rolled_back)
    assert events(rolled_back) == [("rollback", 7), ("rollback", 11)]


def test_a_step_that_is_bad_again_after_the_rollback_is_skipped(tmp_path):
    stubborn = run(Poisoned({6}), tmp_path / "stubborn", on_bad_step="rollback")
    assert events(stubborn) == [("rollback", 7), ("skip", 7)]
    assert_same_run(run(CountingTask(STEPS), tmp_path / "told", skip_steps=(7,)), stubborn)


def test_without_a_checkpoint_a_rollback_is_a_skip(tmp_path):
    early = run(Poisoned({1}), tmp_path / "early", on_bad_step="rollback")
    assert events(early) == [("rollback", 2), ("skip", 2)]
    assert_same_run(run(CountingTask(STEPS), tmp_path / "told", skip_steps=(2,)), early)


def test_bad_steps_end_the_run_past_their_limit_which_counts_over_restarts(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"loss nan .* at step 12, after max_bad_steps=2 others"):
        run(Poisoned({5, 9, 11}), tmp_path, max_bad_steps=2)
    assert checkpoint.newest_verified(tmp_path / "checkpoints").name == "step-00000008"
    with pytest.raises(TrainingDiverged):  # step 9 again, counted once
        run(Poisoned({5, 9, 11}), tmp_path, max_bad_steps=2)
    assert rows(run(Poisoned({5, 9, 11}), tmp_path, max_bad_steps=3), "train")[-1]["step"] == STEPS


def test_a_spike_is_told_from_a_noisy_loss(tmp_path):
    settings = LoopConfig(spike_deviations=4.0, on_bad_step="skip")
    judge = BadSteps(settings, Events(tmp_path))
    noisy = [2.0 + 0.1 * (-1) ** step for step in range(40)]
    assert {judge.judge(step, loss, 1.0) for step, loss in enumerate(noisy)} == {"update"}
    assert judge.judge(40, 2.3, 1.0) == "update"  # three deviations
    assert judge.judge(41, 2.9, 1.0) == "skip"
    assert judge.judge(42, 1.0, 1.0) == "update"  # a loss may always fall
    resumed = BadSteps(settings, Events(tmp_path))
    resumed.remember(judge.recent)
    assert resumed.judge(43, 2.9, 1.0) == "skip" and 2.9 not in resumed.recent
    detail = read_json_lines(tmp_path / EVENTS)[0]["detail"]
    assert detail == "loss 2.9000, over 4 standard deviations of 0.1091 above the recent 2.0073"
    resumed.remember([2.0] * 40)
    assert resumed.judge(44, 2.1, 1.0) == "skip"  # of losses that were all the same, any rise is one


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_end(tmp_path):
    class Stops(LocalContext):
        steps = 0

        def stop_requested(self):
            self.steps += 1
            return "SIGTERM" if self.steps > 6 else None

    result = fit(CountingTask(STEPS), tmp_path / "stopped", SETTINGS, OPTIMIZER, Stops())
    assert (result.stopped, result.steps, result.checkpoint.name) == ("SIGTERM", 7, "step-00000007")
    assert checkpoint.newest_verified(tmp_path / "stopped" / "checkpoints") == result.checkpoint
    assert events(tmp_path / "stopped") == [("stopped", 7)]
    run(CountingTask(STEPS), tmp_path / "stopped")
    assert_same_run(run(CountingTask(STEPS), tmp_path / "plain"), tmp_path / "stopped")


def test_a_preemption_notice_saves_once_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("danube_ray.train.loop.LOOK_FOR_PREEMPTION_S", 0.0)

    class Warned(LocalContext):
        notices = iter([None, None, "node 1 is taken away"])

        def preemption_notice(self):
            return next(self.notices, None)

    fit(CountingTask(STEPS), tmp_path, dataclasses.replace(SETTINGS, keep_checkpoints=9), OPTIMIZER, Warned())
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [3, 4, 8, 12, STEPS]
    assert events(tmp_path) == [("preemption", 3)]


def test_milestones_outlive_the_newest(tmp_path):
    run(CountingTask(STEPS), tmp_path, checkpoint_every_steps=2, keep_checkpoints=1, milestone_every_steps=6)
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [6, 12, STEPS]


def test_a_damaged_checkpoint_never_outlives_a_good_one(tmp_path):
    """The newest is damaged, and those after the restart come at other steps, before it."""
    run(CountingTask(STEPS), tmp_path, checkpoint_every_steps=7, keep_checkpoints=2)
    checkpoints = tmp_path / "checkpoints"
    good, damaged = checkpoint.checkpoint_steps(checkpoints)
    assert (good, damaged) == (7, STEPS)
    (checkpoint.checkpoint_folder(checkpoints, damaged) / checkpoint.MODEL).write_bytes(b"not the weights")
    left = []

    class Looks(LocalContext):
        def report(self, metrics):
            left.append((checkpoint.checkpoint_steps(checkpoints), checkpoint.newest_verified(checkpoints).name))

    fit(CountingTask(STEPS), tmp_path, dataclasses.replace(SETTINGS, keep_checkpoints=1), OPTIMIZER, Looks())
    assert left == [([step], f"step-{step:08d}") for step in (8, 12, STEPS)]


def test_a_checkpoint_that_can_not_be_written_ends_the_run_with_its_cause(tmp_path):
    class Blocks(CountingTask):
        def enter_step(self, module, step):
            if step == 3:  # a file stands where the checkpoints' folder would be
                (tmp_path / "checkpoints").write_text("")

    with pytest.raises(NotADirectoryError, match="checkpoints"):
        run(Blocks(STEPS), tmp_path)


def test_what_is_written_is_the_copy_and_not_the_weights_of_later_steps(tmp_path, monkeypatch):
    """The disk is slow: the write of step 4 is let go only once step 7 has changed the weights."""
    import threading

    later, write = threading.Event(), checkpoint.write

    def slow_write(*arguments):
        assert later.wait(60)
        return write(*arguments)

    class Hurries(CountingTask):
        def enter_step(self, module, step):
            if step == 7:
                later.set()

    plain = run(CountingTask(8), tmp_path / "plain", keep_checkpoints=9)
    monkeypatch.setattr(checkpoint, "write", slow_write)
    slow = run(Hurries(8), tmp_path / "slow", keep_checkpoints=9)
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        files = [checkpoint.checkpoint_folder(folder / "checkpoints", 4) / name for folder in (plain, slow)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_damaged_checkpoint_is_passed_over_and_the_run_says_so(tmp_path):
    plain = run(CountingTask(STEPS), tmp_path / "plain")
    damaged = run(CountingTask(STEPS), tmp_path / "damaged")
    for step, name in ((STEPS, checkpoint.OPTIMIZER), (12, checkpoint.MODEL)):
        file = checkpoint.checkpoint_folder(damaged / "checkpoints", step) / name
        file.write_bytes(file.read_bytes()[:-1])
    run(CountingTask(STEPS), damaged)
    assert events(damaged) == [("checkpoint passed over", STEPS), ("checkpoint passed over", 12), ("resumed", 8)]
    assert_same_run(plain, damaged)
