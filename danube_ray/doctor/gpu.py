"""The GPU: driver, device, FP8, attention kernels, collectives."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path

from danube_ray.config import ConfigError, Precision
from danube_ray.doctor.check import GIB, Check

NVIDIA = "0x10de"
DISPLAY_CLASS = "0x03"
# The driver that CUDA of a major version needs at least (NVIDIA's CUDA compatibility table).
OLDEST_DRIVERS = {12: 525, 13: 580}
CPU_REMEDY = "nano and the demo run on the CPU; everything larger wants a CUDA GPU"
FP8_PRECISIONS: tuple[Precision, ...] = ("fp8-te", "fp8-torchao")


def driver(proc: Path = Path("/proc"), sys: Path = Path("/sys"), smi: str = "nvidia-smi") -> Check:
    """NVIDIA's kernel driver: as the kernel tells it, or in a container that hides that, as its tool does."""
    file = proc / "driver/nvidia/version"
    told = file.read_text() if file.is_file() else driver_by_tool(smi)
    if told:
        version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", told)
        return Check("driver", True, version.group() if version else "of an unknown version")
    devices = nvidia_devices(sys)
    if not devices:
        return Check("driver", None, "no NVIDIA GPU in this machine", CPU_REMEDY)
    remedy = "install NVIDIA's driver; in a container: docker run --gpus all"
    return Check("driver", False, f"{devices} NVIDIA GPU{'s' * (devices > 1)}, but no driver", remedy)


def driver_by_tool(smi: str) -> str:
    """What nvidia-smi says of the driver's version; nothing where there is no tool, or it has nothing to say."""
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def nvidia_devices(sys: Path) -> int:
    """NVIDIA's display devices on the PCI bus, its 3D accelerators among them."""
    devices = (sys / "bus/pci/devices").glob("*")
    return sum(
        (device / "vendor").read_text().strip() == NVIDIA and (device / "class").read_text().startswith(DISPLAY_CLASS)
        for device in devices
    )


def device(driver: Check) -> Check:
    """What torch computes on; a GPU that is there and can't be used is a fault, none at all is not."""
    import torch

    if torch.version.cuda is None:
        if driver.ok:
            remedy = "install torch from PyPI, whose build has CUDA: pip install --force-reinstall torch"
            return Check("GPU", False, "there is a driver, but this torch is built for the CPU", remedy)
        return Check("GPU", None, "this torch is built for the CPU", CPU_REMEDY)
    try:
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info(0)
    except Exception as error:
        oldest = OLDEST_DRIVERS.get(int(torch.version.cuda.partition(".")[0]))
        remedy = f"CUDA {torch.version.cuda} needs a GPU and driver {oldest} or later; the demo runs on the CPU"
        return Check("GPU", False if driver.ok else None, str(error).partition("\n")[0], remedy)
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    found = f"{count} x {name}, {total / GIB:.0f} GiB each; the first has {free / GIB:.0f} GiB free"
    return Check("GPU", True, found)


def fp8() -> Check:
    """The FP8 precisions that a run can choose here, emulation aside."""
    import torch

    from danube_ray.model.precision import check_precision

    if not torch.cuda.is_available():
        return Check("FP8", None, "no GPU", "precision bf16 or fp32; FP8 wants a GPU of Hopper or later")
    can, reasons = [], []
    for precision in FP8_PRECISIONS:
        try:
            check_precision(precision, torch.device("cuda"))
            can.append(precision)
        except ConfigError as error:
            reasons.append(str(error))
    return Check("FP8", bool(can) or None, ", ".join(can) or "none", "; ".join(reasons))


def attention(head_dim: int) -> Check:
    """The kernels that can attend in training, and the one that `auto` takes."""
    import torch

    from danube_ray.model.attention import BACKENDS, check_attention

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = check_attention("auto", head_dim, "bf16", where)
    can = []
    for name in BACKENDS:
        with suppress(ConfigError):
            can.append(check_attention(name, head_dim, "bf16", where).name)
    return Check("attention", True, f"{', '.join(can)}; auto takes {auto.name}: {auto.reason}")


def collectives() -> Check:
    """What gradients cross between workers with: NCCL on GPUs, gloo on CPUs."""
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available()
    known = {"gloo": distributed.is_gloo_available(), "NCCL": distributed.is_nccl_available()}
    needed = "NCCL" if on_gpu else "gloo"
    found = [name for name, there in known.items() if there]
    if on_gpu and known["NCCL"]:
        from torch.cuda import nccl

        found[found.index("NCCL")] = f"NCCL {'.'.join(map(str, nccl.version()))}"
        if torch.cuda.device_count() > 1:
            found.append("peer access" if torch.cuda.can_device_access_peer(0, 1) else "no peer access between GPUs")
    remedy = "" if known[needed] else f"install a torch built with {needed}"
    return Check("collectives", known[needed], ", ".join(found) or "none", remedy)
