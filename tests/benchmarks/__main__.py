"""`make bench`: the benchmarks of the CPU, one after the other; each says what it measures where its file begins.

Each prints its figures with what is aimed at, most of them ratios of two ways run in turn (`pairs.py`), and leaves
`results/NAME.json`: the figures behind them, the machine, and the versions that were measured. The GPU's are another
program: python -m tests.benchmarks.gpu --help
"""

from __future__ import annotations

import argparse
import ast
import importlib
from pathlib import Path

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
    "serve_from_zero",
    "serve_soak",
)


def title(name: str) -> str:
    """The first paragraph of a benchmark's docstring, read without importing torch and Ray."""
    told = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text())) or ""
    return " ".join(told.partition("\n\n")[0].split())


def main() -> None:
    listing = "\n".join(f"  {name:<22}{title(name)}" for name in BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=f"{__doc__}\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="run these alone (default: all)")
    names = parser.parse_args().names or BENCHMARKS
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"— {name.replace('_', ' ')}")
        importlib.import_module(f"tests.benchmarks.{name}").main()


if __name__ == "__main__":
    main()
