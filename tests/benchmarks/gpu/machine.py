"""The machine that figures were measured on: device, driver, versions, and what its clocks did meanwhile."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from contextlib import suppress
from importlib import metadata
from types import TracebackType
from typing import Any

import torch

from danube_ray.artifacts import provenance
from danube_ray.planner import GIB

PACKAGES = ("torch", "triton", "transformers", "transformer-engine", "flash-attn", "torchao", "numpy")
LIMITS = "driver_version,power.limit,clocks.max.sm"
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
SAMPLE_MS = 250


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, limits, versions and the checkout's revision."""
    facts: dict[str, Any] = {"device": device_name(device), "processor": platform.processor() or platform.machine()}
    if device.type == "cuda":
        facts |= {
            "memory_gib": torch.cuda.get_device_properties(device).total_memory / GIB,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default"),
        }
    facts |= dict(zip(LIMITS.split(","), smi(LIMITS), strict=False))
    facts["packages"] = {package: version(package) for package in PACKAGES}
    return {**facts, "provenance": provenance()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def smi(fields: str) -> list[str]:
    """nvidia-smi's answers for the first GPU; none where it isn't installed."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [field.strip() for field in output.partition("\n")[0].split(",")]


class Clocks:
    """Asks nvidia-smi for clocks, power and temperature several times a second while the block runs.

    `medians` has the median of each, with the least beside it: a card that throttles shows there. Empty where there is
    no nvidia-smi.
    """

    def __init__(self) -> None:
        self.medians: dict[str, float] = {}

    def __enter__(self) -> Clocks:
        query = f"--query-gpu={','.join(CLOCKS)}"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}"]
        self._process = None
        with suppress(OSError):
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._process.terminate()
        output, _ = self._process.communicate()
        rows = [row for line in output.splitlines() if len(row := numbers(line)) == len(CLOCKS)]
        for index, name in enumerate(CLOCKS):
            if told := [value for row in rows if (value := row[index]) is not None]:
                self.medians |= {name: statistics.median(told), f"{name} least": min(told)}


def numbers(line: str) -> list[float | None]:
    """A line of the loop as numbers, None where the card doesn't tell one; a line cut off by the end is shorter."""
    values: list[float | None] = []
    for field in line.split(","):
        try:
            values.append(float(field))
        except ValueError:
            values.append(None)
    return values
