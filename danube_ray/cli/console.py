"""What the verbs share: the console, arguments of the form NAME=PATH, the configuration that a run stored."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from danube_ray.artifacts import read_json
from danube_ray.config import LoopConfig, ModelConfig, RunConfig, StageConfig, require

console = Console()
WIDTH = 160  # of a table that is written to a file or a pipe


def wide() -> Console:
    """For tables with many columns: as wide as the terminal, where they wrap, but wide where there is none."""
    return Console() if console.is_terminal else Console(width=max(console.width, WIDTH))


Positional = tyro.conf.Positional
registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def by_name(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[dict[str, Any]] | None:
    """A setting by source is written `web=80,wiki=20`, with whatever sources one has, not only the preset's."""
    values = {dict[str, int]: int, dict[str, float]: float, dict[str, str]: str, dict[str, Path]: Path}
    value_type = values.get(info.type)
    if value_type is None:
        return None

    def parse(arguments: list[str]) -> dict[str, Any]:
        pairs = [pair.partition("=") for pair in arguments[0].split(",") if pair]
        try:
            if not all(name and value for name, _, value in pairs):
                raise ValueError
            return {name: value_type(value) for name, _, value in pairs}
        except ValueError:  # a word for a number says little of what was wanted
            raise ValueError(f"{arguments[0]!r} is not of the form NAME={metavar},...") from None

    metavar = {str: "NAME", Path: "PATH", int: "INTEGER"}.get(value_type, "NUMBER")
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"NAME={metavar},...",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [",".join(f"{name}={one}" for name, one in value.items())],
    )


def named_places(pairs: Iterable[str]) -> dict[str, str]:
    """NAME=PATH arguments as a mapping; `ConfigError` for one without a name, twice the same, or of nothing.

    A place that is no URI must exist; whoever reads a URI finds out.
    """
    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, place = pair.partition("=")
        require(bool(name and equals and place), "argument", pair, "NAME=PATH")
        require(name not in named, "argument", pair, f"one path for {name!r}")
        require("://" in place or Path(place).exists(), "argument", pair, "a path that exists")
        named[name] = place
    require(bool(named), "arguments", list(pairs), "NAME=PATH, at least one")
    return named


def named_paths(pairs: Iterable[str]) -> dict[str, Path]:
    """`named_places` on this machine."""
    return {name: Path(place) for name, place in named_places(pairs).items()}


def stored_run(folder: Path) -> RunConfig:
    """A pretraining run as it stored itself: model, stages and data; of its loop the seed. `ConfigError` for others."""
    path = folder / "config.json"
    require(path.is_file(), "run", str(folder), "the folder of a run, with its config.json")
    stored = read_json(path)
    kind, remedy = stored.get("kind"), "a fine-tuned model is in RUN/model already, and conversations name no documents"
    require(kind == "pretrain", f"kind of {folder}", kind, "'pretrain'", remedy)
    return RunConfig(
        name=stored["name"],
        model=ModelConfig(**stored["model"]),
        stages=tuple(StageConfig(**stage) for stage in stored["stages"]),
        global_batch_tokens=stored["global_batch_tokens"],
        loop=LoopConfig(seed=stored["loop"]["seed"]),
        tokenizer=stored.get("tokenizer"),
        tokens_dir=stored["tokens_dir"],
    )


def print_report(run: Path) -> None:
    from danube_ray.report.page import write_report

    console.print(f"report [bold]{write_report(run)}[/bold]")
