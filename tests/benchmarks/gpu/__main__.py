"""One GPU's benchmark: tokens/s, MFU and memory of every mode, against transformers, as JSON lines and a table.

    python -m tests.benchmarks.gpu --out results/h100 --budget-seconds 540
    python -m tests.benchmarks.gpu --out results/h100 --limiter
    python -m tests.benchmarks.gpu --out results/h100 --memory
    python -m tests.benchmarks.gpu --list

Run it from the repository's root; it needs torch and transformers, and neither Ray, tyro nor a network. Cases come most
important first. `results.jsonl` gets a line as each ends, so a run that is cut off loses nothing, and one started again
on the same folder goes on behind the last. MFU is tokens/s * FLOP a token / the bf16 peak, for FP8 too, with
`ModelConfig.flops_per_token`: 6 FLOP a matmul weight, head included and embedding not, plus 12 * heads * head_dim a
layer for each key that the causal window lets a query see.

A line of the results holds the case and what it asked for (`asked_mode`), then what was found, with `mode` as it really
ran (micro-batch, attention, compile, optimizer), `first_step` (loss and gradient norm, equal between sound modes of a
shape), `failed_attempts` (what ran out of memory, or was refused) and `machine`; or `error`, where it failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from danube_ray.artifacts import read_json_lines
from danube_ray.presets import PRESETS
from tests.benchmarks.gpu.cases import Case, chosen, special, suite
from tests.benchmarks.gpu.suite import RESULTS, SPARE_S, supervise
from tests.benchmarks.gpu.summary import write_summary


def arguments(argv: list[str]) -> argparse.Namespace:
    title = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=title)
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"), help="folder of the results")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="cases by name, shell patterns")
    parser.add_argument("--preset", choices=PRESETS, help="another model than the Danube ones, at all its lengths")
    parser.add_argument("--limiter", action="store_true", help="profile steps by kernel family instead")
    parser.add_argument("--memory", action="store_true", help="sweep the micro-batch for peak memory instead")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="all the time there is")
    parser.add_argument("--case-seconds", type=float, default=400, help="end a case that takes longer")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a case")
    parser.add_argument("--pairs", type=int, default=6, help="turns of each contestant")
    parser.add_argument("--micro-batch", type=int, help="windows a forward pass, instead of the preset's")
    parser.add_argument("--accumulate", type=int, help="micro-batches a step, instead of one GPU's share of the batch")
    parser.add_argument("--device", help="cuda or cpu; default: the GPU where there is one")
    parser.add_argument("--worker-until", type=float, help=argparse.SUPPRESS)  # the deadline of the measuring process
    return parser.parse_args(argv)


def selected(options: argparse.Namespace) -> list[Case]:
    if options.limiter or options.memory:
        return chosen(special("limiter" if options.limiter else "memory", options.preset), options.only)
    return chosen(suite(options.preset), options.only)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    cases = selected(options)
    if options.list:
        print("\n".join(case.name for case in cases))
        return
    if options.worker_until:
        from tests.benchmarks.gpu.worker import work  # torch: the supervisor does without

        work(cases, options)
        return
    deadline = time.time() + options.budget_seconds - SPARE_S
    worker = [sys.executable, "-m", "tests.benchmarks.gpu", *argv, "--worker-until", str(deadline)]
    left = supervise(cases, options.out, deadline, worker, options.case_seconds)
    print(write_summary(options.out, read_json_lines(options.out / RESULTS), (case.name for case in left)))


if __name__ == "__main__":
    main()
