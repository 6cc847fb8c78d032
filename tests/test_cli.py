"""The command line: instant help, every setting an option, one clear error for a wrong one."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch  # noqa: F401 (here, as its log handlers keep the stderr of the import: a captured one would be closed)

from danube_ray.cli import PRESET_VERBS, VERBS, main
from danube_ray.cli.training import Unprefixed
from danube_ray.config import RunConfig
from danube_ray.presets import PRESETS
from tests.benchmarks.nano import write_noise


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a call."""
    try:
        main(list(arguments))
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_option_says_what_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for verb in sorted(VERBS.keys() - {"quality"}):
        _, out, _ = run(capsys, verb, *["nano"] * (verb in PRESET_VERBS), "--help")
        lines = [line.strip("│ ") for line in out.splitlines()]
        for line, following in pairwise(lines):
            if line.startswith("--"):
                said = re.sub(r"\((default|required).*", "", f"{line}  {following}").partition("  ")[2]
                assert said.strip(), f"danube {verb} {line}"


def plain(text: str) -> str:
    """What was said, whatever the width and the boxes it was said in."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_noise(tmp_path_factory.mktemp("tokens") / "tokens", tokens_per_source=20_000)


def test_help_names_every_verb_without_loading_what_verbs_need():
    script = (
        "import sys; from danube_ray.cli import main; main(['--help']); "
        "print(sorted({'torch', 'ray', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert all(verb in done.stdout for verb in VERBS)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version_and_module():
    done = subprocess.run([sys.executable, "-m", "danube_ray", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"danube_ray {metadata.version('danube-ray')}\n"


def test_a_pipe_that_has_read_enough_ends_it_quietly():
    script = "import sys; from danube_ray.cli import main; main(['pretrain', 'nano', '--help'])"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-u", "-c", script], **pipes) as verb:
        verb.stdout.close()
        assert verb.stderr.read() == b"" and verb.wait() == 1


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "report", interrupted)
    status, _, err = run(capsys, "report")
    assert status == 130 and plain(err).startswith("danube report: interrupted") and "Traceback" not in err


def test_completion_knows_verbs_presets_and_options():
    script = """eval "$(%s -m danube_ray --completion)"
    danube() { %s -m danube_ray "$@"; }
    try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _danube; echo "${COMPREPLY[*]}"; }
    try danube pre; try danube plan danube3; try danube pretrain nano --optimizer.beta; try danube tokenize --voc
    """
    done = subprocess.run(
        ["bash", "-c", script.replace("%s", sys.executable)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "presets pretrain",
        "danube3_500m danube3_4b",
        "--optimizer.beta1 --optimizer.beta2",
        "",
    ], done.stderr


def test_presets_prints_parameters_and_stages(capsys):
    status, out, _ = run(capsys, "presets")
    assert status == 0 and all(name in out for name in PRESETS)
    for name in ("danube_1_8b", "danube3_500m", "danube3_4b"):
        assert f"{PRESETS[name]().model.num_parameters:,}" in out
    assert "web 90.6" in out and "16,384" in out


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(capsys, verb):
    preset = ["nano"] if verb in PRESET_VERBS else []
    status, out, _ = run(capsys, verb, *preset, "--help")
    assert status == 0 and "--" in out and f"danube {verb}" in out


def test_any_field_of_a_preset_can_be_overridden(monkeypatch):
    runs = []
    settings = ["--stages.1.shares", "crawl=7,books=3", "--stages.0.tokens", "8192", "--model.sliding-window", "64"]

    def verb(run: Unprefixed[RunConfig]) -> None:
        runs.append(run)

    monkeypatch.setitem(PRESET_VERBS, "pretrain", verb)
    main(["pretrain", "nano", *settings, "--loop.no-deterministic", "--optimizer.beta2", "0.99"])
    (run,) = runs
    assert run.stages[1].shares == {"crawl": 7, "books": 3} and run.stages[0].tokens == 8192
    assert run.model.sliding_window == 64 and run.optimizer.beta2 == 0.99
    assert run.stages[2] == PRESETS["nano"]().stages[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stages.0.shares", "crawl=1"], "source 'crawl' of stage 'broad'"),
        (["--model.vocab-size", "4096"], "the model's 4096"),
        (["--max-epochs", "0.5"], "give it more text, lower its share"),
        (["--global-batch-tokens", "5000"], "a divisor of global_batch_tokens=5000"),
    ],
)
def test_a_run_that_its_data_cannot_feed_is_refused_before_anything_starts(capsys, tokens, tmp_path, options, said):
    where = ["--tokens-dir", str(tokens), "--output-dir", str(tmp_path)]
    status, out, err = run(capsys, "pretrain", "nano", *where, *options)
    assert status == 2 and said in plain(out + err)
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_full_disk_is_one_error_before_anything_starts(capsys, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    options = ["--tokens-dir", str(tokens), "--output-dir", str(tmp_path), "--max-epochs", "100"]
    status, out, err = run(capsys, "pretrain", "nano", *options)
    assert status == 2 and "make room, or choose a folder on another disk" in plain(out + err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrian"], "verb is 'pretrian', allowed is one of demo, presets"),
        (["pretrian"], "perhaps pretrain"),
        (["pretrain", "danube_2b"], "preset is 'danube_2b', allowed is one of danube_1_8b"),
        (["plan", "nanno"], "perhaps nano"),
        (["pretrain", "nano", "--stages.0.shares", "web"], "'web' is not of the form NAME=INTEGER"),
        (["curate", "web=/", "--rule-sets", "web"], "'web' is not of the form NAME=NAME"),
        (["pretrain", "nano", "--optimizer.learning-rate", "-1"], "learning_rate is -1.0"),
        (["pretrain", "nano", "--loop.precision", "fp64"], "Expected one of"),
        (["pretrain", "nano", "--model.num-kv-heads", "3"], "num_kv_heads is 3, allowed is a divisor of num_heads=4"),
        (["pretrain", "nano", "--stages.0.sequence-length", "384"], "is 384"),
        (["pretrain", "nano", "--stages.1.shares", "web=3,wiki=-2"], "positive integers"),
        (["pretrain", "nano", "--tokens-dir", "/nowhere"], "tokens_dir is '/nowhere'"),
        (["curate", "web"], "argument is 'web', allowed is NAME=PATH"),
        (["curate", "web=/nowhere"], "allowed is a path that exists"),
        (["tokenize", "--documents", "/nowhere"], "/nowhere"),
        (["sft", "--name", "x", "--base", "/nowhere", "--data", "/nowhere"], "/nowhere"),
        (["dpo", "--name", "x", "--base", "b", "--data", "d", "lora:none"], "frozen base under the adapters"),
        (["evaluate", "/nowhere"], "--tasks and --tokens"),
        (["evaluate", "/", "--tokens", "/"], "a Hugging Face folder, with its config.json"),
        (["demo", "--out", "/"], "/ holds something else, which would be lost"),
        (["demo", "--text", "/nowhere"], "--text is '/nowhere'"),
        (["quantize", "/nowhere", "--tokens", "/nowhere", "--levels", "Q9"], "Q9"),
        (["serve", "chat=/nowhere.gguf"], "of a file or folder that exists"),
        (["export", "/nowhere", "--tokenizer", "/nowhere", "--out", "/nowhere"], "the folder of a run"),
        (
            ["remap", "/nowhere", "--new-tokenizer", "/nowhere", "--out", "/nowhere"],
            "/nowhere/config.json does not exist",
        ),
        (["chat", "hello", "--model", "m", "--url", "http://127.0.0.1:9"], "a server that can be reached"),
        (["report", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_error_that_names_it(capsys, arguments, said):
    status, out, err = run(capsys, *arguments)
    told = plain(out + err)
    assert status == 2 and said in told and "Traceback" not in told
