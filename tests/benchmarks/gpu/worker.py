"""The process that measures: one case after the other, until time or the device's health runs out."""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from pathlib import Path

import torch

from danube_ray.train.context import default_device
from tests.benchmarks.gpu.cases import Case
from tests.benchmarks.gpu.machine import machine
from tests.benchmarks.gpu.measure import Bench, Measurements
from tests.benchmarks.gpu.suite import RUNNING, record, remaining
from tests.benchmarks.gpu.summary import headline
from tests.benchmarks.gpu.timing import failure

# Of a case, until one of its kind has been timed: then what the last one took.
EXPECTED_S = {"speed": 75.0, "pairs": 180.0, "limiter": 75.0, "memory": 120.0}
LEFT_BEHIND_GIB = 0.5  # tensors that outlive their case: a new process is better


def work(cases: list[Case], options: argparse.Namespace) -> None:
    """Measure what remains of the cases until the deadline. A case that fails is recorded, and the next one begins.

    Returns early, for a new process to go on, where an error has left the device unusable or full.
    """
    device = torch.device(options.device) if options.device else default_device()
    about = machine(device)
    expected_s = dict(EXPECTED_S)
    with tempfile.TemporaryDirectory() as scratch:
        measure = Measurements(
            Bench(
                device=device,
                scratch=Path(scratch),
                steps=options.steps,
                pairs=options.pairs,
                micro_batch=options.micro_batch,
                accumulate=options.accumulate,
            )
        )
        for case in remaining(cases, options.out):
            start = time.time()
            if start + expected_s[case.kind] > options.worker_until:
                return
            (options.out / RUNNING).write_text(case.name)
            try:
                result = measure(case)
                expected_s[case.kind] = time.time() - start
            except Exception as error:
                traceback.print_exc()
                result = {"error": failure(error)}
            record(options.out, case, {**result, "took_s": time.time() - start}, about)
            (options.out / RUNNING).unlink()
            print(f"{case.name}: {headline(result)} ({time.time() - start:.0f} s)", flush=True)
            if not usable(device):
                return
            if ("error" in result or case.kind != "pairs") and measure.clear() > LEFT_BEHIND_GIB:
                return


def usable(device: torch.device) -> bool:
    """Whether the device still computes: some CUDA errors leave the whole process without it."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True
