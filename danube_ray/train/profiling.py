"""torch's profiler around a few steps of a run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from danube_ray.artifacts import write_atomically

WARM_STEPS = 5  # first steps compile, choose kernels and grow memory
ROWS = 30


class StepProfiler:
    """Records `num_steps` steps (0: none) after a few warm ones; each call of `step` ends one.

    Writes to `folder` a trace that chrome://tracing and Perfetto open, and `operations.txt`: where the time went by
    operation. A run that ends while it records leaves what there is; one that ends before that leaves nothing.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.profiler: profile | None = None
        if num_steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            # The last warm step is recorded and thrown away: the profiler's own beginning is slow.
            plan = schedule(skip_first=WARM_STEPS - 1, wait=0, warmup=1, active=num_steps, repeat=1)
            self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self.write)

    def step(self) -> None:
        if self.profiler is not None:
            self.profiler.step()

    def write(self, recorded: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "trace.json.gz"))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        write_atomically(self.folder / "operations.txt", table)

    def __enter__(self) -> StepProfiler:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler is not None:
            self.profiler.stop()
