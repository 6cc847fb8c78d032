"""The four kinds of measurement, each giving what its JSON line says."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from danube_ray.config import RunConfig
from danube_ray.planner import GIB, hardware_named, memory, stage_work
from tests.benchmarks.gpu.build import SHORT, Ready, ready_ours, ready_peer
from tests.benchmarks.gpu.cases import Case
from tests.benchmarks.gpu.kernels import kernels, where_time_goes
from tests.benchmarks.gpu.machine import Clocks, device_name
from tests.benchmarks.gpu.ours import Ours
from tests.benchmarks.gpu.timing import Parking, failure, forget_peak, out_of_memory, peak_memory, release, timed
from tests.benchmarks.gpu.workload import STEPS_OF_TEXT, batches, one_gpu_run, repeated, with_micro_batch, write_noise
from tests.benchmarks.pairs import compare, median_interval

MEMORY_STEPS = 2  # the second has the optimizer's moments
MEMORY_SWEEP = 4  # times the preset's micro-batch, and no further


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How to measure: on what, how often, and where the tokens lie. None takes the preset's own number."""

    device: torch.device
    scratch: Path
    steps: int = 6
    pairs: int = 6
    micro_batch: int | None = None
    accumulate: int | None = None


class Measurements:
    """Measures one case after the other, and keeps the peer of a shape from one pair to the next."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._peer: tuple[RunConfig, Ready, Parking] | None = None

    def __call__(self, case: Case) -> dict[str, Any]:
        """The case's figures. Raises what the mode raises."""
        kinds = {"speed": self.speed, "pairs": self.pairs, "limiter": self.limiter, "memory": self.memory}
        if case.kind != "pairs":
            self.clear()
        return kinds[case.kind](case)

    def clear(self) -> float:
        """Forget everything that was built; GiB that stay on the device all the same."""
        self._peer = None
        torch._dynamo.reset()
        return release(self.bench.device)

    def speed(self, case: Case) -> dict[str, Any]:
        """Consecutive steps of one contestant that has the device for itself."""
        ready, device = self.ready(case), self.bench.device
        contestant, steps = ready.contestant, batches(ready.contestant.run)
        losses: list[Any] = []
        forget_peak(device)  # warming up also compiles and tries kernels out
        with Clocks() as clocks:
            seconds = timed(lambda: losses.append(contestant.train(next(steps))[0]), self.bench.steps, device)
        run = contestant.run
        return {
            **self.speed_of(ready, [run.global_batch_tokens / step_s for step_s in seconds]),
            "step_s": seconds,
            "tokens_per_step": run.global_batch_tokens,
            "memory": {"peak": peak_memory(device), "planner_gib": planned_gib(run, case)},
            "last_loss": float(losses[-1]),
            "clocks": clocks.medians,
        }

    def pairs(self, case: Case) -> dict[str, Any]:
        """Ours and the peer in turn, step by step of the same rows, the one that waits parked in host memory."""
        if self._peer is not None:
            self._peer[2].park()
        ours = self.ready(case)
        parking = Parking(ours.contestant.tensors())
        parking.park()
        peer, peer_parking = self.peer(case, ours.contestant.run)
        our_memory, peer_memory = {"planner_gib": planned_gib(ours.contestant.run, case)}, {}
        turns = (
            self.turn(ours, parking, peer_parking, our_memory),
            self.turn(peer, peer_parking, parking, peer_memory),
        )
        with Clocks() as clocks:
            ratio, figures = compare(*turns, self.bench.pairs)
        ours_tokens_per_s, peer_tokens_per_s = zip(*figures, strict=True)
        return {
            "ratio": asdict(ratio),
            "tokens_per_step": ours.contestant.run.global_batch_tokens,
            "ours": {**self.speed_of(ours, ours_tokens_per_s), "memory": our_memory},
            "peer": {**self.speed_of(peer, peer_tokens_per_s), "memory": peer_memory},
            "clocks": clocks.medians,
        }

    def speed_of(self, ready: Ready, tokens_per_s: Sequence[float]) -> dict[str, Any]:
        figure = utilisation(ready.contestant.run, statistics.median(tokens_per_s), self.bench.device)
        return {"tokens_per_s": spread(tokens_per_s), **figure, **ready.facts()}

    def turn(self, mine: Ready, parking: Parking, others: Parking, memory: dict[str, Any]) -> Callable[[], float]:
        """Tokens/s of one step, the other contestant off the device, after a short step that doesn't count.

        `memory` gets the peak, with what the other leaves on the device beside weights and moments (casts to FP8).
        """
        run, train, device = mine.contestant.run, mine.contestant.train, self.bench.device
        steps, short = batches(run), next(batches(run, SHORT))

        def tokens_per_s() -> float:
            others.park()
            parking.fetch()
            train(short)
            forget_peak(device)
            (seconds,) = timed(lambda: train(next(steps)), 1, device)
            memory["peak"] = peak_memory(device)
            return run.global_batch_tokens / seconds

        return tokens_per_s

    def peer(self, case: Case, run: RunConfig) -> tuple[Ready, Parking]:
        """transformers on ours' shape and micro-batch: the one that is there already, or a new one."""
        precision = "fp32" if run.loop.precision == "fp32" else "bf16"
        compiled = not (case.mode and case.mode.eager)
        loop = replace(run.loop, precision=precision, fp8_scaling=None, attention="auto", compile=compiled)
        shape = replace(run, loop=loop)
        if self._peer is None or self._peer[0] != shape:
            self._peer = None
            release(self.bench.device)
            ready = ready_peer(case, shape, self.bench.device)
            self._peer = shape, ready, Parking(ready.contestant.tensors())
        _, ready, parking = self._peer
        return ready, parking

    def limiter(self, case: Case) -> dict[str, Any]:
        """Where a short step's time goes, by kernel family."""
        ready, device = self.ready(case), self.bench.device
        contestant, run = ready.contestant, ready.contestant.run
        rows = next(batches(run, SHORT))
        step_s = statistics.median(timed(lambda: contestant.train(rows), self.bench.steps, device))
        found = kernels(lambda: contestant.train(rows), device, self.bench.scratch)
        tokens = len(rows["tokens"]) * run.stages[0].sequence_length
        return {**where_time_goes(found, step_s, tokens, run), **ready.facts()}

    def memory(self, case: Case) -> dict[str, Any]:
        """Peak memory of micro-batches of 1, 2, 4, ... windows until one doesn't fit, beside the planner's figure."""
        device = self.bench.device
        run = one_gpu_run(case, self.tokens(case), self.bench.micro_batch, SHORT)
        most = MEMORY_SWEEP * run.stages[0].micro_batch_size
        ours, sweep, ended_by = Ours(run, device, case.optimizer_shards), [], None
        rows = next(batches(run, 1))
        for size in (2**power for power in range(most.bit_length())):
            ours.task.run = with_micro_batch(run, size)
            release(device)
            forget_peak(device)
            try:
                for _ in range(MEMORY_STEPS):
                    ours.train(repeated(rows, SHORT * size))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                ended_by = {"micro_batch": size, **failure(error)}
                break
            planned = planned_gib(ours.task.run, case)
            sweep.append({"micro_batch": size, "peak": peak_memory(device), "planner_gib": planned})
        return {"mode": ours.facts(), "sweep": sweep, "ended_by": ended_by}

    def ready(self, case: Case) -> Ready:
        """The case's contestant, or the peer where the case is the peer's."""
        run = one_gpu_run(case, self.tokens(case), self.bench.micro_batch, self.bench.accumulate)
        return (ready_ours if case.mode else ready_peer)(case, run, self.bench.device)

    def tokens(self, case: Case) -> Path:
        """A folder with enough of the case's kind of text, made once."""
        run = one_gpu_run(case, Path(), self.bench.micro_batch, self.bench.accumulate)
        folder = self.bench.scratch / f"{case.preset}-{run.global_batch_tokens}-{case.document_tokens}"
        if not folder.exists():
            write_noise(folder, run.model, (STEPS_OF_TEXT + 1) * run.global_batch_tokens, case.document_tokens)
        return folder


def utilisation(run: RunConfig, tokens_per_s: float, device: torch.device) -> dict[str, Any]:
    """Model FLOP/s and their share of the bf16 peak, for FP8 too, by `ModelConfig.flops_per_token`."""
    flops_per_token = run.final_model.flops_per_token(run.stages[0].sequence_length)
    gpu = hardware_named(device_name(device))
    flops_per_s = tokens_per_s * flops_per_token
    return {
        "flops_per_token": flops_per_token,
        "model_tflops_per_s": flops_per_s / 1e12,
        "mfu_of_bf16_peak": flops_per_s / gpu.peak_flops if gpu else None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median with the interval that holds the true one with about 95 %."""
    low, high = median_interval(list(values))
    return {"median": statistics.median(values), "low": low, "high": high, "count": len(values)}


def planned_gib(run: RunConfig, case: Case) -> float:
    """What `danube plan` predicts for the peak."""
    needed = memory(stage_work(run, run.stages[0], num_gpus=1))
    return (needed.total_bytes - needed.optimizer_bytes * (1 - 1 / case.optimizer_shards)) / GIB
