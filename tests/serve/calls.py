"""What tests of the gate have in common: requests that no client library would send, and engines that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from danube_ray.serve.engines import Delta, Sampling, TokenLogprob

HELLO: list[Any] = [{"role": "user", "content": "Which river is longer?"}]
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
JSON = {"content-type": "application/json"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 8, **fields}


def post(url: str, body: bytes | object, headers: dict[str, str] = JSON) -> tuple[int, dict[str, Any], Any]:
    """Status, headers and JSON of a POST of JSON, or of bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers)) as response:
            return response.status, dict(response.headers), json.load(response)
    except HTTPError as error:
        return error.code, dict(error.headers), json.load(error)


def stream(url: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, read from JSON where they are JSON."""
    with urlopen(Request(url, json.dumps({**body, "stream": True}).encode(), JSON)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.read().decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


class ScriptedEngine:
    """Yields what it is given; raises what is an exception; waits for ever at None."""

    def __init__(self, *script: Delta | Exception | None) -> None:
        self.script = script
        self.scores: list[TokenLogprob] = []

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            if step is None:
                await asyncio.Event().wait()
            else:
                yield step

    async def score(self, prompt: Sequence[int], top: int = 0, adapter: str | None = None) -> list[TokenLogprob]:
        return self.scores

    async def embed(self, prompt: Sequence[int], adapter: str | None = None) -> list[float]:
        raise NotImplementedError
