"""A server's configuration file: Ray Serve's own format, so that `serve deploy FILE` and KubeRay take it too.

    http_options: {host: 127.0.0.1, port: 8000, request_timeout_s: null}
    applications:
    - name: danube
      route_prefix: /
      import_path: danube_ray.runtime.serving:build
      args:
        models: {NAME: the fields of a ServedModel}
        gate: the fields of GateSettings

Serve's own schema takes a misspelt setting without a word. Here whatever would be ignored is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from danube_ray.artifacts import write_atomically
from danube_ray.config import DEFAULT_PORT, ConfigError, GateSettings, ServeConfig, ServedModel, require

T = TypeVar("T")
APPLICATION = {"name": "danube", "route_prefix": "/", "import_path": "danube_ray.runtime.serving:build"}
HEADER = """\
# `danube serve --config THIS_FILE` serves it on this machine, `serve deploy THIS_FILE` on a cluster whose nodes all see
# these paths. Settings that are not here have their defaults: `danube serve --help` names them.
"""


def read_config(file: Path) -> ServeConfig:
    """The server that `file` describes; paths in it are relative to its folder.

    `ConfigError` names the first setting that is unknown, misspelt, given twice, of another type, or out of range.
    """
    try:
        content = yaml.load(file.read_text(), UniqueKeys)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("the configuration", str(file), "a YAML file", " ".join(str(error).split())) from None
    known(mapping(content, "the file"), ("http_options", "applications"), "")
    http = mapping(content.get("http_options"), "http_options")
    known(http, ("host", "port", "request_timeout_s"), "http_options.")
    # Serve's default is every address of the machine: too much to happen by leaving a line out.
    require("host" in http, "http_options.host", None, "an address to listen on", "127.0.0.1 is this machine alone")
    remedy = "it would cut long answers in the middle; gate.deadline_s bounds them"
    require(http.get("request_timeout_s") is None, "request_timeout_s", http.get("request_timeout_s"), "null", remedy)
    host = typed(str, http["host"], "http_options.host")
    port = typed(int, http.get("port", DEFAULT_PORT), "http_options.port")
    applications = content.get("applications")
    one = isinstance(applications, list) and len(applications) == 1
    require(one, "applications", applications, "a list of one application")
    application = mapping(applications[0], "applications.0")
    known(application, (*APPLICATION, "args"), "applications.0.")
    for name, value in APPLICATION.items():
        require(application.get(name) == value, f"applications.0.{name}", application.get(name), repr(value))
    config = from_args(application.get("args"), file.parent.resolve(), "applications.0.args")
    return dataclasses.replace(config, host=host, port=port)


def from_args(args: object, folder: Path | None = None, where: str = "args") -> ServeConfig:
    """The models and the gate of an application's `args`, as strictly read as a whole file.

    Relative paths are taken from `folder`; without one they are errors, as nobody knows where a replica will run.
    """
    given = mapping(args, where)
    known(given, ("models", "gate"), f"{where}.")
    models = mapping(given.get("models"), f"{where}.models")
    built = {}
    for name, fields in models.items():
        require(isinstance(name, str), f"{where}.models", name, "text for a name", "put it in quotes")
        built[name] = record(ServedModel, fields, f"{where}.models.{name}", folder)
    gate = record(GateSettings, given.get("gate", {}), f"{where}.gate", folder)
    try:
        return ServeConfig(models=built, gate=gate)
    except ConfigError as error:
        raise error.inside(where) from None


def write_config(config: ServeConfig, file: Path) -> None:
    """Write what `read_config` reads: absolute paths, and only what differs from the defaults."""
    args: dict[str, Any] = {"models": {name: settings(model) for name, model in config.models.items()}}
    if gate := settings(config.gate):
        args["gate"] = gate
    http = {"host": config.host, "port": config.port, "request_timeout_s": None}
    content = {"http_options": http, "applications": [{**APPLICATION, "args": args}]}
    write_atomically(file, HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def settings(one: ServedModel | GateSettings) -> dict[str, Any]:
    """Fields that differ from their defaults, as YAML holds them."""
    plain = {}
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            plain[field.name] = json.loads(json.dumps(value, default=lambda path: str(path.resolve())))
    return plain


def record(kind: type[T], given: object, where: str, folder: Path | None) -> T:
    """One of the frozen dataclasses from a mapping of its fields."""
    hints = get_type_hints(kind)
    fields = mapping(given, where)
    known(fields, hints, f"{where}.")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        optional = field.default is not dataclasses.MISSING or callable(field.default_factory)
        require(optional or field.name in fields, f"{where}.{field.name}", None, "a value: it has no default")
    values = {
        name: absolute(typed(hints[name], value, f"{where}.{name}"), f"{where}.{name}", folder)
        for name, value in fields.items()
    }
    try:
        return kind(**values)
    except ConfigError as error:
        raise error.inside(where) from None


def absolute(value: Any, where: str, folder: Path | None) -> Any:
    """`value` with the paths in it absolute."""
    if isinstance(value, dict):
        return {name: absolute(inner, f"{where}.{name}", folder) for name, inner in value.items()}
    if not isinstance(value, Path):
        return value
    remedy = "replicas run in folders of their own"
    require(folder is not None or value.is_absolute(), where, str(value), "an absolute path", remedy)
    return (folder or Path()) / value


def typed(kind: Any, value: object, where: str) -> Any:
    """`value` as a `kind`, by JSON's rules and no others: "4" is no number, 4.0 no count, "yes" no truth."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value, default=repr), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join([where, *map(str, problem["loc"])])
        raise ConfigError(place, problem["input"], problem["msg"].removeprefix("Input should be ")) from None


def mapping(value: object, where: str) -> Mapping[Any, Any]:
    require(isinstance(value, Mapping), where, value, "a mapping of settings")
    return value  # type: ignore[return-value]


def known(given: Mapping[Any, Any], names: Collection[str], where: str) -> None:
    """`ConfigError` for the first key that is not among `names`, with the nearest of them."""
    for key, value in given.items():
        near = difflib.get_close_matches(str(key), names, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"it would be ignored: there are {', '.join(names)}"
        require(key in names, f"{where}{key}", value, "no such setting", remedy)


class UniqueKeys(yaml.SafeLoader):
    """YAML without its habit to let the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
