"""`danube chat` as it is used: in a terminal, and in a pipe, against a live gate with a real engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest

from danube_ray.cli.markdown import split_blocks
from danube_ray.config import ConfigError
from danube_ray.inference.http import ChatServer, Usage, chat
from danube_ray.serve.gate import create_app
from danube_ray.serve.llamacpp_engine import LlamaCppEngine
from danube_ray.serve.models import entry_of
from tests.serve.conftest import live
from tests.serve.tiny import tiny_served_model

QUESTION = "Which river is longer?"
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\a]*\a|[=>])")
GREEDY = ("--temperature", "0", "--repetition-penalty", "1")
DANUBE = str(Path(sys.executable).with_name("danube"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A live gate with the models `tiny` and `other`, over one engine."""
    served = tiny_served_model(tmp_path_factory.mktemp("served"))
    entry = entry_of(served)
    engine = LlamaCppEngine(served.weights, entry.context_tokens, served.num_slots, served.num_threads)
    with live(create_app({"tiny": entry, "other": replace(entry, context_tokens=64)}, lambda _: engine)) as url:
        yield url
    engine.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "danube" / "chats"


class Terminal:
    """`danube chat` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = pexpect.spawn(
            DANUBE, ["chat", *arguments], env=environment, encoding="utf-8", timeout=None, dimensions=(40, 100)
        )  # the test's own time limit ends a wait that is in vain

    def type(self, line: str) -> None:
        self.process.send(f"{line}\r")

    def until(self, text: str) -> str:
        """What was shown up to `text`, escape sequences left out."""
        self.process.expect_exact(text)
        return ESCAPES.sub("", self.process.before or "")

    def leave(self) -> int:
        self.type("/quit")
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus or 0


@pytest.fixture
def open_terminal(home: Path) -> Iterator[Callable[..., Terminal]]:
    """Opens terminals and closes them: one that a failed test left open would keep the gate from ending."""
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.process.close(force=True)


def ask(*arguments: str, piped: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([DANUBE, "chat", *arguments], input=piped, capture_output=True, text=True, check=False)


def test_one_question_is_answered_to_a_pipe(url: str):
    done = ask(QUESTION, "--url", url, *GREEDY, "--max-tokens", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == chat(url, "tiny", QUESTION, max_tokens=20).strip()
    with_text = ask(QUESTION, "--url", url, *GREEDY, "--max-tokens", "20", piped="The Danube.\n")
    whole = chat(url, "tiny", f"{QUESTION}\n\nThe Danube.", max_tokens=20)
    assert with_text.stdout.strip() == whole.strip(), "a question and piped text are one question"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--model", "huge"], "one that .* serves: tiny, other"), (["--temperature", "-1"], "temperature")],
)
def test_a_refused_question_is_one_line(url: str, arguments: list[str], said: str):
    done = ask(QUESTION, "--url", url, *arguments)
    assert done.returncode == 2 and re.search(said, done.stderr) and "Traceback" not in done.stderr


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match="a server that can be reached"):
        chat("http://127.0.0.1:9", "tiny", QUESTION)


def test_tokens_are_counted(url: str):
    usage = Usage()
    question = {"role": "user", "content": QUESTION}
    pieces = list(ChatServer(f"{url}/v1/").stream("tiny", [question], usage, max_tokens=12, top_k=1))
    assert len(pieces) > 0 and usage.completion_tokens == 12 and usage.finish_reason == "length"


def test_a_conversation_in_the_terminal(url: str, home: Path, open_terminal: Callable[..., Terminal]):
    terminal = open_terminal("--url", url, "--temperature", "0", "--max-tokens", "16")
    terminal.until("/help lists the commands")
    terminal.type("/model other")
    terminal.type("/model")
    terminal.until("* other")
    terminal.type("/model tiny")
    terminal.type(QUESTION)
    terminal.until("16 tokens")
    (file,) = home.glob("*.json")
    kept = json.loads(file.read_text())
    assert [turn["role"] for turn in kept["turns"]] == ["user", "assistant"] and kept["model"] == "tiny"
    terminal.type("/set temperature hot")
    terminal.until("allowed is a number")
    terminal.type("/set max_tokens 5")
    terminal.type("/retry")
    terminal.until("5 tokens")
    assert len(json.loads(file.read_text())["turns"]) == 2, "another answer takes the place of the first"
    terminal.type("/edit")
    terminal.process.send(" And wider?\r")
    terminal.until("5 tokens")
    assert json.loads(file.read_text())["turns"][0]["content"] == f"{QUESTION} And wider?"
    assert terminal.leave() == 0
    again = open_terminal("--url", url)
    again.until("/help lists")
    again.type("/open 1")
    again.until("And wider?")
    assert again.leave() == 0


def test_ctrl_c_stops_an_answer(url: str, open_terminal: Callable[..., Terminal]):
    """The answer would take minutes; it ends, is kept, and the next one comes: its slot was free."""
    terminal = open_terminal("--url", url, "--temperature", "0", "--max-tokens", "60000")
    terminal.until("/help lists")
    terminal.type(QUESTION)
    terminal.until(QUESTION)  # the terminal's echo; what follows is the answer
    terminal.process.expect(r"(?s).{2000}")
    terminal.process.sendintr()
    terminal.until("stopped")
    terminal.type("/set max_tokens 4")
    terminal.type("/retry")
    terminal.until("4 tokens")
    assert terminal.leave() == 0


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("one\n\ntwo", "one\n\n"),
        ("one", ""),
        ("```\na\n\nb", ""),
        ("```\na\n\nb\n```\n\nafter", "```\na\n\nb\n```\n\n"),
    ],
)
def test_only_blocks_that_cannot_change_are_printed(text: str, whole: str):
    assert split_blocks(text) == (whole, text[len(whole) :])
