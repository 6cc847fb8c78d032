"""Configuration files: what is written is read, and nothing in them is ignored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from danube_ray.config import ConfigError, GateSettings, ServeConfig, ServedModel
from danube_ray.serve.files import from_args, read_config, write_config

SERVED = {"weights": "gguf/Q4_K_M.gguf", "num_slots": 8, "idle_s": 30, "adapters": {"poet": "lora/poet"}}
GOOD: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 9000, "request_timeout_s": None},
    "applications": [
        {
            "name": "danube",
            "route_prefix": "/",
            "import_path": "danube_ray.runtime.serving:build",
            "args": {"models": {"chat": SERVED}, "gate": {"deadline_s": 60, "cors_origins": ["https://a.example"]}},
        }
    ],
}


def written(folder: Path, content: object) -> Path:
    file = folder / "serve.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_a_file_says_what_is_served(tmp_path: Path):
    config = read_config(written(tmp_path, GOOD))
    model = ServedModel(
        weights=tmp_path / "gguf/Q4_K_M.gguf", num_slots=8, idle_s=30, adapters={"poet": tmp_path / "lora/poet"}
    )
    gate = GateSettings(deadline_s=60, cors_origins=("https://a.example",))
    assert config == ServeConfig(models={"chat": model}, gate=gate, port=9000)


def test_what_is_written_is_read(tmp_path: Path):
    model = ServedModel(
        weights=tmp_path / "größe.gguf", tokenizer_folder=tmp_path, min_replicas=0, adapters={"a": tmp_path / "a"}
    )
    gate = GateSettings(keys_file=tmp_path / "keys", cors_origins=("*",), requests_per_minute=9)
    config = ServeConfig(models={"chat": model, "plain": ServedModel(weights=tmp_path)}, gate=gate, host="::1", port=1)
    write_config(config, tmp_path / "serve.yaml")
    assert read_config(tmp_path / "serve.yaml") == config
    application = yaml.safe_load((tmp_path / "serve.yaml").read_text())["applications"][0]
    assert application["args"]["models"]["plain"] == {"weights": str(tmp_path)}, "defaults are left out"
    assert from_args(application["args"]).models == config.models, "and `serve deploy` can use it"


def changed(path: str, value: object) -> dict[str, Any]:
    """`GOOD` with one value set, or taken out where it is `...`."""
    content = copy.deepcopy(GOOD)
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    inner: Any = content
    for step in way:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return content


CHAT = "applications/0/args/models/chat"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("aplications", [], r"aplications is \[\], .*did you mean 'applications'\?"),
        ("logging_config", {}, "logging_config is .*it would be ignored: there are http_options, applications"),
        (
            "proxy_location",
            "EveryNode",
            "proxy_location is 'EveryNode', allowed is no such setting",
        ),
        ("http_options/prot", 1, r"http_options\.prot is 1, .*did you mean 'port'\?"),
        ("http_options/port", "9000", r"http_options\.port is '9000', allowed is a valid integer"),
        ("http_options/port", 2**16, "port is 65536"),
        ("http_options/host", ..., r"http_options\.host is None, .*127\.0\.0\.1 is this machine alone"),
        ("http_options/request_timeout_s", 30, "request_timeout_s is 30, allowed is null"),
        ("applications/0/deployments", [], r"applications\.0\.deployments is \[\], allowed is no such setting"),
        ("applications/0/import_path", "app:app", r"applications\.0\.import_path is 'app:app', .*serving:build"),
        ("applications/0/name", ..., r"applications\.0\.name is None, allowed is 'danube'"),
        ("applications/0/args/gates", {}, r"applications\.0\.args\.gates is {}, .*did you mean 'gate'"),
        ("applications/0/args/models", ..., r"applications\.0\.args\.models is None, allowed is a mapping"),
        ("applications/0/args/models", {}, r"applications\.0\.args\.models is {}, allowed is at least one model"),
        ("applications/0/args/models", {1.5: SERVED}, r"models is 1\.5, .*put it in quotes"),
        ("applications/0/args/gate/deadline", 3, r"args\.gate\.deadline is 3, .*did you mean 'deadline_s'"),
        ("applications/0/args/gate/deadline_s", 0, r"args\.gate\.deadline_s is 0.*greater than 0"),
        ("applications/0/args/gate/log_prompts", "yes", r"gate\.log_prompts is 'yes', allowed is a valid boolean"),
        ("applications/0/args/gate/cors_origins", "*", r"gate\.cors_origins is '\*', allowed is a valid (array|tuple)"),
        (f"{CHAT}/num_slot", 2, r"models\.chat\.num_slot is 2, .*did you mean 'num_slots'"),
        (f"{CHAT}/num_slots", "4", r"models\.chat\.num_slots is '4', allowed is a valid integer"),
        (f"{CHAT}/num_slots", True, r"models\.chat\.num_slots is True, allowed is a valid integer"),
        (f"{CHAT}/num_slots", 0, r"applications\.0\.args\.models\.chat\.num_slots is 0, allowed is greater than 0"),
        (f"{CHAT}/min_replicas", 2, r"models\.chat\.min_replicas is 2, allowed is 0 to max_replicas=1"),
        (f"{CHAT}/weights", ..., r"models\.chat\.weights is None, .*it has no default"),
        (f"{CHAT}/weights", 3, r"models\.chat\.weights is 3, allowed is a valid string"),
        (f"{CHAT}/adapters", ["lora"], r"models\.chat\.adapters is \['lora'\], allowed is .*(object|dictionary)"),
        (f"{CHAT}/adapters/poet", 4, r"models\.chat\.adapters\.poet is 4, allowed is a valid string"),
    ],
)
def test_what_would_be_ignored_or_misunderstood_is_one_clear_error(tmp_path: Path, path: str, value: object, said: str):
    with pytest.raises(ConfigError, match=said):
        read_config(written(tmp_path, changed(path, value)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text + text, "'http_options' is given twice.*|'applications' is given twice"),
        (lambda text: text.replace("num_slots: 8", "num_slots: 8\n        num_slots: 9"), "'num_slots' is given twice"),
        (lambda text: text.replace("host:", "host: ["), "allowed is a YAML file"),
        (lambda text: "", "the file is None, allowed is a mapping"),
        (lambda text: "- 1", r"the file is \[1\], allowed is a mapping"),
    ],
)
def test_broken_yaml_is_one_clear_error(tmp_path: Path, change: Callable[[str], str], said: str):
    with pytest.raises(ConfigError, match=said):
        read_config(written(tmp_path, change(yaml.safe_dump(GOOD))))


def test_a_missing_file_is_one_clear_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml.*No such file"):
        read_config(tmp_path / "none.yaml")


def test_relative_paths_mean_nothing_to_a_cluster():
    with pytest.raises(ConfigError, match=r"args\.models\.chat\.weights is 'gguf/Q4_K_M\.gguf', .*an absolute path"):
        from_args(GOOD["applications"][0]["args"])
