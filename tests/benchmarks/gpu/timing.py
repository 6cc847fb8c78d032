"""How long steps take, and room on the device for one contestant after the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from danube_ray.planner import GIB

PINNED_BYTES = GIB


def timed(step: Callable[[], object], num_steps: int, device: torch.device) -> list[float]:
    """Seconds of each step, the steps following each other without a wait; on a GPU by its own clock."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(num_steps):
            step()
            marks.append(time.perf_counter())
        return [end - start for start, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1_000 for start, end in pairwise(events)]


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float] | None:
    """GiB since the peak was forgotten: what tensors took, and what the allocator held for them."""
    if device.type != "cuda":
        return None
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"allocated_gib": allocated / GIB, "reserved_gib": reserved / GIB}


def release(device: torch.device) -> float:
    """Give back what nothing refers to any more; GiB of tensors that stay."""
    gc.collect()
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device) / GIB


class Parking:
    """Moves a contestant's weights and moments to host memory and back, so that another has the device for itself.

    Storages are emptied in place: parameters, views, optimizer and compiled code keep what they refer to.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device
        self._storages = list({t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())
        self._rooms = rooms([storage.nbytes() for storage in self._storages], pinned=self.device.type == "cuda")
        self.parked = False

    def park(self) -> None:
        if not self.parked:
            for storage, room in zip(self._storages, self._rooms, strict=True):
                room.copy_(as_bytes(storage), non_blocking=True)
            self._wait()
            for storage in self._storages:
                storage.resize_(0)
            self.parked = True

    def fetch(self) -> None:
        if self.parked:
            for storage, room in zip(self._storages, self._rooms, strict=True):
                storage.resize_(room.nbytes)
                as_bytes(storage).copy_(room, non_blocking=True)
            self._wait()
            self.parked = False

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rooms(sizes: Sequence[int], *, pinned: bool) -> list[Tensor]:
    """Host memory for each size. Pinned memory, many times faster to copy, comes in chunks of 1 GiB.

    torch's allocator rounds it up to powers of two, and keeps what is given back: whole chunks waste little, and the
    next contestant takes the same ones.
    """
    found: list[Tensor] = []
    chunk, used = torch.empty(0, dtype=torch.uint8), 0
    for size in sizes:
        if used + size > chunk.nbytes:
            chunk, used = torch.empty(max(size, PINNED_BYTES * pinned), dtype=torch.uint8, pin_memory=pinned), 0
        found.append(chunk[used : used + size])
        used += -(-size // 64) * 64
    return found


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def failure(error: BaseException) -> dict[str, Any]:
    """An error as a result holds it: its kind and the head of what it says."""
    return {"type": type(error).__name__, "message": str(error)[:2_000]}
