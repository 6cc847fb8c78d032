"""Contestants made ready: built, warm, and at the largest micro-batch that fits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from danube_ray.config import RunConfig
from tests.benchmarks.gpu.cases import Case
from tests.benchmarks.gpu.machine import version
from tests.benchmarks.gpu.ours import Ours
from tests.benchmarks.gpu.peer import Peer
from tests.benchmarks.gpu.timing import failure, out_of_memory, release
from tests.benchmarks.gpu.workload import Contestant, batches, smaller

SHORT = 2  # micro-batches of a warm-up step
WARM_UP_STEPS = 3

Attempts = list[dict[str, Any]]


@dataclass(frozen=True)
class Ready:
    """A warm contestant. `first_step` has loss and gradient norm of the first `windows` with the first weights.

    All contestants of a shape start with the same weights and rows: what differs there differs in arithmetic.
    """

    contestant: Contestant
    first_step: dict[str, float]
    warm_up_s: float
    attempts: Attempts = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Everything that a result should say of it."""
        return {
            "mode": {"micro_batch": self.contestant.run.stages[0].micro_batch_size, **self.contestant.facts()},
            "first_step": self.first_step,
            "warm_up_s": self.warm_up_s,
            "failed_attempts": self.attempts,
        }


def ready_ours(case: Case, run: RunConfig, device: torch.device) -> Ready:
    return largest(lambda at: Ours(at, device, case.optimizer_shards), run, device, [])


def ready_peer(case: Case, run: RunConfig, device: torch.device) -> Ready:
    """transformers in the first way that works: its faster attention compiled, then eager, then the next one's."""
    attentions = (case.peer_attention,) if case.peer_attention else available_attentions(device)
    compilings = (True, False) if run.loop.compile else (False,)
    ways = [(attention, compiled) for attention in attentions for compiled in compilings]
    attempts: Attempts = []
    for attention, compiled in ways:

        def build(at: RunConfig, attention: str = attention, compiled: bool = compiled) -> Peer:
            return Peer(at, device, attention, compiled=compiled, optimizer_shards=case.optimizer_shards)

        try:
            return largest(build, run, device, attempts)
        except Exception as error:
            if (attention, compiled) == ways[-1]:
                raise
            attempts.append({"attention": attention, "compiled": compiled, "error": failure(error)})
        torch._dynamo.reset()
        release(device)
    raise AssertionError("the last way returns or raises")


def available_attentions(device: torch.device) -> tuple[str, ...]:
    """flash-attn where it is installed (its kernels know windows), else torch's SDPA alone."""
    return ("flash_attention_2", "sdpa") if device.type == "cuda" and version("flash-attn") else ("sdpa",)


def largest(
    build: Callable[[RunConfig], Contestant], run: RunConfig, device: torch.device, attempts: Attempts
) -> Ready:
    """The contestant after a few short steps; where memory runs out, the next smaller micro-batch is tried."""
    sizes = smaller(run)
    for at in sizes:
        start = time.perf_counter()
        try:
            contestant, rows = build(at), next(batches(at, SHORT))
            loss, norm = (float(value) for value in contestant.train(rows))
            for _ in range(WARM_UP_STEPS - 1):
                contestant.train(rows)
            first = {"loss": loss, "gradient_norm": norm, "windows": len(rows["tokens"])}
            return Ready(contestant, first, time.perf_counter() - start, attempts)
        except Exception as error:
            if not out_of_memory(error) or at == sizes[-1]:
                raise
            attempts.append({"micro_batch": at.stages[0].micro_batch_size, "error": failure(error)})
        contestant = None
        release(device)
    raise AssertionError("the last size returns or raises")
