"""Starting, changing and ending the server: what is checked before, who owns it, and what the console says."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client

from danube_ray.config import ConfigError, ServeConfig, require
from danube_ray.quantize.adapter import check_adapters
from danube_ray.runtime.deployments import QUIET, application
from danube_ray.runtime.session import session
from danube_ray.serve import files, guard
from danube_ray.serve.gate import ModelEntry
from danube_ray.serve.models import entries

APPLICATION = files.APPLICATION["name"]
POLL_S = 0.1


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serve while the block runs; gives the base URL. Port 0 takes a free one.

    `ConfigError` before anything starts: a file that can't be served, a port in use, more threads than CPUs, a server
    that runs already. At the end answers under way are waited for.
    """
    with cluster(config) as server:
        require(not server.runs, "the cluster", "serving", "one without this server", "`danube serve` redeploys it")
        try:
            server.deploy()
            yield server.url
        finally:
            drain()


def serve(config: ServeConfig, file: Path | None = None) -> None:
    """Serve until SIGINT or SIGTERM, and then until the answers under way have ended.

    `file` is where `config` comes from: SIGHUP reads it again and redeploys what has changed. Where the server runs
    already (another `danube serve` in the same cluster), this redeploys that one and returns.
    """
    with suppress(KeyboardInterrupt), cluster(config) as server:
        if server.runs:
            server.deploy()
            models = ", ".join(config.models)
            print(f"redeployed with {models}: {server.url} goes on until whoever started it ends it", flush=True)
            return
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # after Ray, which has one of its own
        asked: SimpleQueue[None] = SimpleQueue()
        if file is not None:
            signal.signal(signal.SIGHUP, lambda *_: asked.put(None))
        try:
            server.deploy()
            server.announce()
            while True:
                asked.get()
                assert file is not None
                server.reread(file)
        except KeyboardInterrupt:
            print("ending with the answers under way; Ctrl+C drops them", flush=True)
            raise
        finally:
            drain()


class Server:
    """The server of a cluster that has been joined: `config`, with the port that it really has."""

    def __init__(
        self, config: ServeConfig, known: dict[str, ModelEntry], port: int, room: Mapping[str, float] | None
    ) -> None:
        self.asked, self.config, self.known, self.room = config, replace(config, port=port), known, room
        self.runs = APPLICATION in serve_details().get("applications", {})
        self._deployed: ray_serve.Application | None = None

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.config.port}"

    def deploy(self) -> None:
        """Run the application, or what has changed of it. Returns when every engine that is kept has loaded.

        `ConfigError` for a model that can't be loaded; then what this process deployed before runs again.
        """
        if self.room is not None:
            check_room(self.config, self.room)
        new = application(self.config, self.known)
        try:
            ray_serve.run(new, name=APPLICATION, route_prefix="/", logging_config=QUIET)
        except RuntimeError:
            error = self._failure()
            if self._deployed is not None:
                ray_serve.run(self._deployed, name=APPLICATION, route_prefix="/", logging_config=QUIET)
            raise error from None
        self._deployed = new

    def reread(self, file: Path) -> None:
        """Redeploy what has changed in `file`. Where it can't be, that is said, and nothing changes."""
        old = self.asked, self.config, self.known
        try:
            config = files.read_config(file)
            address, before = f"{config.host}:{config.port}", f"{self.asked.host}:{self.asked.port}"
            require(address == before, "http_options", address, before, "the address can't change while it is in use")
            self.known = check(config)
            self.asked, self.config = config, replace(config, port=self.config.port)
            self.deploy()
            print(f"{file}: redeployed", flush=True)
        except Exception as error:  # whatever it is, answers under way are worth more
            self.asked, self.config, self.known = old
            print(f"{file}: {error}. The server goes on as it was.", flush=True)

    def announce(self) -> None:
        """One line a model, and how to go on."""
        for name, model in self.config.models.items():
            loaded = "is loaded at the first request"
            if model.min_replicas:
                load_s = ray_serve.get_deployment_handle(f"engine-{name}", APPLICATION).options(method_name="load_s")
                loaded = f"loaded in {load_s.remote().result():.1f} s"
                load_s.shutdown()  # it would go on telling the controller of its load, also when there is none any more
            adapters = f", adapters {', '.join(model.adapters)}" if model.adapters else ""
            print(f"{name}: {self.url}/v1 ({loaded}{adapters})")
        print(f"requests are logged in {get_serve_logs_dir()}/requests-*.jsonl, on the gate's node")
        print(f"chat at {self.url}. Ctrl+C stops.", flush=True)

    def _failure(self) -> ConfigError:
        """What Serve's status says about a deployment that failed."""
        status = ray_serve.status().applications[APPLICATION]
        for name, deployment in status.deployments.items():
            if deployment.status == "DEPLOY_FAILED":
                last = [line for line in deployment.message.splitlines() if line.strip()][-1]
                return ConfigError(name, "failed", "a deployment that starts", last.strip())
        return ConfigError(APPLICATION, "failed", "an application that starts", status.message)


def build(args: dict[str, Any]) -> ray_serve.Application:
    """The application of a Serve configuration file's `args`, for `serve deploy` and KubeRay."""
    config = files.from_args(args)
    host = serve_details().get("http_options", {}).get("host", config.host)
    config = replace(config, host=host)
    return application(config, check(config))


@contextmanager
def cluster(config: ServeConfig) -> Iterator[Server]:
    """Check `config`, start or join the cluster, and see to it that Serve listens where `config` says."""
    known = check(config)
    joined = ray.is_initialized() or "RAY_ADDRESS" in os.environ
    port = config.port if joined else free_port(config.host, config.port)
    with session():
        # A cluster of somebody's may grow on demand; ours can't, and would wait for ever.
        room = None if joined else ray.cluster_resources()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        yield Server(config, known, listen(config.host, port), room)


def check(config: ServeConfig) -> dict[str, ModelEntry]:
    """What the gate must know of each model; `ConfigError` for what can't, or must not, be served."""
    guard.check_bind(config.host, config.gate)
    known = entries(config)
    for name, model in config.models.items():
        if model.weights.is_dir():
            remedy = "pip install 'danube-ray[vllm]'; for CPUs `danube quantize` makes a GGUF file of it"
            require(find_spec("vllm") is not None, f"engine of {name}", "vLLM", "one that is installed", remedy)
            from danube_ray.runtime import vllm  # an extra, and seconds of imports

            vllm.check(model)
        else:
            check_adapters(model.adapters, model.weights)
    return known


def check_room(config: ServeConfig, room: Mapping[str, float]) -> None:
    """`ConfigError` where a machine with these resources can't hold the engines that are kept, or one of the others
    when it is asked for."""
    for setting, resource in (("num_threads", "CPU"), ("num_gpus", "GPU")):
        sizes = [(getattr(model, setting), model.min_replicas) for model in config.models.values()]
        wanted = max(sum(size * number for size, number in sizes), *(size for size, _ in sizes))
        allowed = f"at most {room.get(resource, 0):.0f}, over all engines that are kept and for each of the others"
        require(wanted <= room.get(resource, 0), setting, wanted, allowed, "give each fewer")


def listen(host: str, port: int) -> int:
    """Start Serve where it is not yet; returns its port. Serve that other applications use is joined or refused."""
    details = serve_details()
    if details:
        http = details["http_options"]
        roots = [name for name, one in details["applications"].items() if one["route_prefix"] == "/"]
        taken = f"a cluster where no other application has it: {', '.join(roots)} does"
        require(not set(roots) - {APPLICATION}, "the route", "/", taken)
        if (http["host"], http["port"]) == (host, port or http["port"]):
            return http["port"]
        allowed = f"{http['host']}:{http['port']}, where Serve listens for {', '.join(details['applications'])}"
        remedy = "a cluster has one Serve, and it one address"
        require(not details["applications"], "the address", f"{host}:{port}", allowed, remedy)
    port = free_port(host, port)
    if details:
        ray_serve.shutdown()  # nobody's, and at another address
    # Serve's own time-out would cut long answers in the middle; the gate has a deadline instead.
    http = HTTPOptions(host=host, port=port, request_timeout_s=None)
    ray_serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=QUIET)
    return port


def serve_details() -> dict[str, Any]:
    """What Serve's REST API tells: `http_options`, `applications` by name. Empty where Serve is not running."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return client.get_serve_details() if client else {}


def free_port(host: str, port: int) -> int:
    """`port` if nobody listens there, or any free one for 0. Serve itself would share a port with another Serve."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            allowed = f"a port of {host} that is free ({error.strerror})"
            require(False, "port", port, allowed, "choose another one, or stop what listens there")
        return probe.getsockname()[1]


def drain() -> None:
    """Take no more requests and wait until the answers under way have ended: Serve stops the replicas then."""
    ray_serve.delete(APPLICATION, _blocking=False)
    while APPLICATION in ray_serve.status().applications:
        time.sleep(POLL_S)
