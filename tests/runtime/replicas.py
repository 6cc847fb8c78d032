"""Serve's replicas as processes."""

from __future__ import annotations

import psutil


def replica(deployment: str) -> int:
    """The process of a deployment's newest replica: Serve puts the names into its title."""
    found = replicas(deployment)
    assert found, f"no process runs {deployment}"
    return found[-1]


def replicas(deployment: str) -> list[int]:
    """Processes of this session's Ray that run replicas of a deployment, oldest first."""
    return actors(f"ServeReplica:danube:{deployment}")


def actors(title: str) -> list[int]:
    """Processes of this session's Ray that run actors whose name begins so, oldest first."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        line = " ".join(process.info["cmdline"] or ())
        if line.startswith(f"ray::{title}") and mine(process):
            found.append((process.info["create_time"], process.pid))
    return [pid for _, pid in sorted(found)]


def mine(process: psutil.Process) -> bool:
    """Whether a process descends from this one: other servers may run on this machine."""
    try:
        return psutil.Process().pid in {parent.pid for parent in process.parents()}
    except psutil.NoSuchProcess:
        return False
