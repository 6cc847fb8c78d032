"""How long a rank waits for the others' gradients: the part of the all-reduce that its backward pass doesn't hide."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Variable


class GradientWait:
    """Runs backward passes and measures the wait at their end.

    DDP reduces each bucket of gradients as soon as it is full, and waits for all of them in a callback that autograd
    runs after the last gradient. Callbacks run in the order in which they were queued, so one that is queued at the
    beginning of the pass marks the end of the computation, and the return of `backward` the end of the wait. On a GPU
    both marks are events in the stream that waits: the host is not held up, and a wait counts once the GPU has done it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.waited_s = 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # until the GPU has come past

    def backward(self, loss: torch.Tensor, run: Callable[[torch.Tensor], object] = torch.Tensor.backward) -> None:
        """`run(loss)`, a backward pass and the gradients' way to the other ranks, measured."""
        engine: Any = Variable._execution_engine
        marks: list[Any] = []
        # The hook runs inside the pass, which is where a callback for its end can be queued.
        loss.register_hook(lambda _: engine.queue_callback(lambda: marks.append(self.mark())))
        run(loss)
        (computed,), arrived = marks, self.mark()
        if self.on_gpu:
            self.pending.append((computed, arrived))
        else:
            self.waited_s += arrived - computed

    def mark(self) -> Any:
        """Now: a time of the host, or an event in the GPU's stream."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take_s(self) -> float:
        """Seconds waited in the backward passes that have ended since the last call."""
        while self.pending and self.pending[0][1].query():
            computed, arrived = self.pending.popleft()
            self.waited_s += computed.elapsed_time(arrived) / 1_000
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s
