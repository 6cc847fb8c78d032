"""What stands in Serve's proxy, before gates that end their answers or don't."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danube_ray.serve.proxy import Threshold

STREAM = {
    "type": "http.response.start",
    "status": 200,
    "headers": [[b"content-type", b"text/event-stream; charset=utf-8"]],
}
DOCUMENT = {"type": "http.response.start", "status": 200, "headers": [[b"content-type", b"application/json"]]}


def before(app: ASGIApp) -> TestClient:
    return TestClient(Threshold(app), raise_server_exceptions=False)


def gate(*messages: Message) -> ASGIApp:
    """A gate that dies after these messages, as Serve's proxy shows it: it ends, and that is all."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(dict(message))

    return app


def body(text: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


def test_a_stream_that_breaks_off_ends_in_an_error_event():
    answer = before(gate(STREAM, body(b"data: 1\n\n", True))).get("/")
    first, second, rest = answer.text.split("\n\n")
    assert (answer.status_code, first, rest) == (200, "data: 1", "")
    assert json.loads(second.removeprefix("data: "))["error"]["code"] == "gate_unavailable"


def test_a_request_without_an_answer_gets_one():
    answer = before(gate()).get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "gate_unavailable"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ((STREAM, body(b"data: [DONE]\n\n", True), body(b"", False)), "data: [DONE]\n\n"),
        ((DOCUMENT, body(b"{}", False)), "{}"),
    ],
)
def test_whole_answers_pass_as_they_are(messages: Sequence[Message], text: str):
    answer = before(gate(*messages)).get("/")
    assert (answer.status_code, answer.text) == (200, text)


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        ("x-request-disconnect-disabled", "?1", False),
        ("X-Request-Timeout-Seconds", "0.1", False),
        ("x-request-id", "two words", False),
        ("x-request-id", "mine-1", True),
        ("authorization", "Bearer key", True),
    ],
)
def test_serve_takes_no_orders_from_strangers(name: str, value: str, passes: bool):
    seen: dict[bytes, bytes] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope["headers"])
        await gate(DOCUMENT, body(b"{}", False))(scope, receive, send)

    before(app).get("/", headers={name: value})
    assert (name.lower().encode() in seen) == passes
