"""A cluster started by hand, as cluster/README.md says, on ports of its own: another Ray may run on this machine."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, held together so that they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Cluster:
    """A head and its nodes; `address` is what a driver joins, `dashboard` what a job is submitted to."""

    address: str
    dashboard: str
    environment: dict[str, str]
    head: subprocess.Popen[str]
    nodes: list[subprocess.Popen[str]] = field(default_factory=list)

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Submit a job from the repository's root and wait for it."""
        submit = ["ray", "job", "submit", "--address", self.dashboard, "--working-dir", str(REPOSITORY), "--", *command]
        return subprocess.run(submit, env=self.environment, capture_output=True, text=True, check=False)

    def drive(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a Python process that joins the cluster."""
        environment = {**self.environment, "RAY_ADDRESS": self.address, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def add_node(self, *options: str) -> subprocess.Popen[str]:
        """Start one more raylet on this machine and wait until it has joined."""
        command = ["ray", "start", f"--address={self.address}", "--disable-usage-stats", "--block", *options]
        node = started(command, self.environment)
        self.nodes.append(node)
        return node

    def announce_preemption(self) -> None:
        """Tell Ray, as a cloud's agent would, that the node that isn't the head will be taken away in a minute."""
        script = (
            "import ray; ray.init(logging_level='ERROR');"
            "print([n['NodeID'] for n in ray.nodes() if 'node:__internal_head__' not in n['Resources']][0])"
        )
        found = self.drive("-c", script)
        node = found.communicate()[0].split()[-1]
        why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60"]
        command = ["ray", "drain-node", f"--address={self.address}", f"--node-id={node}", *why]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def processes(self, name: str) -> list[psutil.Process]:
        """Live processes below the head and the nodes whose command line names `name`."""
        roots = [psutil.Process(process.pid) for process in (self.head, *self.nodes) if process.poll() is None]
        below = [process for root in roots for process in root.children(recursive=True)]
        return [process for process in below if name in command_line(process)]


def image_variables(prefix: str) -> dict[str, str]:
    """What cluster/Dockerfile sets in the environment of every node, of the variables that begin with `prefix`."""
    text = (REPOSITORY / "cluster" / "Dockerfile").read_text()
    found = dict(re.findall(rf"({prefix}\w*)=(\S+)", text))
    assert found, prefix
    return found


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Run `ray start --block` until it says that it runs."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            break
    assert process.poll() is None, "".join(said)
    return process


@contextmanager
def hand_started(num_cpus: int, **variables: str) -> Iterator[Cluster]:
    """A head with `num_cpus` logical CPUs and these environment variables, token authentication on."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing is left to drain when the tests are done
        **variables,
    }
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += [f"--num-cpus={num_cpus}", f"--object-store-memory={128 * 2**20}", "--disable-usage-stats", "--block"]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # not tmp_path: a socket's path is 107 bytes at most
        head = started(["ray", "start", "--head", f"--temp-dir={folder}", *options], environment)
        address, dashboard = f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}"
        cluster = Cluster(address, dashboard, environment, head)
        try:
            yield cluster
        finally:
            for process in (*cluster.nodes, head):
                process.terminate()  # with `--block` it takes its own processes, and no other's, with it
            for process in (*cluster.nodes, head):
                process.communicate(timeout=60)
