"""Start or join a Ray cluster: the one place that calls `ray.init`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

OBJECT_STORE_BYTES = 256 * 2**20


@contextmanager
def session(num_cpus: int | None = None, **init: Any) -> Iterator[None]:
    """Join the cluster named by `RAY_ADDRESS` (a submitted job, a hand-started head), or start a local one.

    A local cluster lives as long as the block, counts `num_cpus` logical CPUs (default: the machine's, at least 4, so
    that Ray Data always has one beside the training workers) and never picks up another Ray of this machine.
    A block inside another joins it.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": os.environ.get("DANUBE_WORKER_LOGS", "") == "1"}
    if address:
        ray.init(address=address, **{**quiet, **init})
    else:
        local = {
            "address": "local",
            "num_cpus": num_cpus or max(4, len(os.sched_getaffinity(0))),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        ray.init(**{**quiet, **local, **init})
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every plan and dataset otherwise
    try:
        yield
    finally:
        ray.shutdown()
