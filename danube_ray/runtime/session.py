"""Start or join a Ray cluster: the one place that calls `ray.init`."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
import ray.util
from ray.exceptions import RayTaskError

OBJECT_STORE_BYTES = 256 * 2**20
# Nodes read it once. Serve's proxy speaks gRPC with the gate: as Ray objects, messages cost about three times as much.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "danube_ray.serve.proxy.middlewares",
}


@contextmanager
def session(num_cpus: int | None = None) -> Iterator[None]:
    """Join the cluster named by `RAY_ADDRESS` (a submitted job, a hand-started head), or start a local one.

    A local cluster lives as long as the block, counts `num_cpus` logical CPUs (default: the machine's, at least 4, so
    that Ray Data always has one beside the training workers) and never picks up another Ray of this machine.
    A block inside another joins it.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": os.environ.get("DANUBE_WORKER_LOGS", "") == "1"}
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **quiet)
        local = {}
    else:
        local = own_address() | {name: value for name, value in SERVE_ENVIRONMENT.items() if name not in os.environ}
        os.environ.update(local)
        ray.init(
            address="local",
            num_cpus=num_cpus or max(4, len(os.sched_getaffinity(0))),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=True,  # Ray Train asks its State API at the end of each run, and waits 12 s without
            **quiet,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every plan and dataset otherwise
    try:
        yield
    finally:
        ray.shutdown()
        for name in local:
            os.environ.pop(name, None)


def own_address() -> dict[str, str]:
    """Variables that give a local cluster a port of its own, and tell its processes of it.

    Without `RAY_ADDRESS` they would look for "the" Ray of this machine, and find one that has ended, or another's.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}


def result(reference: Any) -> Any:
    """What a task returns; what it raises is said in its own words, not in Ray's."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
