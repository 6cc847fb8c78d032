"""The formula against what was measured: the GPU benchmark's results, and what others have published.

Results are JSON. One is any object with a speed, however deep; what it doesn't say itself (preset, mode, device) it has
from the objects around it. Other contestants' and CPUs' results are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danube_ray.artifacts import read_json, read_json_lines
from danube_ray.config import ConfigError, LoopConfig, RunConfig
from danube_ray.planner.hardware import H100, Hardware, hardware_named
from danube_ray.planner.memory import memory
from danube_ray.planner.speed import step_time
from danube_ray.planner.work import Work

OURS = "danube_ray"
FIELDS = ("preset", "sequence_length", "micro_batch", "precision")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A speed that others have published for a preset's model, on their own software."""

    preset: str
    gpu: Hardware
    sequence_length: int
    precision: str
    tokens_per_s_per_gpu: float
    source: str

    @property
    def of(self) -> tuple[str, str, int]:
        """Preset, GPU and sequence length."""
        return self.preset, self.gpu.name, self.sequence_length


PUBLISHED = (
    Published(
        preset="danube_1_8b",
        gpu=H100,
        sequence_length=2_048,
        precision="FP8",
        tokens_per_s_per_gpu=36_600,
        source="Danube report: 292.7k tokens/s on 8 GPUs, 41.6 % of the bf16 peak at 2,048, the likely length",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A result of the benchmark on one GPU, and what the formula says: tokens a second, bytes at the peak."""

    case: str
    gpu: Hardware
    work: Work
    predicted_tokens_per_s: float
    measured_tokens_per_s: float
    predicted_bytes: float
    measured_bytes: float | None

    @property
    def speed_error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_tokens_per_s / self.measured_tokens_per_s - 1

    @property
    def memory_error(self) -> float | None:
        return self.predicted_bytes / self.measured_bytes - 1 if self.measured_bytes else None


def comparisons(folder: Path, presets: Mapping[str, RunConfig]) -> list[Comparison]:
    """Every result of this project's on a known GPU under `folder`; none where nothing has been measured yet."""
    found = []
    for path in sorted((*folder.rglob("*.json"), *folder.rglob("*.jsonl"))):
        values = read_json_lines(path) if path.suffix == ".jsonl" else read_json(path)
        found += [compare(facts, presets) for facts in results(values, {})]
    return [comparison for comparison in found if comparison is not None]


def results(value: Any, around: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects with a speed in `value`, each with the facts of those around it and of its mode."""
    if isinstance(value, list):
        for inner in value:
            yield from results(inner, around)
    if not isinstance(value, dict):
        return
    facts = {**around, **value, **(value.get("mode") or {})}
    if "tokens_per_s" in value:
        yield facts
        return
    for key, inner in value.items():
        if key not in ("mode", "machine"):
            yield from results(inner, facts)


def compare(facts: Mapping[str, Any], presets: Mapping[str, RunConfig]) -> Comparison | None:
    """The formula beside a result; None for what is not this project's, or on something else than a known GPU."""
    machine = facts.get("machine")
    device = machine.get("device") if isinstance(machine, dict) else facts.get("device")
    gpu = hardware_named(str(device))
    if gpu is None or any(field not in facts for field in FIELDS):
        return None
    if facts.get("contestant", OURS) != OURS or facts["preset"] not in presets:
        return None
    run = presets[facts["preset"]]
    stages = {stage.sequence_length: stage for stage in run.stages}
    length, micro_batch = int(facts["sequence_length"]), int(facts["micro_batch"])
    try:
        loop = LoopConfig(
            precision=facts["precision"],
            fp8_scaling=facts.get("fp8_scaling"),
            attention=facts.get("attention", "auto"),
            activation_checkpointing=bool(facts.get("activation_checkpointing")),
            compile=facts.get("compile") not in (None, False, "no"),
        )
    except ConfigError:
        return None  # a mode that the settings don't have any more
    work = Work(
        model=run.model_in(stages[length]) if length in stages else run.model,
        loop=loop,
        sequence_length=length,
        micro_batch_size=micro_batch,
        windows=int(facts.get("tokens_per_step", micro_batch * length)) // length,
    )
    # A benchmark on one GPU may stand in for one of several that share the optimizer.
    spared = 1 - 1 / int(facts.get("optimizer_shards") or 1)
    seconds, needed = step_time(work, gpu), memory(work)
    speed = facts["tokens_per_s"]
    peak = (facts.get("memory") or {}).get("peak") or {}
    return Comparison(
        case=str(facts.get("case", facts["preset"])),
        gpu=gpu,
        work=work,
        predicted_tokens_per_s=work.tokens / (seconds.total_s - spared * seconds.optimizer_s),
        measured_tokens_per_s=float(speed["median"] if isinstance(speed, dict) else speed),
        predicted_bytes=needed.total_bytes - spared * needed.optimizer_bytes,
        measured_bytes=peak["allocated_gib"] * 2**30 if "allocated_gib" in peak else None,
    )
