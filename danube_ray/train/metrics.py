"""A run's metrics: JSON lines that survive a crash without a repeated step, and all that shows them while it runs.

`metrics.jsonl` holds what was measured (rows of kind train, validation and guard), `samples.jsonl` what the model
wrote. TensorBoard and, by a switch, W&B or MLflow get the same; `report.html` is rewritten from the files.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from danube_ray.artifacts import append_json_lines, leaves, read_json_lines, write_atomically
from danube_ray.report.page import write_report
from danube_ray.train.tracking import Sink, TensorBoard, Tracker, open_tracker

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
REPORT_EVERY_S, REPORT_SHARE = 30.0, 0.002

# Dense bf16 peaks in FLOP/s from NVIDIA's data sheets, by the beginning of torch's name of the device; the first that
# fits counts. FP8 runs are held against the same peak, so that a figure above a bf16 run's means a faster run.
BF16_PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200": 989.4e12,
    "NVIDIA B200": 2_250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


class MetricsLog:
    """Rank 0's log of a run, continuing after `steps_done` steps.

    Rows past the checkpoint that the run resumes from are dropped: those steps are trained, and logged, again. Files
    must be written; what else shows the numbers (TensorBoard, a tracker, the report page) warns when it fails and is
    left out from then on, because no dashboard is worth a training run.
    """

    def __init__(self, run_folder: Path, steps_done: int, tracker: Tracker = "none") -> None:
        self.folder = run_folder
        self.report_due_s = -math.inf
        before = {name: read_json_lines(run_folder / name) for name in (METRICS, SAMPLES)}
        logged: dict[str, int] = {}  # the last step of each kind that was logged before the run stopped
        for row in (*before[METRICS], *before[SAMPLES]):
            kind = row.get("kind", "samples")
            logged[kind] = max(row["step"], logged.get(kind, 0))
        self.sinks: dict[str, Sink] = {}
        self.open("tensorboard", lambda: TensorBoard(run_folder / "tensorboard", steps_done))
        if tracker != "none":  # before rows are dropped: it keeps what was logged, should the run die here
            self.open(tracker, lambda: open_tracker(tracker, run_folder, logged))
        for name, rows in before.items():
            if rows:
                kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= steps_done)
                write_atomically(run_folder / name, kept)

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append one row with its `step`; its numbers go to TensorBoard and the tracker as `kind/NAME[/KEY]`."""
        append_json_lines(self.folder / METRICS, [{"kind": kind, **row, "time": time.time()}])
        measured = leaves({name: value for name, value in row.items() if name != "step"}, "/")
        numbers: dict[str, float] = {
            f"{kind}/{name}": value for name, value in measured if isinstance(value, int | float)
        }
        self.tell(lambda sink: sink.numbers(kind, row["step"], numbers))
        if time.monotonic() >= self.report_due_s:
            self.write_report()

    def write_samples(self, place: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """Append what `Task.samples` gave at `place` (`step`, `tokens`): one row a text."""
        rows = [{**place, **sample, "time": time.time()} for sample in samples]
        if rows:
            append_json_lines(self.folder / SAMPLES, rows)
            self.tell(lambda sink: sink.texts(place["step"], samples))

    def write_report(self, finished: bool = False) -> None:
        """Rewrite `report.html` from the run's files; until it is `finished`, the page in a browser renews itself.

        Each row does so too, at most twice a minute and, on long runs, for at most 0.2 % of the time.
        """
        began = time.monotonic()
        try:
            write_report(self.folder, live=not finished)
        except Exception as error:
            warnings.warn(f"report.html was not written: {error!r}", stacklevel=2)
        ended = time.monotonic()
        self.report_due_s = ended + max(REPORT_EVERY_S, (ended - began) / REPORT_SHARE)

    def open(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self.sinks[name] = make()
        except Exception as error:
            warnings.warn(f"{name} could not be opened and gets nothing of this run: {error}", stacklevel=3)

    def tell(self, what: Callable[[Sink], None]) -> None:
        for name, sink in tuple(self.sinks.items()):
            try:
                what(sink)
            except Exception as error:
                del self.sinks[name]
                warnings.warn(f"{name} failed and gets nothing more of this run: {error}", stacklevel=3)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tell(lambda sink: sink.close(failed=error is not None))


def bf16_peak_flops(device: torch.device) -> float:
    """The device's dense bf16 peak in FLOP/s; NaN for a CPU or a GPU that the table doesn't know."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in BF16_PEAK_FLOPS.items() if name.startswith(known)), math.nan)


class StepClock:
    """Measures the steps since the last reading. What lies inside `paused` (validation, samples) is no part of them."""

    def __init__(self, device: torch.device, num_devices: int = 1) -> None:
        self.device = device
        self.peak_flops = num_devices * bf16_peak_flops(device)
        self.restart()

    def restart(self) -> None:
        self.began = time.perf_counter()
        self.waited_s = self.communicated_s = 0.0
        self.steps = 0

    def add(self, waited_s: float, communicated_s: float = math.nan) -> None:
        """Count one step that waited so long for its data, and for other ranks' gradients (NaN: not measured)."""
        self.waited_s += waited_s
        self.communicated_s += communicated_s
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the time of the block out of the steps'."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - began

    def read(self, tokens: int, flops: float = 0.0) -> dict[str, float]:
        """What the steps since the last reading came to; restarts.

        `tokens` and `flops` (forward and backward, by `Task.flops_per_token`) count all ranks. `mfu` is flops over time
        and the devices' bf16 peak. What can't be known is left out: `mfu` on a CPU, on an unknown GPU or without a
        formula, `communication_share` where nothing measures it. Device work must have ended (the loss was read).
        """
        elapsed_s = time.perf_counter() - self.began
        facts = {
            "tokens_per_s": tokens / elapsed_s,
            "step_s": elapsed_s / max(1, self.steps),
            "data_wait_share": self.waited_s / elapsed_s,
            "communication_share": self.communicated_s / elapsed_s,
            "mfu": flops / elapsed_s / self.peak_flops if flops else math.nan,
            "memory_bytes": memory_bytes(self.device),
        }
        self.restart()
        return {name: value for name, value in facts.items() if math.isfinite(value)}


def memory_bytes(device: torch.device) -> int:
    """The most GPU memory that tensors took since the last call; on a CPU the process's resident memory now."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no Linux: the peak, in bytes on a Mac and in KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mean_loss(results: dict[str, tuple[float, float]]) -> float:
    """Mean over sources' (loss sum, count), every unit weighing the same; NaN when nothing was held out."""
    count = sum(count for _, count in results.values())
    return sum(loss for loss, _ in results.values()) / count if count else math.nan
