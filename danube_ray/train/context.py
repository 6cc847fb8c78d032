"""The loop's surroundings without Ray: one process, or the ranks that torchrun started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from danube_ray.train.protocol import Batch, StepReader


class LocalContext:
    """A `Context` that reads its data directly. Under torchrun it takes rank and world size from the process group."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = default_device(int(os.environ.get("LOCAL_RANK", 0)))

    def batches(self, reader: StepReader, start_step: int) -> Iterator[tuple[int, Batch]]:
        for step in range(start_step, reader.num_steps):
            yield step, reader(step, self.rank, self.world_size)

    def stop_requested(self) -> str | None:
        return self.signal

    def preemption_notice(self) -> str | None:
        return None

    def report(self, metrics: dict[str, Any]) -> None:
        if dist.is_initialized():
            dist.barrier()


def default_device(local_rank: int = 0) -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def torchrun_context() -> Iterator[LocalContext]:
    """Join the process group that torchrun describes in the environment (nccl on GPUs, gloo on CPUs).

    Within, SIGTERM asks the run to save and end instead of ending the process.
    """
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    context = LocalContext()

    def stop(number: int, frame: object) -> None:
        context.signal = signal.Signals(number).name

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield context
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()
