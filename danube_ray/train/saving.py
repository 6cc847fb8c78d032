"""Checkpoints written beside the training: the loop waits for a copy in memory, a thread for the disk."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from danube_ray.train import checkpoint
from danube_ray.train.checkpoint import Snapshot, Tensors


class Saver:
    """Writes one checkpoint at a time under `checkpoints`, and forgets old ones by `keep` and `milestone_every_steps`.

    The copies' buffers are made once and used again (pinned for tensors on a GPU, whose copy then runs at the bus's
    full speed): 12 bytes a parameter of this process's memory.
    """

    def __init__(self, checkpoints: Path, keep: int, milestone_every_steps: int = 0) -> None:
        self.checkpoints, self.keep, self.milestone_every_steps = checkpoints, keep, milestone_every_steps
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._buffers: Tensors = {}

    def begin(self, weights: Tensors, moments: Tensors, scales: Tensors, state: dict[str, Any]) -> None:
        """Copy the live tensors and let the thread write them; returns once they may change again."""
        self.wait()  # the buffers belong to the write before
        kept = [self._copies(live) for live in (weights, moments, scales)]
        if any(tensor.is_cuda for tensor in weights.values()):
            torch.cuda.synchronize()
        snapshot = Snapshot(weights=kept[0], moments=kept[1], scales=kept[2], state=copy.deepcopy(state))
        self._writing = self._writer.submit(self._write, snapshot)

    def just_committed(self) -> bool:
        """Whether the write that was under way has ended since this was last asked. Raises what made it fail."""
        if self._writing is None or not self._writing.done():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Return once nothing is being written. Raises what made the write fail."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _copies(self, live: Tensors) -> Tensors:
        for name, tensor in live.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return {name: self._buffers[name].copy_(tensor.detach(), non_blocking=True) for name, tensor in live.items()}

    def _write(self, snapshot: Snapshot) -> None:
        checkpoint.write(self.checkpoints, snapshot)
        checkpoint.keep_newest(self.checkpoints, snapshot.state["step"], self.keep, self.milestone_every_steps)
