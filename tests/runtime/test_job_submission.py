"""A job submitted to a head that was started by hand, as the README says it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from danube_ray.artifacts import read_json_lines
from tests.benchmarks.nano import write_noise

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def head(tmp_path_factory) -> Iterator[str]:
    """A head on ports of its own, ended by its pid: `ray stop` would end every Ray of this machine."""
    gcs, dashboard, agent = free_ports(3)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        "--disable-usage-stats", "--object-store-memory=200000000",
    ]  # fmt: skip
    log = (tmp_path_factory.mktemp("head") / "log").open("w+")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_open(dashboard, process)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    tick = threading.Event()
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        tick.wait(0.2)
    raise AssertionError("the head ended before its dashboard opened")


def test_ray_job_submit_runs_the_pretraining_job(head, tmp_path):
    tokens = write_noise(tmp_path / "tokens", tokens_per_source=20_000)
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", ".", "--",
        "python", "jobs/pretrain.py", "nano", "--name", "job", "--tokens-dir", str(tokens), "--output-dir",
        str(tmp_path / "runs"), "--stages.0.tokens", "12288", "--stages.1.tokens", "8192", "--stages.2.tokens", "8192",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read_json_lines(tmp_path / "runs" / "job" / "metrics.jsonl")
    assert rows[-1]["step"] == 7 and rows[-1]["stage"] == "anneal"
    assert (tmp_path / "runs" / "job" / "checkpoints" / "step-00000007" / "manifest.json").is_file()
    assert (tmp_path / "runs" / "job" / "report.html").is_file()
