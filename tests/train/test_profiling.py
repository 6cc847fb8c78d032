"""The profiler's window, read back from what it wrote."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from danube_ray.train.profiling import WARM_STEPS, StepProfiler


def profile_steps(folder: Path, num_steps: int, of: int, device: str = "cpu") -> None:
    matrix = torch.ones(64, 64, device=device)
    with StepProfiler(folder, num_steps, torch.device(device)) as profiler:
        for _ in range(of):
            matrix @ matrix
            profiler.step()


def recorded_steps(folder: Path) -> set[str]:
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}


def test_the_steps_after_the_warm_ones_are_recorded_and_no_others(tmp_path: Path) -> None:
    profile_steps(tmp_path / "profile", num_steps=2, of=WARM_STEPS + 6)
    assert recorded_steps(tmp_path / "profile") == {f"ProfilerStep#{WARM_STEPS}", f"ProfilerStep#{WARM_STEPS + 1}"}
    table = (tmp_path / "profile" / "operations.txt").read_text()
    (product,) = [line for line in table.splitlines() if line.split()[:1] == ["aten::mm"]]
    assert product.split()[-1] == "2", "one matrix product a step"


@pytest.mark.parametrize(("num_steps", "of"), [(0, WARM_STEPS + 4), (3, WARM_STEPS - 2)])
def test_nothing_is_written_where_nothing_was_recorded(tmp_path: Path, num_steps: int, of: int) -> None:
    profile_steps(tmp_path / "profile", num_steps, of)
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_while_it_is_recorded_leaves_what_there_is(tmp_path: Path) -> None:
    profile_steps(tmp_path / "profile", num_steps=50, of=WARM_STEPS + 3)
    assert f"ProfilerStep#{WARM_STEPS + 1}" in recorded_steps(tmp_path / "profile")


@pytest.mark.gpu
def test_kernels_of_the_gpu_are_recorded(tmp_path: Path) -> None:
    profile_steps(tmp_path / "profile", num_steps=2, of=WARM_STEPS + 4, device="cuda")
    assert "CUDA" in (tmp_path / "profile" / "operations.txt").read_text()
