"""The verb that serves models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from danube_ray.cli.console import Positional, console
from danube_ray.config import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    EngineSettings,
    GateSettings,
    ServeConfig,
    ServedModel,
    require,
)


def serve(
    models: Positional[tuple[str, ...]] = (),
    engine: Annotated[EngineSettings, tyro.conf.arg(name="")] = EngineSettings(),
    gate: Annotated[GateSettings, tyro.conf.arg(name="")] = GateSettings(),
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    config: Path | None = None,
    write_config: Path | None = None,
) -> None:
    """Serve models: an OpenAI API, and a chat page.

    The API is under /v1, the page at /, Prometheus' metrics at /metrics. GGUF files run in llama.cpp on CPUs, Hugging
    Face folders in vLLM. The options are the same for each of MODELS; a configuration file holds them by model.
    kill -HUP reads that file again and redeploys what has changed; answers under way end whole.

    Args:
        models: NAME=PATH each, or PATH alone for the name of the file.
        engine: of each model.
        gate: in front of them.
        host: the address to listen on; other than this machine's own only with API keys.
        port: the port to listen on; 0 takes a free one.
        config: a file to serve instead, as --write-config makes them; `serve deploy` takes it too.
        write_config: write the configuration of MODELS and options to this file, and serve nothing.
    """
    from danube_ray.runtime import serving
    from danube_ray.serve import files

    if config is not None:
        given = (models, engine, gate, host, port, write_config)
        none = ((), EngineSettings(), GateSettings(), DEFAULT_HOST, DEFAULT_PORT, None)
        remedy = "the file holds them all"
        require(given == none, "--config", str(config), "no models or options beside it", remedy)
        serving.serve(files.read_config(config), config)
        return
    asked = ServeConfig(models=named_models(models, engine), gate=gate, host=host, port=port)
    if write_config is None:
        serving.serve(asked)
        return
    files.write_config(asked, write_config)
    console.print(f"configuration in [bold]{write_config}[/bold]: danube serve --config {write_config}", soft_wrap=True)


def named_models(arguments: Sequence[str], engine: EngineSettings) -> dict[str, ServedModel]:
    """A model for each `[NAME=]PATH`; `ConfigError` for a path that isn't there, or a name given twice."""
    named: dict[str, ServedModel] = {}
    for argument in arguments:
        name, equals, place = argument.partition("=")
        path = Path(place if equals else argument)
        require(path.exists(), "model", argument, "NAME=PATH or PATH, of a file or folder that exists")
        name = name if equals else path.stem
        require(name not in named, "model", argument, f"one path for {name!r}")
        named[name] = ServedModel(weights=path, **vars(engine))
    require(bool(named), "models", list(arguments), "at least one", "or a file: --config FILE")
    one = len(named) == 1 or not engine.adapters
    require(one, "--adapters", list(engine.adapters), "those of one model", "a configuration file has them by model")
    return named
