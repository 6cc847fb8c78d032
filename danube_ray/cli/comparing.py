"""The verb that puts two runs side by side."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Column, Table

from danube_ray.cli.console import Positional, console


def compare(first: Positional[Path], second: Positional[Path], out: Path | None = None) -> None:
    """Put two training runs side by side.

    Settings that differ, losses at the same tokens, validation by source, speed.

    Args:
        first: a run's folder.
        second: the other run's folder.
        out: a page with both curves to write, such as compare.html.
    """
    from danube_ray.report.compare import compare as compare_runs
    from danube_ray.report.compare import write_comparison
    from danube_ray.report.units import count

    comparison = compare_runs(first, second)
    names = [escape(name) for name in comparison.names]

    def print_table(what: str, *columns: str, rows: list[tuple[str, ...]]) -> None:
        if rows:
            heads = (Column(head, overflow="fold") for head in (what, *columns))  # no name and no path is cut
            table = Table(*heads, box=None)
            for row in rows:
                table.add_row(*map(escape, row))
            console.print(table, "")

    print_table("setting", *names, rows=comparison.settings)
    print_table(
        "training loss at tokens",
        *names,
        "difference",
        rows=[
            (count(at), f"{mine:.4f}", f"{other:.4f}", f"{other - mine:+.4f}")
            for at, mine, other in comparison.losses()
        ],
    )
    print_table(
        "last validation loss",
        *names,
        rows=[(source, loss(mine), loss(other)) for source, mine, other in comparison.validation],
    )
    print_table("median of steps", *names, rows=comparison.speed)
    if out is not None:
        console.print(f"comparison [bold]{write_comparison(comparison, out)}[/bold]")


def loss(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4f}"
