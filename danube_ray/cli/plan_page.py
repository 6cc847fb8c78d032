"""A plan as tables for the terminal, and as data for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from danube_ray.planner import GIB, PUBLISHED, Comparison, Memory, Plan, StagePlan, StepTime
from danube_ray.planner.coefficients import used
from danube_ray.planner.hardware import USABLE
from danube_ray.report.units import short_count

GB = 1e9
PADDING_WORTH_SAYING = 0.05
PARALLELISM_NAMES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def page(plan: Plan, compared: Sequence[Comparison]) -> Iterator[RenderableType]:
    """The plan, part by part."""
    yield heading(plan)
    yield memory_table(plan)
    yield largest_table(plan)
    yield cost_table(plan)
    yield time_table(plan)
    yield verdict(plan)
    yield from padding(plan)
    yield from accuracy(plan, compared)
    yield coefficient_table(plan)


def heading(plan: Plan) -> str:
    run, loop = plan.run, plan.run.loop
    mode = ", ".join(
        (
            loop.precision + (f" ({loop.scaling} scaling)" if loop.scaling else ""),
            PARALLELISM_NAMES[loop.parallelism],
            f"attention {loop.attention}",
            f"activation checkpointing {on_off(loop.activation_checkpointing)}",
            f"torch.compile {on_off(loop.compile)}",
        )
    )
    return (
        f"[bold]{run.name}[/bold]: {run.model.num_parameters:,} parameters, {short_count(run.total_tokens)} tokens, "
        f"{run.global_batch_tokens:,} a step, on {plan.num_gpus} x {plan.gpu.name}\n{mode}\n"
        "Estimates by formula, for GPUs only: below is what they rest on and how far off they are."
    )


def memory_table(plan: Plan) -> Group:
    names = [field.name for field in dataclasses.fields(Memory)]
    labels = [name.removesuffix("_bytes") for name in names]
    limit = f"{plan.gpu.usable_bytes / GB:.1f} GB ({USABLE:.0%} of {plan.gpu.memory_bytes / GIB:.0f} GiB) may be used"
    table = table_of("stage", "micro-batch")
    for label in (*labels, "sum"):
        table.add_column(label, justify="right")
    table.add_column("")
    for stage in plan.stages:
        parts = [f"{getattr(stage.memory, name) / GB:.1f}" for name in names]
        shape = f"{stage.work.micro_batch_size} x {stage.work.sequence_length:,}"
        fits = "[green]fits[/green]" if stage.fits else "[bold red]does not fit[/bold red]"
        table.add_row(stage.stage.name, shape, *parts, f"{stage.memory.total_bytes / GB:.1f}", fits)
    return Group(titled(f"Memory a GPU at the peak of a step, GB; {limit}"), table)


def largest_table(plan: Plan) -> Group:
    title = "Largest micro-batch that fits, windows a GPU: plain / with activation checkpointing"
    table = table_of("stage", "sequence", "windows a step")
    kinds = list(dict.fromkeys(choice.parallelism for choice in plan.stages[0].largest))
    for kind in kinds:
        table.add_column(PARALLELISM_NAMES[kind], justify="right")
    for stage in plan.stages:
        cells = [
            " / ".join(str(choice.windows) for choice in stage.largest if choice.parallelism == kind) for kind in kinds
        ]
        table.add_row(stage.stage.name, f"{stage.work.sequence_length:,}", str(stage.work.windows), *cells)
    return Group(titled(title), table)


def cost_table(plan: Plan) -> Group:
    price = f"${plan.gpu.price_per_hour:.2f} a GPU hour ({plan.gpu.price_source})"
    table = table_of("stage")
    heads = (
        "tokens",
        "sequence",
        "GFLOP a token",
        "tokens/s a GPU",
        "tokens/s",
        "MFU, bf16 peak",
        "days",
        "cost, $",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.stage.name,
            short_count(stage.stage.tokens),
            f"{stage.work.sequence_length:,}",
            f"{stage.flops_per_token / 1e9:.2f}",
            f"{stage.tokens_per_s / plan.num_gpus:,.0f}",
            f"{stage.tokens_per_s:,.0f}",
            f"{stage.mfu:.1%}",
            f"{stage.days:,.2f}",
            f"{stage.cost:,.0f}",
        )
    speed = plan.run.total_tokens / (plan.days * 86_400)
    total = short_count(plan.run.total_tokens), "", "", f"{speed / plan.num_gpus:,.0f}", f"{speed:,.0f}", ""
    table.add_section()
    table.add_row("all", *total, f"{plan.days:,.2f}", f"{plan.cost:,.0f}", style="bold")
    return Group(titled(f"Speed and cost at {price}"), table)


def time_table(plan: Plan) -> Group:
    names = [field.name for field in dataclasses.fields(StepTime)]
    table = table_of("stage")
    for label in (*(name.removesuffix("_s") for name in names), "sum", "s a step"):
        table.add_column(label, justify="right")
    for stage in plan.stages:
        parts = [f"{1e6 * getattr(stage.step_time, name) / stage.work.tokens:.2f}" for name in names]
        total = stage.step_time.total_s
        table.add_row(stage.stage.name, *parts, f"{1e6 * total / stage.work.tokens:.2f}", f"{total:.2f}")
    return Group(titled("Where a GPU's time goes, microseconds a token"), table)


def verdict(plan: Plan) -> str:
    if plan.fits:
        price = f"{plan.days:,.1f} days, {plan.gpu_hours:,.0f} GPU hours, ${plan.cost:,.0f}"
        return f"[bold green]It fits[/bold green]: {price}."
    stages = ", ".join(stage.stage.name for stage in plan.stages if not stage.fits)
    if plan.remedy is None:
        return f"[bold red]It does not fit[/bold red] ({stages}), however it is split: take more GPUs, or larger ones."
    return (
        f"[bold red]It does not fit[/bold red] ({stages}). The fastest way that does, by this formula: "
        f"[bold]{' '.join(plan.remedy.options)}[/bold], {plan.remedy.days:,.1f} days"
    )


def padding(plan: Plan) -> Iterator[str]:
    """What it costs that a batch's windows don't divide by the GPUs, where that is much."""
    padded = [stage for stage in plan.stages if stage.padding_share > PADDING_WORTH_SAYING]
    if padded:
        shares = ", ".join(f"{stage.padding_share:.0%} in stage {stage.stage.name}" for stage in padded)
        yield (
            f"[bold]Padding[/bold] is part of the work ({shares}): a batch's windows don't divide by {plan.num_gpus:,} "
            "GPUs. Take fewer of them, or a larger --global-batch-tokens."
        )


def accuracy(plan: Plan, compared: Sequence[Comparison]) -> Iterator[RenderableType]:
    """The formula against measurements, and against what others have published."""
    if compared:
        yield comparison_table(compared)
    if not any(comparison.gpu.name == plan.gpu.name for comparison in compared):
        yield f"Nothing has been measured yet on {plan.gpu.name}: how far off the formula is there is not known."
    for figure in PUBLISHED:
        for stage in plan.stages:
            if (plan.run.name, plan.gpu.name, stage.work.sequence_length) == figure.of:
                predicted = stage.tokens_per_s / plan.num_gpus
                yield (
                    f"Published, on other software: {figure.tokens_per_s_per_gpu:,.0f} tokens/s a GPU in "
                    f"{figure.precision} on {figure.gpu.name} ({figure.source}). The formula says {predicted:,.0f} for "
                    f"this plan's stage {stage.stage.name}: {predicted / figure.tokens_per_s_per_gpu - 1:+.1%}."
                )


def comparison_table(compared: Sequence[Comparison]) -> Group:
    errors = sorted(abs(comparison.speed_error) for comparison in compared)
    middle = f"{errors[len(errors) // 2]:.1%} off at the median"
    title = f"The formula against {len(errors)} measured results, one GPU each: {middle}"
    table = table_of("case", "GPU", "micro-batch")
    for head in ("tokens/s predicted", "measured", "error", "peak GB predicted", "measured", "error"):
        table.add_column(head, justify="right")
    for one in compared:
        speeds = (f"{one.predicted_tokens_per_s:,.0f}", f"{one.measured_tokens_per_s:,.0f}", f"{one.speed_error:+.1%}")
        memory = ("", "", "")
        if one.measured_bytes and one.memory_error is not None:
            memory = f"{one.predicted_bytes / GB:.1f}", f"{one.measured_bytes / GB:.1f}", f"{one.memory_error:+.1%}"
        table.add_row(one.case, one.gpu.name, str(one.work.micro_batch_size), *speeds, *memory)
    return Group(titled(title), table)


def coefficient_table(plan: Plan) -> Group:
    table = table_of("what")
    table.add_column("value", justify="right")
    for head in ("unit", "basis", "source"):
        table.add_column(head)
    for coefficient in used(plan.run.loop, plan.gpu, plan.num_gpus):
        value = f"{coefficient.value:g}"
        table.add_row(coefficient.what, value, coefficient.unit, coefficient.basis, coefficient.source)
    return Group(titled("What is neither counted from the model nor from the GPU's data sheet"), table)


def titled(title: str) -> str:
    return f"[bold]{title}[/bold]"


def table_of(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 2, 0, 0))


def on_off(value: bool) -> str:
    return "on" if value else "off"


def as_data(plan: Plan, compared: Sequence[Comparison]) -> dict[str, Any]:
    """The plan as JSON-able values: seconds, bytes, tokens, dollars."""
    return {
        "run": plan.run.name,
        "parameters": plan.run.model.num_parameters,
        "hardware": {**dataclasses.asdict(plan.gpu), "num_gpus": plan.num_gpus, "usable_bytes": plan.gpu.usable_bytes},
        "loop": dataclasses.asdict(plan.run.loop),
        "fits": plan.fits,
        "remedy": None if plan.remedy is None else dataclasses.asdict(plan.remedy),
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "cost": plan.cost,
        "stages": [stage_data(stage, plan.num_gpus) for stage in plan.stages],
        "comparisons": [comparison_data(comparison) for comparison in compared],
        "published": [dataclasses.asdict(figure) for figure in PUBLISHED],
        "coefficients": [
            dataclasses.asdict(coefficient) for coefficient in used(plan.run.loop, plan.gpu, plan.num_gpus)
        ],
    }


def stage_data(stage: StagePlan, num_gpus: int) -> dict[str, Any]:
    return {
        "name": stage.stage.name,
        "tokens": stage.stage.tokens,
        "sequence_length": stage.work.sequence_length,
        "sliding_window": stage.work.model.sliding_window,
        "micro_batch_size": stage.work.micro_batch_size,
        "windows_per_gpu": stage.work.windows,
        "flops_per_token": stage.flops_per_token,
        "tokens_per_s": stage.tokens_per_s,
        "tokens_per_s_per_gpu": stage.tokens_per_s / num_gpus,
        "mfu_of_bf16_peak": stage.mfu,
        "days": stage.days,
        "cost": stage.cost,
        "padding_share": stage.padding_share,
        "fits": stage.fits,
        "memory": {**dataclasses.asdict(stage.memory), "total_bytes": stage.memory.total_bytes},
        "step_time": {**dataclasses.asdict(stage.step_time), "total_s": stage.step_time.total_s},
        "largest_micro_batch": [dataclasses.asdict(choice) for choice in stage.largest],
    }


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    return {
        "case": comparison.case,
        "gpu": comparison.gpu.name,
        "predicted_tokens_per_s": comparison.predicted_tokens_per_s,
        "measured_tokens_per_s": comparison.measured_tokens_per_s,
        "speed_error": comparison.speed_error,
        "predicted_bytes": comparison.predicted_bytes,
        "measured_bytes": comparison.measured_bytes,
        "memory_error": comparison.memory_error,
    }
