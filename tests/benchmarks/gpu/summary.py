"""The results as Markdown tables: each figure with its mode, against its aim."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.cases import RATIO_AIM

Row = dict[str, Any]
AGREE = 0.05  # first gradient norms of modes of one shape, relative: FP8 rounds, a broken kernel is far off


def summary(rows: list[Row], left_out: Iterable[str]) -> str:
    """All results as Markdown, the cases for which there was no time last."""
    parts = [heading(rows)]
    tables = (("speed", speed_table), ("pairs", pairs_table), ("limiter", limiter_table), ("memory", memory_table))
    for kind, table in tables:
        if found := [row for row in rows if row["kind"] == kind and "error" not in row]:
            parts.append(table(found))
    if failed := [row for row in rows if "error" in row]:
        lines = [f"- {row['case']}: {row['error']['type']}: {first_line(row['error']['message'])}" for row in failed]
        parts.append("\n".join(("Failed:", "", *lines)))
    if names := list(left_out):
        parts.append(f"Not measured: {', '.join(names)}.")
    return "\n\n".join(parts) + "\n"


def heading(rows: list[Row]) -> str:
    machine = next((row["machine"] for row in rows if row["machine"]), None)
    if machine is None:
        return "# GPU benchmark: no results"
    facts = {"driver": machine.get("driver_version"), "power limit": machine.get("power.limit")}
    facts |= {name: value for name, value in machine["packages"].items() if value}
    return f"# GPU benchmark on {machine['device']}\n\n" + ", ".join(f"{k} {v}" for k, v in facts.items() if v)


def headline(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if "error" in result:
        return f"{result['error']['type']}: {first_line(result['error']['message'])}"
    if "ratio" in result:
        return f"{result['ratio']['median']:.2f} times the peer"
    if "tokens_per_s" in result:
        mfu = result["mfu_of_bf16_peak"]
        return f"{result['tokens_per_s']['median']:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")
    if "families" in result:
        shares = [f"{label} {percent(figure['share'])}" for label, figure in result["families"].items()]
        return ", ".join((*shares, f"idle {percent(result['idle_share'])}"))
    return f"{len(result['sweep'])} micro-batches fit"


def speed_table(rows: list[Row]) -> str:
    """Alone on the device. `of aim` is tokens/s over the aim for one H100 SXM."""
    norms = {same_start(row): row["first_step"]["gradient_norm"] for row in reversed(rows)}
    lines = []
    for row in rows:
        tokens, mode, peak = row["tokens_per_s"], row["mode"], row["memory"]["peak"]
        off = row["first_step"]["gradient_norm"] / norms[same_start(row)] - 1
        lines.append(
            (
                row["case"],
                f"{mode['micro_batch']}",
                f"{tokens['median']:,.0f} [{tokens['low']:,.0f}, {tokens['high']:,.0f}]",
                percent(row["mfu_of_bf16_peak"]),
                f"{row['aim']:,} ({tokens['median'] / row['aim']:.0%})" if row["aim"] else "",
                f"{peak['allocated_gib']:.1f} / {row['memory']['planner_gib']:.1f}" if peak else "",
                f"{off:+.1%}" + ("" if abs(off) <= AGREE else " **differs**"),
                clocks(row["clocks"]),
            )
        )
    head = ("case", "micro-batch", "tokens/s [95 %]", "MFU", "aim (reached)", "peak GiB / planned")
    return table((*head, "first gradient norm", "clock, power"), lines)


def same_start(row: Row) -> tuple[Any, ...]:
    """What results have in common whose first steps see the same rows with the same weights."""
    return row["preset"], row["sequence_length"], row["document_tokens"], row["first_step"]["windows"]


def pairs_table(rows: list[Row]) -> str:
    """Ours over transformers, step by step in turn."""
    lines = []
    for row in rows:
        ratio, peer = row["ratio"], row["peer"]
        mode = peer["mode"]
        how = f"{mode['attention']}, compile: {mode['compile']}, micro-batch {mode['micro_batch']}"
        lines.append(
            (
                row["case"],
                f"{row['ours']['tokens_per_s']['median']:,.0f}",
                f"{peer['tokens_per_s']['median']:,.0f} ({how})",
                f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}], {ratio['pairs']} pairs",
                f"{RATIO_AIM} ({'reached' if ratio['median'] >= RATIO_AIM else 'missed'})" if row["aim"] else "",
            )
        )
    return table(("case", "ours, tokens/s", "peer, tokens/s", "ratio [95 %]", "aim"), lines)


def limiter_table(rows: list[Row]) -> str:
    """Shares of the step's time."""
    labels = list(dict.fromkeys(label for row in rows for label in row["families"]))
    lines = [
        (
            row["case"],
            f"{1_000 * row['step_s']:.1f}",
            *(percent(row["families"].get(label, {}).get("share")) for label in labels),
            percent(row["idle_share"]),
            number(row["gemm_tflops_per_s"]),
            number(row["attention_tflops_per_s"]),
        )
        for row in rows
    ]
    return table(("case", "step, ms", *labels, "idle", "GEMM TFLOP/s", "attention TFLOP/s"), lines)


def memory_table(rows: list[Row]) -> str:
    """Peak of each micro-batch over the planner's figure."""
    lines = []
    for row in rows:
        for point in row["sweep"]:
            peak = point["peak"]["allocated_gib"] if point["peak"] else None
            ratio = f"{peak / point['planner_gib']:.2f}" if peak else ""
            measured = number(peak)
            lines.append((row["case"], str(point["micro_batch"]), measured, f"{point['planner_gib']:.1f}", ratio))
        if row["ended_by"]:
            lines.append((row["case"], str(row["ended_by"]["micro_batch"]), "out of memory", "", ""))
    return table(("case", "micro-batch", "peak GiB", "planned GiB", "measured / planned"), lines)


def clocks(medians: dict[str, float]) -> str:
    units = {"clocks.sm": "MHz", "power.draw": "W"}
    return ", ".join(f"{medians[name]:.0f} {unit}" for name, unit in units.items() if name in medians)


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def first_line(message: str) -> str:
    return message.strip().partition("\n")[0][:200]


def write_summary(out: Path, rows: list[Row], left_out: Iterable[str]) -> str:
    text = summary(rows, left_out)
    (out / "summary.md").write_text(text)
    return text
