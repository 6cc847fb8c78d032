"""What each attention kernel can't do, as a function of the machine and of what is asked."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from danube_ray.config import AttentionBackend

AMPERE = (8, 0)


class Refusal(NamedTuple):
    """Why a backend can't serve: what it needs, and what to do."""

    allowed: str
    remedy: str = "use attention auto"


@dataclass(frozen=True)
class Machine:
    """The device, and what is installed: `import_error(module)` is None where the module can be imported."""

    device: str
    name: str
    capability: tuple[int, int]  # CUDA compute capability; (0, 0) without CUDA
    import_error: Callable[[str], str | None]

    @property
    def has_cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Need:
    """`masked`: something hides more than causal order does, a window or documents."""

    dtype: torch.dtype
    head_dim: int
    training: bool
    masked: bool
    deterministic: bool


@cache
def machine_of(device: torch.device) -> Machine:
    """The facts of `device`, gathered once. Packages are imported when first asked for: transformer-engine is slow."""
    if device.type != "cuda":
        return Machine(device.type, device.type, (0, 0), import_error)
    return Machine("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), import_error)


@cache
def import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch or CUDA fails in its own way
        return str(error) or type(error).__name__
    return None


def refusal(name: AttentionBackend, need: Need, machine: Machine) -> Refusal | None:
    """Why the backend called `name` can't do what is needed on this machine; None where it can."""
    if name == "flash":
        return refuse_half_kernel(need, machine, max_head_dim=256) or refuse_package(machine, "flash_attn")
    if name == "te":
        if need.deterministic:  # it has no deterministic kernel for long packed sequences
            return Refusal("a run that is not deterministic", "use attention flash or varlen")
        cannot = refuse_half_kernel(need, machine, max_head_dim=128)
        return cannot or refuse_package(machine, "transformer_engine.pytorch")
    if name == "varlen":
        return refuse_half_kernel(need, machine, max_head_dim=256)
    if name == "flex":
        return refuse_flex(need, machine)
    return None  # sdpa runs everywhere


def refuse_half_kernel(need: Need, machine: Machine, max_head_dim: int) -> Refusal | None:
    """What no CUDA kernel that computes in 16 bits can do."""
    if not machine.has_cuda:
        return Refusal("a CUDA GPU")
    if machine.capability < AMPERE:
        return Refusal("a GPU of Ampere or later (compute capability 8.0)")
    if need.dtype not in (torch.bfloat16, torch.float16):
        return Refusal("bfloat16 or float16", "use precision bf16, or attention sdpa")
    if need.head_dim % 8 or need.head_dim > max_head_dim:
        return Refusal(f"a head_dim that is a multiple of 8, at most {max_head_dim}")
    return None


def refuse_flex(need: Need, machine: Machine) -> Refusal | None:
    if machine.device == "cpu":
        return Refusal("a GPU for training: it has no backward pass on CPUs") if need.training else None
    if not machine.has_cuda:
        return Refusal("a CUDA GPU, or a CPU without training")
    if need.head_dim < 16:
        return Refusal("a head_dim of at least 16")
    return refuse_package(machine, "triton")


def refuse_package(machine: Machine, module: str) -> Refusal | None:
    error = machine.import_error(module)
    remedy = "pip install 'danube-ray[gpu]', or use attention auto"
    return Refusal(f"an importable {module} ({error})", remedy) if error else None
