"""`make bench`: every benchmark of the CPU, one after the other; each prints ratios and leaves JSON in results/."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = (
    "step_vs_transformers",
    "loop_under_ray",
    "checkpoint_stall",
    "resume",
    "stream_memory",
    "rules_vs_datatrove",
    "minhash_vs_datatrove",
    "quality_models",
    "curation_scaling",
    "curation_memory",
    "quantize_speed",
    "serve_speed",
    "serve_soak",
)

for name in sys.argv[1:] or BENCHMARKS:
    print(f"— {name.replace('_', ' ')}")
    importlib.import_module(f"tests.benchmarks.{name}").main()
