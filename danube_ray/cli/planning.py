"""Verbs that look ahead: what a run will need, and what this machine can run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danube_ray.cli.console import console, wide
from danube_ray.config import RunConfig, require
from danube_ray.presets import PRESETS

if TYPE_CHECKING:
    from danube_ray.doctor.gain import Gain

RESULTS = Path(__file__).parents[2] / "tests" / "benchmarks" / "results"  # a checkout's
DEFAULT_PRESET = "danube_1_8b"  # whose checkpoints and heads the doctor thinks of unless told otherwise
WIDTH = 120  # what the plan's figures need: in a narrower terminal their lines wrap, where rich would cut them


def plan(
    run: Annotated[RunConfig, tyro.conf.arg(name="")],
    hardware: str | None = None,
    price_per_gpu_hour: float | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    results: Path = RESULTS,
) -> None:
    """Estimate a run's memory, speed, days and cost beforehand.

    Args:
        run: the run.
        hardware: which GPU and how many: h100:8, h200:16, a100:8; default: as many H100s as the run has workers.
        price_per_gpu_hour: dollars; default: an assumption, which the plan names.
        as_json: print the plan as JSON, for programs.
        results: folder of the GPU benchmark's results, which tell how far off the estimates are.
    """
    from danube_ray import planner
    from danube_ray.cli.plan_page import as_data, page

    gpu, num_gpus = planner.parse_hardware(hardware or f"h100:{run.loop.num_workers}")
    if price_per_gpu_hour is not None:
        gpu = dataclasses.replace(gpu, price_per_hour=price_per_gpu_hour, price_source="as given")
    priced = planner.plan(run, gpu, num_gpus)
    compared = planner.comparisons(results, {name: preset() for name, preset in PRESETS.items()})
    if as_json:
        print(json.dumps(as_data(priced, compared), indent=2))
        return
    paper = Console(width=max(console.width, WIDTH))
    for part in page(priced, compared):
        paper.print(part, "", highlight=False)


def doctor(preset: str | None = None, folder: Path = Path()) -> None:
    """Say what this machine can run, and what to install for more.

    Args:
        preset: the model to have in mind; on a GPU with FP8, its linears are measured in bf16 and FP8.
        folder: where runs will write: its disk is tried.
    """
    from danube_ray.doctor import examine, fp8_gain

    require(preset is None or preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    run = PRESETS[preset or DEFAULT_PRESET]()
    findings = examine(run, folder)
    gain = None
    if preset is not None:
        finding, gain = fp8_gain(run)
        findings.append(finding)
    marks = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "[yellow]·[/yellow]"}
    table = Table("", "what", "found", "what to do", box=None)
    for check in findings:
        table.add_row(marks[check.ok], check.name, escape(check.found), escape(check.remedy))
    wide().print(table)
    if gain is not None:
        wide().print("", gain_table(gain))


def gain_table(gain: Gain) -> Table:
    """Each linear's products in bf16 and FP8, and what FP8 gains once its casts are paid for."""
    table = Table("linear", "in x out", box=None)
    products = [product.name for product in gain.linears[0].products]
    for head in (*products, "casts", "parts in all", "transformer-engine", "gain"):
        table.add_column(f"{head}, us" if head != "gain" else head, justify="right")
    for linear in gain.linears:
        times = [f"{micro(product.bf16_s)} > {micro(product.fp8_s)}" for product in linear.products]
        parts = f"{micro(linear.bf16_s)} > {micro(linear.parts_s)}"
        te = "" if linear.te_s is None else micro(linear.te_s)
        shape = f"{linear.in_features:,} x {linear.out_features:,}"
        table.add_row(linear.name, shape, *times, micro(linear.cast_s), parts, te, f"{linear.gain:.2f}")
    return table


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}"
