"""What GPUs bring: memory, peak rates, and the share of each that training kernels reach.

Peaks are from NVIDIA's data sheets (dense, SXM). What kernels reach of them are estimates until the GPU benchmark has
measured them; `danube plan` prints each with its source.
"""

from __future__ import annotations

from dataclasses import dataclass

from danube_ray.config import AttentionBackend, ConfigError, require, require_positive

GIB = 2**30
USABLE = 0.94  # of a GPU's memory: the rest goes to CUDA's context, NCCL's buffers and fragmentation (estimate)
GPUS_PER_NODE = 8
MASKED_SDPA = 0.4  # of Flash 2's rate: under a document mask it computes what is hidden, too (estimate)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU: what its data sheet says, what training reaches of it, and what an hour costs.

    `memory_bytes` is what programs see. Peaks are dense FLOP/s in bf16 and fp32. `link_bytes_per_s` is the bus
    bandwidth of NCCL's collectives. The shares are what kernels reach: of the bf16 peak in products, in cuDNN's
    attention and in Flash 2's (forward and backward together), and of the memory's bandwidth. `device_names` is what
    torch calls it.
    """

    name: str
    device_names: tuple[str, ...]
    memory_bytes: int
    peak_flops: float
    has_fp8: bool
    fp32_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    price_per_hour: float
    gemm_share: float
    cudnn_share: float
    flash_share: float
    memory_share: float
    share_source: str
    link_source: str
    price_source: str = "an assumption"

    def __post_init__(self) -> None:
        require_positive(self, "memory_bytes", "peak_flops", "memory_bytes_per_s", "link_bytes_per_s")
        require(self.price_per_hour >= 0, "price per GPU hour", self.price_per_hour, "0 or more")
        for share in ("gemm_share", "cudnn_share", "flash_share", "memory_share"):
            value = getattr(self, share)
            require(0 < value <= 1, f"Hardware.{share}", value, "above 0 and at most 1")

    def attention_share(self, backend: AttentionBackend) -> float:
        """What attention by `backend` reaches of the bf16 peak; `auto` takes Flash 2's kernels for packed documents."""
        if backend == "te":
            return self.cudnn_share
        return self.flash_share * (MASKED_SDPA if backend == "sdpa" else 1)

    @property
    def usable_bytes(self) -> float:
        return USABLE * self.memory_bytes


HOPPER = "others' figures of Hopper: 650 TFLOP/s, in attention 400 (cuDNN) and 260 (Flash 2)"
AMPERE = "others' figures of Ampere: 240 TFLOP/s, in attention 150"
NVLINK_4 = "NCCL on NVLink 4 (NVIDIA/nccl-tests issue 212)"

# Prices are assumptions: specialised clouds on demand, 2026. Others ask half of it, or double.
H100 = Hardware(
    name="H100 SXM 80 GB",
    device_names=("NVIDIA H100 80GB HBM3",),
    memory_bytes=79 * GIB,
    peak_flops=989.4e12,
    has_fp8=True,
    fp32_flops=66.9e12,
    memory_bytes_per_s=3.35e12,
    link_bytes_per_s=370e9,
    price_per_hour=3.00,
    gemm_share=0.66,
    cudnn_share=0.40,
    flash_share=0.26,
    memory_share=0.84,
    share_source=HOPPER,
    link_source=NVLINK_4,
)
H200 = Hardware(
    name="H200 SXM 141 GB",
    device_names=("NVIDIA H200",),
    memory_bytes=139 * GIB,
    peak_flops=989.4e12,
    has_fp8=True,
    fp32_flops=66.9e12,
    memory_bytes_per_s=4.8e12,
    link_bytes_per_s=370e9,
    price_per_hour=4.00,
    gemm_share=0.66,
    cudnn_share=0.40,
    flash_share=0.26,
    memory_share=0.84,
    share_source=HOPPER,
    link_source=NVLINK_4,
)
A100 = Hardware(
    name="A100 SXM 80 GB",
    device_names=("NVIDIA A100-SXM4-80GB",),
    memory_bytes=79 * GIB,
    peak_flops=312e12,
    has_fp8=False,
    fp32_flops=19.5e12,
    memory_bytes_per_s=2.04e12,
    link_bytes_per_s=208e9,
    price_per_hour=1.80,
    gemm_share=0.78,
    cudnn_share=0.48,
    flash_share=0.48,
    memory_share=0.84,
    share_source=AMPERE,
    link_source="NCCL on NVLink 3, between two (NVIDIA/nccl-tests issue 178)",
)
HARDWARE = {"h100": H100, "h200": H200, "a100": A100}


def parse_hardware(text: str) -> tuple[Hardware, int]:
    """`h100:8` as the GPU and how many; a missing number is one GPU."""
    kind, _, number = text.strip().lower().partition(":")
    allowed = f"one of {', '.join(HARDWARE)} with a number of GPUs, such as h100:8"
    require(kind in HARDWARE, "hardware", text, allowed, "danube plan knows GPUs only, nothing of CPUs")
    try:
        count = int(number or 1)
    except ValueError:
        raise ConfigError("hardware", text, allowed) from None
    require(count > 0, "hardware", text, allowed)
    whole_nodes = count <= GPUS_PER_NODE or count % GPUS_PER_NODE == 0
    require(whole_nodes, "hardware", text, f"up to {GPUS_PER_NODE} GPUs, or whole nodes of {GPUS_PER_NODE}")
    return HARDWARE[kind], count


def hardware_named(device_name: str) -> Hardware | None:
    """The GPU that torch calls `device_name`, if it is known here."""
    return next((gpu for gpu in HARDWARE.values() if device_name in gpu.device_names), None)
