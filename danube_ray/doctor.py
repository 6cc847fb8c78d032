"""What this machine can run, and what to install or change where it can't."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GIB = 2**30
PYTHON_VERSIONS = ((3, 11), (3, 13))  # from, and below: pyproject.toml's requires-python
TORCH_VERSIONS = ((2, 11), (2, 14))
DEMO_MEMORY_BYTES = 6 * GIB
DEMO_DISK_BYTES = 5 * GIB
SHARED_MEMORY_BYTES = GIB // 2  # Ray keeps its object store there: 256 MiB for a local session, and room for two
PORTS = {8265: "Ray's dashboard and jobs", 8000: "serving"}


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is None where something is missing that only some verbs need."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def examine(folder: Path = Path()) -> list[Check]:
    """Look at the machine, and at the disk that holds `folder`. Never raises: a check that fails says so."""
    checks: dict[str, Callable[[], Check]] = {
        "python": python,
        "torch": torch_version,
        "GPU": gpu,
        "FP8": fp8,
        "transformer-engine": lambda: optional_package("transformer-engine", "transformer_engine.pytorch", "FP8"),
        "flash-attn": lambda: optional_package("flash-attn", "flash_attn", "attention kernels beyond torch's own"),
        "attention": attention_backends,
        "collectives": collectives,
        "memory": memory,
        "shared memory": shared_memory,
        "disk": lambda: disk(folder),
        **{f"port {number}": lambda number=number: port(number) for number in PORTS},
        "git": git,
    }
    return [attempt(name, check) for name, check in checks.items()]


def attempt(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a machine in any state gets a full report
        return Check(name, False, f"could not be examined: {type(error).__name__}: {error}")


def python() -> Check:
    first, end = PYTHON_VERSIONS
    ok = first <= sys.version_info[:2] < end
    return Check("python", ok, platform.python_version(), "" if ok else f"install Python {between(first, end)}")


def torch_version() -> Check:
    version = metadata.version("torch")
    first, end = TORCH_VERSIONS
    major, minor = (int(part) for part in version.split(".")[:2])
    importlib.import_module("torch")
    ok = first <= (major, minor) < end
    return Check("torch", ok, version, "" if ok else f"pip install 'torch>={dotted(first)},<{dotted(end)}'")


def gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch finds none" if built else "this torch is built for the CPU"
        return Check("GPU", None, why, "nano and the demo run on the CPU; everything larger wants a CUDA GPU")
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    return Check("GPU", True, f"{count} x {properties.name}, {properties.total_memory / GIB:.0f} GiB")


def fp8() -> Check:
    import torch

    from danube_ray.model.precision import FP8_COMPUTE_CAPABILITY

    remedy = "use precision bf16, or a GPU of Hopper or later"
    if not torch.cuda.is_available():
        return Check("FP8", None, "no GPU", remedy)
    capability = torch.cuda.get_device_capability(0)
    ok = capability >= FP8_COMPUTE_CAPABILITY or None
    return Check("FP8", ok, f"compute capability {dotted(capability)}", "" if ok else remedy)


def optional_package(package: str, module: str, purpose: str) -> Check:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Check(package, None, "not installed", f"for {purpose}, on a GPU: pip install 'danube-ray[gpu]'")
    try:
        importlib.import_module("torch")  # loads the CUDA libraries that both packages link to
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch or CUDA fails in its own way
        return Check(package, False, f"{version}, but importing it fails: {error}", "reinstall it for this torch")
    return Check(package, True, version)


def attention_backends() -> Check:
    from torch.backends import cuda

    if not cuda.is_built():
        return Check("attention", True, "SDPA on the CPU")
    enabled = {
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "cuDNN": cuda.cudnn_sdp_enabled(),
    }
    fast = [name for name, on in enabled.items() if on]
    remedy = "" if fast else "enable torch.backends.cuda's SDPA kernels"
    return Check("attention", bool(fast), f"SDPA: {', '.join(fast) or 'only the slow one'}", remedy)


def collectives() -> Check:
    import torch
    from torch import distributed

    known = {"gloo": distributed.is_gloo_available(), "NCCL": distributed.is_nccl_available()}
    needed = "NCCL" if torch.cuda.is_available() else "gloo"
    found = ", ".join(name for name, there in known.items() if there) or "none"
    remedy = "" if known[needed] else f"install a torch built with {needed}"
    return Check("collectives", known[needed], found, remedy)


def memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's share
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return enough("memory", total, DEMO_MEMORY_BYTES, "the demo needs that much")


def shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", None, "no /dev/shm", "Ray falls back to files in /tmp, which is slower")
    return enough("shared memory", shutil.disk_usage(folder).total, SHARED_MEMORY_BYTES, "docker run --shm-size=2g")


def disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder.absolute()).free
    return enough("disk", free, DEMO_DISK_BYTES, f"free some in {folder.absolute()}, or set output_dir elsewhere")


def enough(name: str, found_bytes: int, needed_bytes: int, remedy: str) -> Check:
    ok = found_bytes >= needed_bytes
    found = f"{found_bytes / GIB:.1f} GiB"
    return Check(name, ok, found, "" if ok else f"at least {needed_bytes / GIB:.1f} GiB: {remedy}")


def port(number: int) -> Check:
    """Free when a server could bind it now: on all interfaces, past connections that linger."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError:
            return Check(f"port {number}", None, "in use", f"{PORTS.get(number, 'a server')} needs it, or another port")
    return Check(f"port {number}", True, "free")


def git() -> Check:
    path = shutil.which("git")
    remedy = "" if path else "install git: runs then store the revision that made them"
    return Check("git", True if path else None, path or "not installed", remedy)


def between(first: tuple[int, int], end: tuple[int, int]) -> str:
    return f"{dotted(first)} or later, below {dotted(end)}"


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
