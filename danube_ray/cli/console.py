"""What the verbs share: the console, and arguments of the form NAME=PATH."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tyro
from rich.console import Console

from danube_ray.config import require

console = Console()
Positional = tyro.conf.Positional


def named_paths(pairs: Iterable[str]) -> dict[str, Path]:
    """NAME=PATH arguments as a mapping; `ConfigError` for one without a name, twice the same, or of nothing."""
    named: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        require(bool(name and equals and path), "argument", pair, "NAME=PATH")
        require(name not in named, "argument", pair, f"one path for {name!r}")
        require(Path(path).exists(), "argument", pair, "a path that exists")
        named[name] = Path(path)
    require(bool(named), "arguments", list(pairs), "NAME=PATH, at least one")
    return named


def print_report(run: Path) -> None:
    from danube_ray.report import write_report

    console.print(f"report [bold]{write_report(run)}[/bold]")
