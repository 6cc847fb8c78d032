"""What this machine can run, and what to install or change where it can't."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from danube_ray.config import RunConfig
from danube_ray.doctor import gpu, machine, packages
from danube_ray.doctor.check import Check, attempt

if TYPE_CHECKING:
    from danube_ray.doctor.gain import Gain

__all__ = ["Check", "examine", "fp8_gain"]


def examine(run: RunConfig, folder: Path = Path()) -> list[Check]:
    """Look at the machine, and at the disk that holds `folder`, with `run` in mind. A check that fails says so."""
    project, driver = cache(packages.wanted), cache(gpu.driver)
    checks = {
        "python": lambda: packages.python(project()),
        "packages": lambda: packages.needed_packages(project()),
        "optional packages": lambda: packages.optional_packages(project()),
        "driver": driver,
        "GPU": lambda: gpu.device(driver()),
        "FP8": gpu.fp8,
        "attention": lambda: gpu.attention(run.model.head_dim),
        "collectives": gpu.collectives,
        "memory": machine.memory,
        "shared memory": machine.shared_memory,
        "disk": lambda: machine.disk(folder),
        "disk speed": lambda: machine.write_speed(folder, run),
        **{f"port {number}": lambda number=number: machine.port(number) for number in machine.PORTS},
        "git": machine.git,
    }
    return [finding for name, check in checks.items() for finding in attempt(name, check)]


def fp8_gain(run: RunConfig) -> tuple[Check, Gain | None]:
    """Whether FP8 pays for `run`'s linears on this machine, measured at the first stage's micro-batch: seconds."""
    gains: list[Gain] = []

    def measured() -> Check:
        import torch

        from danube_ray.doctor.gain import measure
        from danube_ray.model.precision import FP8_COMPUTE_CAPABILITY

        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_COMPUTE_CAPABILITY:
            return Check("FP8 gain", None, "not measured: no GPU with FP8 here")
        stage = run.stages[0]
        gains.append(measure(run.model, stage.micro_batch_size * stage.sequence_length, torch.device("cuda")))
        return Check("FP8 gain", gains[0].layer > 1 or None, gains[0].verdict)

    (finding,) = attempt("FP8 gain", measured)
    return finding, gains[0] if gains else None
