"""The stream: the same tokens in the same global order for any number of workers, however unevenly blocks finish."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from danube_ray.data.windows import MixtureReader
from danube_ray.runtime import streaming
from tests.runtime.text import small_run, write_text

pytestmark = pytest.mark.ray


class SlowReader:
    """The run's reader, in which some steps take far longer than others, so that blocks finish out of order."""

    def __init__(self, tokens: Path) -> None:
        self.reader = MixtureReader(small_run(tokens, tokens, "stream"))
        self.num_steps = self.reader.num_steps

    def __call__(self, step, rank, world_size):
        if step % 5 == 0:
            threading.Event().wait(0.15)
        return self.reader(step, rank, world_size)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "tokens")


def read_all(reader, world_size: int, start: int) -> list[np.ndarray]:
    """The global batch of every step: the rows of all ranks in rank order, padding left out."""
    dataset = streaming.steps_dataset(reader, start)
    iterators = [streaming.stream(dataset, reader, rank, world_size) for rank in range(world_size)]
    steps = []
    for ranks in zip(*(streaming.read_stream(iterator) for iterator in iterators), strict=True):
        assert {step for step, _ in ranks} == {start + len(steps)}
        steps.append(np.concatenate([batch["tokens"][batch["weight"] == 1] for _, batch in ranks]))
    return steps


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_workers_reads_the_plan_in_order(ray_session, tokens, monkeypatch, world_size):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 2_000)  # a few steps a block, so that many are in flight
    reader = SlowReader(tokens)
    expected = [reader.reader(step, 0, 1)["tokens"] for step in range(reader.num_steps)]
    got = read_all(reader, world_size, start=0)
    assert len(got) == len(expected) == 24
    for step, (ours, plan) in enumerate(zip(got, expected, strict=True)):
        assert np.array_equal(ours, plan), f"step {step}"


def test_a_stream_begins_at_any_step(ray_session, tokens):
    reader = MixtureReader(small_run(tokens, tokens, "stream"))
    got = read_all(reader, world_size=2, start=17)
    assert len(got) == 24 - 17 and np.array_equal(got[0], reader(17, 0, 1)["tokens"])
    assert read_all(reader, world_size=2, start=24) == []


def test_a_stream_flows_where_the_workers_have_every_cpu(ray_session, tokens):
    """As they may in an elastic run, once they have grown."""
    workers = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(workers.ready())
    try:
        reader = MixtureReader(small_run(tokens, tokens, "stream"))
        assert len(read_all(reader, world_size=2, start=20)) == 4
    finally:
        remove_placement_group(workers)


def test_the_processes_of_a_stream_need_not_wait_for_torch():
    code = "import sys, danube_ray.runtime.streaming, danube_ray.data.windows; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
