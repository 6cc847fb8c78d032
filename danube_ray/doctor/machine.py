"""The machine itself: memory, disk, ports."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from danube_ray.config import RunConfig
from danube_ray.doctor.check import GIB, Check

DEMO_MEMORY_BYTES = 6 * GIB
DEMO_DISK_BYTES = 5 * GIB
SHARED_MEMORY_BYTES = GIB // 2  # Ray keeps its object store there: 256 MiB for a local session, and room for two
PORTS = {8265: "Ray's dashboard and jobs", 8000: "serving", 6379: "a cluster's head"}
WRITTEN_BYTES = 256 * 2**20
CHECKPOINT_BYTES = 12  # a parameter: fp32 weights and AdamW's two moments
SLOW_CHECKPOINT_S = 300.0


def memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's share
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return enough("memory", total, DEMO_MEMORY_BYTES, "the demo needs that much")


def shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    if not folder.is_dir():
        return Check("shared memory", None, f"no {folder}", "Ray falls back to files in /tmp, which is slower")
    remedy = "docker run --shm-size=2g; or remove what fills it"
    return enough("shared memory", shutil.disk_usage(folder).free, SHARED_MEMORY_BYTES, remedy)


def disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder.absolute()).free
    return enough("disk", free, DEMO_DISK_BYTES, f"free some in {folder.absolute()}, or set output_dir elsewhere")


def enough(name: str, found_bytes: int, needed_bytes: int, remedy: str) -> Check:
    ok = found_bytes >= needed_bytes
    found = f"{found_bytes / GIB:.1f} GiB free" if name != "memory" else f"{found_bytes / GIB:.1f} GiB"
    return Check(name, ok, found, "" if ok else f"at least {needed_bytes / GIB:.1f} GiB: {remedy}")


def write_speed(folder: Path, run: RunConfig, num_bytes: int = WRITTEN_BYTES) -> Check:
    """How fast the folder's disk takes a file that is synced to it, and what that makes of a checkpoint of `run`."""
    block = os.urandom(2**20)  # a disk that compresses must not be flattered
    with tempfile.NamedTemporaryFile(dir=folder.absolute(), prefix=".danube-doctor-") as file:
        began = time.perf_counter()
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        bytes_per_s = num_bytes / (time.perf_counter() - began)
    checkpoint_bytes = CHECKPOINT_BYTES * run.model.num_parameters
    seconds = checkpoint_bytes / bytes_per_s
    found = (
        f"{bytes_per_s / 1e6:,.0f} MB/s: a checkpoint of {run.name} ({checkpoint_bytes / 1e9:,.1f} GB) takes "
        f"{seconds:,.1f} s beside the training"
    )
    remedy = "set output_dir on a faster disk, or checkpoint_every_steps higher"
    ok = seconds <= SLOW_CHECKPOINT_S or None
    return Check("disk speed", ok, found, "" if ok else remedy)


def port(number: int) -> Check:
    """Free when a server could bind it now: on all interfaces, past connections that linger."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            remedy = f"for {PORTS.get(number, 'a server')}: end what has it, or choose another port"
            return Check(f"port {number}", None, f"in use ({error.strerror})", remedy)
    return Check(f"port {number}", True, "free")


def git() -> Check:
    path = shutil.which("git")
    remedy = "" if path else "install git: runs then store the revision that made them"
    return Check("git", True if path else None, path or "not installed", remedy)
