"""Engines that fail, clients that leave or don't read: the answer ends as it should, and nothing stays behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from danube_ray.config import GateSettings
from danube_ray.serve.engines import Delta, EngineBusy, EngineError, EngineRejected
from danube_ray.serve.gate import ModelEntry, create_app
from tests.serve.calls import CHAT, COMPLETIONS, ScriptedEngine, chat, post, stream
from tests.serve.conftest import RecordingEngine, live

MINUTES = 60_000  # tokens


@pytest.fixture
def scripted(entry: ModelEntry) -> Iterator[tuple[str, list[Any]]]:
    engines: list[Any] = []
    with live(create_app({"tiny": entry}, lambda _: engines[-1], GateSettings(deadline_s=0.2))) as url:
        yield url, engines


@contextmanager
def connected(url: str, path: str, body: dict[str, Any], receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection on which `body` has been sent and nothing been read."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    address = urlsplit(url)
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((address.hostname, address.port))
        connection.sendall(head.encode() + data)
        yield connection


@pytest.mark.parametrize("failure", [EngineError("lost"), ValueError("a bug")])
@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_in_mid_stream_is_an_error_event(scripted: tuple[str, list[Any]], failure: Exception, n: int):
    url, engines = scripted
    engines.append(ScriptedEngine(Delta(" Hel", 1), Delta("lo", 2), failure))
    *chunks, last = stream(url + CHAT, chat(n=n))
    said = [chunk["choices"][0]["delta"]["content"] for chunk in chunks if chunk["choices"][0]["index"] == 0]
    assert "".join(said) == "Hello"
    code = "engine_unavailable" if isinstance(failure, EngineError) else "internal_error"
    assert last["error"]["code"] == code and last["error"].keys() == {"message", "type", "param", "code"}
    assert "a bug" not in last["error"]["message"]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "retry_after", "code"),
    [
        (EngineBusy("full"), 503, "1", "engine_busy"),
        (EngineError("gone"), 503, "5", "engine_unavailable"),
        (EngineRejected("no such token"), 400, None, "engine_rejected"),
        (ValueError("a bug"), 500, None, "internal_error"),
    ],
)
def test_an_engine_that_cannot_begin_is_a_status(
    scripted: tuple[str, list[Any]], failure: Exception, status: int, retry_after: str | None, code: str, streams: bool
):
    url, engines = scripted
    engines.append(ScriptedEngine(failure))
    got, headers, answer = post(url + CHAT, chat(stream=streams))
    assert (got, headers.get("retry-after"), answer["error"]["code"]) == (status, retry_after, code)


@pytest.mark.parametrize("n", [1, 2])
def test_the_deadline_ends_an_answer(scripted: tuple[str, list[Any]], n: int):
    url, engines = scripted
    engines.append(RecordingEngine(ScriptedEngine(None)))
    status, _, answer = post(url + CHAT, chat(n=n))
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert engines[-1].ended.is_set()
    status, _, answer = post(url + CHAT, chat(n=n, stream=True))
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded"), "nothing had been sent"
    engines.append(RecordingEngine(ScriptedEngine(Delta("Hello", 1), None)))
    *_, last = stream(url + CHAT, chat(n=n))
    assert last["error"]["code"] == "deadline_exceeded"
    assert engines[-1].ended.is_set()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("streams", "n"), [(False, 1), (True, 1), (True, 2)])
def test_a_client_that_leaves_frees_its_slot(url: str, recorder: RecordingEngine, streams: bool, n: int, path: str):
    recorder.begun.clear()
    asked = chat() if path == CHAT else {"model": "tiny", "prompt": "The Danube"}
    with connected(url, path, {**asked, "max_tokens": MINUTES, "stream": streams, "n": n}) as connection:
        assert recorder.begun.wait(20)
        if streams:
            assert connection.recv(1)
    assert recorder.idle.wait(20), "60,000 tokens take minutes: these answers were to end with their client"


class Flood:
    """An engine with far more to say than any buffer holds, which counts what was taken of it."""

    def __init__(self) -> None:
        self.said = 0

    async def generate(self, prompt: Any, sampling: Any) -> Any:
        while True:
            self.said += 1
            yield Delta("x" * 10_000, self.said)


def test_a_client_that_does_not_read_is_kept_little_for_and_frees_its_slot(scripted: tuple[str, list[Any]]):
    url, engines = scripted
    flood = Flood()
    engines.append(RecordingEngine(flood))  # type: ignore[arg-type]
    with connected(url, CHAT, chat(stream=True), receive_buffer=4096):
        assert engines[-1].ended.wait(20), "the deadline must free the slot though the last chunk can't be sent"
        assert flood.said * 10_000 < 20e6, "sockets hold some megabytes; more must not have been drawn"
    engines.append(ScriptedEngine(Delta("Hello", 1, "stop")))
    assert post(url + CHAT, chat())[0] == 200
