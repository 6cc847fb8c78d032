from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI

from danube_ray.config import GateSettings
from danube_ray.serve.engines import Delta, Sampling
from danube_ray.serve.gate import ModelEntry
from danube_ray.serve.guard import Admission, Observer, Rescue, load_keys
from danube_ray.serve.metrics import Metrics
from tests.serve.conftest import RecordingEngine
from tests.serve.guarded import LONG, PAGE, SHORT, Gate, Lines, gate, keyed_gate


@pytest.fixture(scope="module")
def keyed(entry: ModelEntry, recorder: RecordingEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with keyed_gate(entry, recorder, tmp_path_factory.mktemp("keys")) as one:
        yield one


@pytest.fixture
def log() -> Iterator[Lines]:
    lines, access = Lines(), logging.getLogger("danube_ray.serve.access")
    access.addHandler(lines)
    access.setLevel(logging.INFO)
    yield lines
    access.setLevel(logging.NOTSET)
    access.removeHandler(lines)


# ---- what is told ----


@pytest.mark.parametrize("sane", ["a", "7f3c-12", "trace:0af7/1@b=+", "x" * 128])
def test_a_clients_name_for_its_request_is_kept(keyed: Gate, log: Lines, sane: str):
    name = f"{sane[:-3]}{id(log) % 1000:03}" if len(sane) > 3 else sane
    assert keyed.ask("GET", "/health", x_request_id=name)[1]["x-request-id"] == name
    assert log.of(f'"{name}"')["path"] == "/health"


@pytest.mark.parametrize("wild", ["", " ", "a b", "a\tb", '"}{"', "x" * 129, "\xfc", "<script>"])
def test_a_wild_name_is_replaced(keyed: Gate, wild: str):
    _, headers, _ = keyed.ask("GET", "/health", x_request_id=wild)
    assert re.fullmatch("req_[0-9a-f]{32}", headers["x-request-id"])
    assert len(headers.get_all("x-request-id") or []) == 1


def test_a_line_tells_what_happened_and_not_what_was_said(keyed: Gate, log: Lines):
    answer = keyed.client("alice").chat.completions.with_raw_response.create(**SHORT)
    line = log.of(answer.headers["x-request-id"])
    usage = answer.parse().usage
    assert usage and (line["prompt_tokens"], line["completion_tokens"]) == (usage.prompt_tokens, 4)
    told = {"caller": "alice", "method": "POST", "path": "/v1/chat/completions", "status": 200, "model": "tiny"}
    assert told.items() <= line.items() and line["error"] is None and line["stream"] is False
    assert 0 < line["first_token_s"] <= line["seconds"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    assert "river" not in str(log.lines) and keyed.secrets["alice"] not in str(log.lines)


def test_prompts_are_logged_where_somebody_asked_for_it(entry: ModelEntry, recorder: RecordingEngine, log: Lines):
    with gate(entry, recorder, GateSettings(log_prompts=True)) as one:
        answer = one.client("x").chat.completions.with_raw_response.create(**SHORT)
    line = log.of(answer.headers["x-request-id"])
    assert "Which river is longer?" in line["prompt"]
    assert (answer.parse().choices[0].message.content or "") in line["answer"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", {**SHORT, "model": "huge"}, 404, "model_not_found"),
        ("/v1/chat/completions", b"{", 400, "invalid_request_error"),
        ("/nowhere", {}, 404, "not_found_error"),
    ],
)
def test_a_refusal_is_told_with_its_reason(keyed: Gate, log: Lines, path: str, body: Any, status: int, code: str):
    authorization = f"Bearer {keyed.secrets['alice']}"
    got, headers, _ = keyed.ask("POST", path, body, authorization=authorization)
    line = log.of(headers["x-request-id"])
    assert (got, line["status"], line["error"], line["model"]) == (status, status, code, None)


def test_a_client_that_left_is_told_as_such(keyed: Gate, log: Lines, recorder: RecordingEngine):
    recorder.begun.clear()
    for stream in (True, False):
        body, name = json.dumps({**LONG, "stream": stream}).encode(), f"left-{stream}"
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: {name}"
        )
        head += f"\r\nauthorization: Bearer {keyed.secrets['alice']}\r\ncontent-length: {len(body)}\r\n\r\n"
        address = urlsplit(keyed.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + body)
            assert recorder.begun.wait(20)
            if stream:
                assert connection.recv(1)
        line = log.of(name)
        assert (line["error"], line["status"]) == ("client_closed_request", 200 if stream else 499)


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_request_that_is_ended_from_outside_is_told_as_left(log: Lines, sent: int):
    """Ray Serve cancels the request of a client that left, wherever it stands."""
    messages = [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": b"x", "more_body": True},
    ]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages[:sent]:
            await send(message)
        await asyncio.Event().wait()

    async def channel(*_: Any) -> Any: ...

    async def request() -> None:
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "app": FastAPI()}
        async with asyncio.timeout(0.01):
            await Observer(Rescue(app), Metrics(()), True)(scope, channel, channel)

    with pytest.raises(TimeoutError):
        asyncio.run(request())
    (line,) = map(json.loads, log.lines)
    assert (line["status"], line["error"]) == (200 if sent else 499, "client_closed_request")


# ---- what breaks ----


class BrokenEngine:
    """Says `deltas`, then fails in a way that nobody foresaw."""

    deltas: tuple[Delta, ...] = ()

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        for delta in self.deltas:
            yield delta
        raise ZeroDivisionError("the secret of the house")


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_foresaw_is_an_answer_too(
    entry: ModelEntry, log: Lines, stream: bool, caplog: pytest.LogCaptureFixture
):
    settings = GateSettings(concurrent_requests=1, cors_origins=(PAGE,))
    with gate(entry, BrokenEngine(), settings) as one:
        for _ in range(2):  # the second shows that the first gave back its place
            body = {**SHORT, "stream": stream}
            status, headers, answer = one.ask("POST", "/v1/chat/completions", body, origin=PAGE)
            assert (status, json.loads(answer)["error"]["code"]) == (500, "internal_error")
            assert b"secret" not in answer and headers["access-control-allow-origin"] == PAGE
            assert log.of(headers["x-request-id"])["error"] == "internal_error"
            assert headers["x-request-id"] in caplog.text and "the secret of the house" in caplog.text


def test_an_answer_that_breaks_gives_its_place_back(entry: ModelEntry, log: Lines):
    engine = BrokenEngine()
    engine.deltas = (Delta(" Hel", 1),)
    with gate(entry, engine, GateSettings(concurrent_requests=1)) as one:
        for number in range(2):
            body = {**SHORT, "stream": True}
            status, _, answer = one.ask("POST", "/v1/chat/completions", body, x_request_id=f"broken-{number}")
            assert status == 200 and b"Hel" in answer and b"[DONE]" not in answer
            assert log.of(f"broken-{number}")["error"] == "internal_error"


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_what_is_not_http_passes_untouched(kind: str):
    seen = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    async def channel(*_: Any) -> Any:
        raise AssertionError("nobody speaks")

    settings, metrics = GateSettings(), Metrics(())
    guarded = Observer(Rescue(Admission(app, load_keys(settings), settings, metrics)), metrics, True)
    scope = {"type": kind, "path": "/v1/chat/completions"}
    asyncio.run(guarded(scope, channel, channel))
    assert seen == [(scope, channel, channel)] and scope.keys() == {"type", "path"}
