"""Where a step's time goes on the device: its kernels by family, from torch's profiler."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from danube_ray.config import RunConfig

# The first family whose pattern a kernel's name (or, on the CPU, an operator's) matches has it. Kernels that inductor
# writes are named after all they fuse, so they are told from library kernels first.
GENERATED = re.compile(r"^triton_(poi|red|per)_")
FAMILIES = (
    ("copies", r"^memcpy|^memset"),
    ("optimizer", r"adam|multi_tensor_apply|lpnorm|foreach"),
    ("attention", r"flash|fmha|attention|attn|sdpa|flex|mha_"),
    ("loss", r"nll|softmax|cross_entropy|logsumexp"),
    ("cast", r"quantize|(?<!broad)cast|transpose|amax|abs_max|float8|fp8|copy_kernel|::copy_"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|cublas|scaled_mm|::(add|b)?mm\b|splitk"),
)
GENERATED_FAMILIES = (
    ("loss", r"nll|log_softmax|logsumexp"),
    ("cast", r"abs_max|amax|float8|_scaled_mm"),
)
REST = "elementwise"
TOP = 25
DEVICE_EVENTS = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, in microseconds of the trace's clock."""

    name: str
    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us


def family(name: str) -> str:
    """The family that a kernel's name puts it in."""
    patterns = GENERATED_FAMILIES if GENERATED.match(name) else FAMILIES
    return next((label for label, pattern in patterns if re.search(pattern, name.lower())), REST)


def kernels(step: Callable[[], object], device: torch.device, scratch: Path) -> list[Kernel]:
    """Every kernel of one step, in order; without a GPU the stretches of time that operators spend in themselves."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    path = scratch / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    path.unlink()
    if on_gpu:
        return sorted((kernel(e) for e in events if e.get("cat") in DEVICE_EVENTS), key=lambda k: k.start_us)
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    threads = {event["tid"] for event in operators}
    found = [own for thread in threads for own in own_time([kernel(e) for e in operators if e["tid"] == thread])]
    return sorted(found, key=lambda k: k.start_us)


def kernel(event: dict[str, Any]) -> Kernel:
    return Kernel(event["name"], event["ts"], event["dur"])


def own_time(operators: list[Kernel]) -> list[Kernel]:
    """One thread's nested operators as the stretches of each in which it runs none of the others."""
    found: list[Kernel] = []
    running: list[Kernel] = []  # innermost last
    now = 0.0

    def run_until(time_us: float) -> None:
        nonlocal now
        if running and time_us > now:
            found.append(Kernel(running[-1].name, now, time_us - now))
        now = time_us

    for operator in sorted(operators, key=lambda k: (k.start_us, -k.end_us)):
        while running and running[-1].end_us <= operator.start_us:
            run_until(running[-1].end_us)
            running.pop()
        run_until(operator.start_us)
        running.append(operator)
    while running:
        run_until(running[-1].end_us)
        running.pop()
    return found


def busy_us(found: Iterable[Kernel]) -> float:
    """Time in which at least one kernel runs, of kernels in order of their start."""
    busy, until = 0.0, float("-inf")
    for this in found:
        busy += max(0.0, this.end_us - max(this.start_us, until))
        until = max(until, this.end_us)
    return busy


def where_time_goes(found: list[Kernel], step_s: float, tokens: int, run: RunConfig) -> dict[str, Any]:
    """Seconds and shares of the step by family and by kernel, and the rates that GEMM and attention reach.

    `step_s` is the step's time without the profiler, which slows the host: idle is what of it no kernel fills. Rates
    are those FLOP of `ModelConfig.flops_per_token` that fall to the family, over its time: what checkpointing computes
    again and what a kernel computes beyond the mask counts as time only.
    """
    by_family: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for this in found:
        by_family[family(this.name)] += this.duration_us / 1e6
        by_name[this.name].append(this.duration_us / 1e6)
    busy_s = busy_us(found) / 1e6
    model, length = run.final_model, run.stages[0].sequence_length
    gemm_flops = 6 * (model.num_layers * model.num_layer_linear_parameters + model.vocab_size * model.hidden_size)
    attention_flops = model.flops_per_token(length) - gemm_flops
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    return {
        "step_s": step_s,
        "tokens": tokens,
        "busy_s": busy_s,
        "idle_share": max(0.0, 1 - busy_s / step_s),
        "families": {
            label: {"s": seconds, "share": seconds / step_s}
            for label, seconds in sorted(by_family.items(), key=lambda item: -item[1])
        },
        "gemm_tflops_per_s": rate(gemm_flops * tokens, by_family["GEMM"]),
        "attention_tflops_per_s": rate(attention_flops * tokens, by_family["attention"]),
        "top_kernels": [
            {"name": name[:200], "family": family(name), "s": sum(times), "calls": len(times)} for name, times in top
        ],
    }


def rate(flops: float, seconds: float) -> float | None:
    return flops / seconds / 1e12 if seconds else None
