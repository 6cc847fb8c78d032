from __future__ import annotations

from pathlib import Path

import pytest

from danube_ray.cli import main
from danube_ray.config import GateSettings, ServeConfig, ServedModel
from danube_ray.serve.files import read_config


def test_options_become_a_file_that_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("chat.gguf").touch()
    Path("polite").mkdir()
    options = ["--adapters", "polite=polite", "--num-slots", "8", "--min-replicas", "0", "--deadline-s", "60"]
    main(["serve", "chat.gguf", *options, "--port", "9000", "--write-config", "serve.yaml"])
    model = ServedModel(
        weights=tmp_path / "chat.gguf", adapters={"polite": tmp_path / "polite"}, num_slots=8, min_replicas=0
    )
    expected = ServeConfig(models={"chat": model}, gate=GateSettings(deadline_s=60), port=9000)
    assert read_config(Path("serve.yaml")) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "models is"),
        (["missing.gguf"], "of a file or folder that exists"),
        (["chat.gguf", "chat=chat.gguf"], "one path for 'chat'"),
        (["a=chat.gguf", "b=chat.gguf", "--adapters", "polite=polite"], "those of one model"),
        (["chat.gguf", "--num-slots", "0"], "num_slots"),
        (["--config", "serve.yaml", "--port", "9000"], "no models or options beside it"),
        (["chat.gguf", "--config", "serve.yaml"], "no models or options beside it"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
):
    monkeypatch.chdir(tmp_path)
    Path("chat.gguf").touch()
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
