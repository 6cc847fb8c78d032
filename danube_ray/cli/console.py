"""What the verbs share: the console, and arguments of the form NAME=PATH."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from danube_ray.config import require

console = Console()
Positional = tyro.conf.Positional
registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def by_source(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[dict[str, Any]] | None:
    """A setting by source is written `web=80,wiki=20`, with whatever sources one has, not only the preset's."""
    number = {dict[str, int]: int, dict[str, float]: float}.get(info.type)
    if number is None:
        return None

    def parse(arguments: list[str]) -> dict[str, Any]:
        pairs = [pair.partition("=") for pair in arguments[0].split(",") if pair]
        return {source: number(value) for source, _, value in pairs}

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="SOURCE=NUMBER,...",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [",".join(f"{source}={share}" for source, share in value.items())],
    )


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
