"""Live gates with their guard, as a client of them and a reader of their log see them."""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from danube_ray.config import GateSettings
from danube_ray.serve.gate import ModelEntry, create_app
from danube_ray.serve.keys import append, make_key
from tests.serve.conftest import RecordingEngine, live
from tests.waiting import wait_for

PAGE = "https://chat.example"
HELLO: list[Any] = [{"role": "user", "content": "Which river is longer?"}]
SHORT: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 4}
LONG: dict[str, Any] = {**SHORT, "max_tokens": 60_000, "stream": True}


class Lines(logging.Handler):
    """The access log, as it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def of(self, request_id: str) -> dict[str, Any]:
        """The one line of a request: it is written after the answer's last byte."""
        wait_for(lambda: any(request_id in line for line in self.lines))
        (line,) = [line for line in self.lines if request_id in line]
        return json.loads(line)


class Gate:
    """A live gate, as a client of it sees it."""

    def __init__(self, url: str, secrets: dict[str, str]) -> None:
        self.url, self.secrets = url, secrets

    def client(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.secrets.get(name, name), max_retries=0, timeout=20)

    def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body; header names are written with underscores."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        with closing(connection):
            connection.request(method, path, data, {"content-type": "application/json", **named})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def error(self, *arguments: Any, **headers: str) -> tuple[int, str]:
        status, _, body = self.ask(*arguments, **headers)
        return status, json.loads(body)["error"]["code"]


@contextmanager
def gate(entry: ModelEntry, engine: Any, settings: GateSettings) -> Iterator[Gate]:
    with live(create_app({"tiny": entry}, lambda _: engine, settings)) as url:
        yield Gate(url, {})


@contextmanager
def keyed_gate(entry: ModelEntry, recorder: RecordingEngine, folder: Path) -> Iterator[Gate]:
    """A gate with keys: alice may do everything, bob twice a minute, carol one thing at a time."""
    secrets = {}
    for name, limits in {"alice": {}, "bob": {"requests_per_minute": 2}, "carol": {"concurrent_requests": 1}}.items():
        secrets[name], key = make_key(name, **limits)
        append(folder / "keys", key)
    with gate(entry, recorder, GateSettings(keys_file=folder / "keys", cors_origins=(PAGE,))) as one:
        one.secrets = secrets
        yield one
