"""Tables of quantization levels in the terminal, 100 columns wide at most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from danube_ray.cli.console import console
from danube_ray.quantize.estimate import LevelSize
from danube_ray.report.units import MISSING, count, decimal, percent, size

Row = dict[str, Any]
WIDTH = 100


def print_table(rows: Sequence[Row]) -> None:
    """What levels are and cost, largest first; then their scores, and what a long context costs, where measured."""
    judged = [row for row in rows if "kld_mean" in row]
    print_whole(level_table(rows, bool(judged)))
    if judged:
        console.print(
            "[dim]By size. Judge by the KL divergence (KLD, nats a token) from the float model, whose perplexity is "
            f"{judged[0]['reference_perplexity']:.4g}: perplexity alone misranks levels.[/dim]"
        )
    if timed := {row["speed_threads"] for row in rows if row.get("speed_threads")}:
        threads = f"{', '.join(map(str, sorted(timed)))} thread{'s' * (timed != {1})}"
        console.print(f"[dim]Tokens a second are of one sequence on {threads}.[/dim]")
    if spared := [row["level"] for row in rows if row.get("imatrix")]:
        console.print(f"[dim]Rounded by an importance matrix: {', '.join(spared)}.[/dim]")
    if short := [f"{row['level']} {len(row['fallbacks'])}" for row in rows if row["fallbacks"]]:
        console.print(f"[dim]Tensors in a wider type, their rows too short for the level's: {', '.join(short)}.[/dim]")
    if scored := [row for row in rows if row.get("tasks")]:
        print_whole(task_table(scored))
    if far := [row for row in rows if row.get("long_context")]:
        print_whole(far_table(far))
        print_retrieval(far)


def print_whole(table: Table) -> None:
    """A table as wide as it is: in a narrower terminal its lines wrap, where rich would cut the figures."""
    Console(file=console.file, width=max(console.width, WIDTH)).print(table)


def level_table(rows: Iterable[Row], judged: bool) -> Table:
    """Size and speed of each level, and its quality where any was `judged`."""
    quality = ("KLD mean", "KLD p99", "same top", "perplexity") if judged else ()
    table = new_table("level", "size", "bits", *quality, "tokens/s", "prompt/s")
    for row in rows:
        known, error = "kld_mean" in row, row.get("perplexity_error")
        values = (
            with_error(row["kld_mean"], row["kld_error"]),
            f"{row['kld_p99']:.2g}",
            percent(row["same_top"], 2),
            decimal(row["perplexity"]) + (f" ± {decimal(error, 2)}" if error else ""),
        ) if known else (MISSING,) * len(quality)  # fmt: skip
        speeds = [count(row[key] and round(row[key])) for key in ("tokens_per_s", "prompt_tokens_per_s")]
        cells = values if judged else ()
        table.add_row(row["level"], size(row["bytes"]), f"{row['bits_per_weight']:.2f}", *cells, *speeds)
    return table


def task_table(rows: Iterable[Row]) -> Table:
    """Each level's scores, and how far they fell from the float model's on the same questions."""
    table = new_table("level", "task", "metric", "score", "float model", "drop", "questions", words=3)
    for row in rows:
        for task in row["tasks"]:
            scores = with_error(task["value"], task["stderr"], ".3f"), f"{task['reference']:.3f}"
            drop = with_error(task["drop"], task["drop_error"], ".3f")
            table.add_row(row["level"], task["task"], task["metric"], *scores, drop, f"{task['n']:,}")
    return table


def far_table(rows: Sequence[Row]) -> Table:
    """Mean KLD by position, and the share of hidden words found."""
    spans = [f"to {span['end']:,}" for span in rows[0]["long_context"]["by_position"]]
    table = new_table("level", *spans, "words found")
    for row in rows:
        check = row["long_context"]
        klds = [f"{span['kld_mean']:.2g}" for span in check["by_position"]]
        table.add_row(row["level"], *klds, with_error(100 * check["found"], 100 * (check["found_error"] or 0), ".0f"))
    return table


def print_retrieval(rows: Sequence[Row]) -> None:
    """What the words found are to be held against."""
    check = rows[0]["long_context"]
    theirs, chance = check["reference_found"], check["chance"]
    console.print(
        f"[dim]KLD mean by position, up to the {check['context']:,} tokens that llama.cpp can use; words hidden in "
        f"long prompts and found again, %: the float model finds {percent(theirs, 0)}, chance is {percent(chance, 0)}."
        + (" It hardly finds them itself: that says nothing of its levels." if theirs < 2 * chance else "")
        + "[/dim]"
    )


def print_estimate(model: str, sizes: Sequence[LevelSize], context: int) -> None:
    """Sizes by shape alone."""
    table = new_table("level", "file", "bits", "memory to run")
    for each in sizes:
        table.add_row(each.level, size(each.bytes), f"{each.bits_per_weight:.2f}", size(each.memory_bytes))
    console.print(table)
    console.print(
        f"[dim]{model}, no weight read. Memory: weights and an f16 key-value cache of {context:,} tokens "
        f"({size(sizes[0].cache_bytes)}); llama.cpp takes some more to work in.[/dim]"
    )
    if short := [each.level for each in sizes if each.num_fallbacks]:
        console.print(f"[dim]Rows too short for their blocks make these larger: {', '.join(short)}.[/dim]")


def new_table(*headers: str, words: int = 1) -> Table:
    """A table whose first `words` columns are words and the others numbers."""
    table = Table(box=None, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < words else "right", no_wrap=True)
    return table


def with_error(value: float, error: float | None, digits: str = ".3g") -> str:
    """A value and its standard error, in digits of its own size."""
    return f"{value:{digits}}" if error is None else f"{value:{digits}} ± {error:.1g}"
