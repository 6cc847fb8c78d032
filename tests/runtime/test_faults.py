"""A run that everything happens to ends as one that nothing happened to, to the bit.

Workers and drivers are killed, a checkpoint is corrupted, SIGTERM comes, two stage boundaries lie on the way.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from danube_ray.artifacts import MANIFEST, read_json_lines
from danube_ray.config import RunConfig
from danube_ray.train.checkpoint import MODEL, OPTIMIZER, checkpoint_folder, checkpoint_steps
from danube_ray.train.faults import EVENTS
from danube_ray.train.metrics import METRICS
from tests.runtime.cluster import Cluster, command_line, hand_started, image_variables
from tests.runtime.text import small_run, write_text

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STAGE_STEPS = 60
DRIVER = "from tests.runtime.test_faults import drive; drive()"


def faulty_run(tokens: Path, output: Path, name: str, num_workers: int) -> RunConfig:
    """Three stages of 60 steps, a checkpoint every 15: not all fall on a stage's end."""
    run = small_run(tokens, output, name, num_workers)
    first, second = (dataclasses.replace(stage, tokens=STAGE_STEPS * run.global_batch_tokens) for stage in run.stages)
    stages = (first, second, dataclasses.replace(first, name="third", shares={"stdlib": 3, "web": 1}))
    loop = dataclasses.replace(run.loop, checkpoint_every_steps=15, keep_checkpoints=20, validate_every_steps=60)
    return dataclasses.replace(run, stages=stages, loop=loop, max_epochs=50.0)


def drive() -> None:
    """What a driver's process runs: `python -c DRIVER TOKENS OUTPUT NAME WORKERS`. Exits 130 or 143 if asked to."""
    from danube_ray.cli.training import saved_when_stopped
    from danube_ray.runtime.training import pretrain

    tokens, output, name, workers = sys.argv[1:]
    with saved_when_stopped():
        pretrain(faulty_run(Path(tokens), Path(output), name, int(workers)))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with hand_started(num_cpus=6) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "tokens")


def wait_until(happened: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    """Wait for a condition while the driver lives."""
    tick = threading.Event()
    while not happened():
        assert driver.poll() is None, driver.communicate()[0][-3000:]
        tick.wait(0.02)


def committed(folder: Path) -> list[int]:
    """Steps of the committed checkpoints."""
    steps = checkpoint_steps(folder / "checkpoints")
    return [step for step in steps if (checkpoint_folder(folder / "checkpoints", step) / MANIFEST).is_file()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_json_lines(folder / METRICS) if row["kind"] == "train"}


def events(folder: Path) -> list[str]:
    return [row["event"] for row in read_json_lines(folder / EVENTS)]


@pytest.mark.parametrize(("workers", "ending"), [(2, signal.SIGINT), (4, signal.SIGTERM)])
def test_a_run_that_everything_happens_to_ends_as_one_that_nothing_happened_to(
    cluster: Cluster, tokens: Path, tmp_path: Path, workers: int, ending: signal.Signals
):
    def begin(name: str) -> subprocess.Popen[str]:
        return cluster.drive("-c", DRIVER, str(tokens), str(tmp_path), name, str(workers))

    def past(driver: subprocess.Popen[str], step: int) -> None:
        wait_until(lambda: committed(folder)[-1:] >= [step], driver)

    calm = begin("calm")
    said = calm.communicate()[0]
    assert calm.returncode == 0, said[-3000:]
    folder = tmp_path / "troubled"

    driver = begin("troubled")
    past(driver, 15)
    training = cluster.processes("RayTrainWorker")
    assert len(training) == workers
    training[-1].send_signal(signal.SIGKILL)  # a worker, in the first stage
    past(driver, 75)
    driver.send_signal(signal.SIGKILL)  # the driver, in the second
    driver.communicate()
    psutil.wait_procs(cluster.processes("RayTrainWorker"), timeout=60)

    newest = committed(folder)[-1]
    file = checkpoint_folder(folder / "checkpoints", newest) / OPTIMIZER
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    driver = begin("troubled")
    wait_until(lambda: "checkpoint passed over" in events(folder), driver)
    past(driver, max(newest, 105) + 15)
    driver.send_signal(ending)
    said = driver.communicate()[0]
    assert driver.returncode == 128 + ending, said[-3000:]
    assert "saved and stopped" in said and ending.name in said
    stopped = committed(folder)[-1]
    assert events(folder) == ["resumed", "checkpoint passed over", "resumed", "stopped"]
    assert max(losses(folder)) == stopped < 3 * STAGE_STEPS

    driver = begin("troubled")
    said = driver.communicate()[0]
    assert driver.returncode == 0, said[-3000:]
    assert losses(folder) == losses(tmp_path / "calm")
    assert list(losses(folder)) == list(range(1, 3 * STAGE_STEPS + 1))
    ends = [checkpoint_folder(tmp_path / name / "checkpoints", 3 * STAGE_STEPS) for name in ("calm", "troubled")]
    for name in (MODEL, OPTIMIZER):
        expected, found = (load_file(end / name) for end in ends)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def elastic_run(tokens: Path, output: Path, name: str) -> RunConfig:
    """Two workers of two CPUs each, which lie on two nodes, and one where only one node is left."""
    run = faulty_run(tokens, output, name, num_workers=2)
    stages = tuple(dataclasses.replace(stage, tokens=4 * stage.tokens) for stage in run.stages)
    loop = dataclasses.replace(run.loop, min_workers=1, cpus_per_worker=2, validate_every_steps=1_000)
    return dataclasses.replace(run, stages=stages, loop=loop, max_epochs=500.0)


def drive_elastic() -> None:
    from danube_ray.runtime.training import pretrain

    tokens, output, name = sys.argv[1:]
    pretrain(elastic_run(Path(tokens), Path(output), name))


def test_a_lost_node_is_gone_on_without(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two raylets as two nodes, one of them killed with all it runs: the other trains on from the last commit."""
    with hand_started(num_cpus=3, **image_variables("RAY_health_check")) as cluster:
        node = cluster.add_node("--num-cpus=2")
        code = "from tests.runtime.test_faults import drive_elastic; drive_elastic()"
        driver = cluster.drive("-c", code, str(tokens), str(tmp_path), "elastic")
        folder = tmp_path / "elastic"
        wait_until(lambda: committed(folder)[-1:] >= [30], driver)
        tree = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        assert any("RayTrainWorker" in command_line(process) for process in tree)
        for process in tree:
            process.kill()
        killed, step = time.time(), committed(folder)[-1]
        wait_until(lambda: row_after(folder, killed) is not None, driver)
        row = row_after(folder, killed)
        assert row is not None and row["step"] >= step
        with capsys.disabled():
            print(f"\n{row['time'] - killed:.1f} s from a node's death to the next step")
        said = driver.communicate()[0]
        assert driver.returncode == 0, said[-3000:]
    assert list(losses(folder)) == list(range(1, 12 * STAGE_STEPS + 1))


def test_a_node_that_is_about_to_be_taken_away_is_saved_for(tokens: Path, tmp_path: Path):
    """Ray's own notice of a preemption: the run saves at once, between two checkpoints that are due."""
    with hand_started(num_cpus=3) as cluster:
        cluster.add_node("--num-cpus=2")
        code = "from tests.runtime.test_faults import drive_elastic; drive_elastic()"
        driver = cluster.drive("-c", code, str(tokens), str(tmp_path), "warned")
        folder = tmp_path / "warned"
        wait_until(lambda: committed(folder)[-1:] >= [15], driver)
        cluster.announce_preemption()
        wait_until(lambda: "preemption" in events(folder), driver)
        row = next(row for row in read_json_lines(folder / EVENTS) if row["event"] == "preemption")
        assert "Ray takes away node" in row["detail"]
        wait_until(lambda: row["step"] in committed(folder), driver)
        driver.kill()
        driver.communicate()


def row_after(folder: Path, moment: float) -> dict | None:
    """The first training row of workers that began after `moment`: they first drop what was logged past the commit."""
    rows = [row for row in read_json_lines(folder / METRICS) if row["kind"] == "train"]
    late = [row for row in rows if row["time"] > moment + 2.0]  # what a dying worker still wrote is not meant
    return late[0] if late else None
