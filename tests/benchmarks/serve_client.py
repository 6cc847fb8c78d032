"""Clients of an OpenAI-compatible server, lean enough not to be what is measured: sockets and a search for a few bytes.

A process of its own, beside both servers. It reads one `Load` a line from stdin, as JSON, and prints an `Outcome`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True)
class Load:
    """`clients` at the same time, each asking `requests` times for `max_tokens` tokens, one after the other."""

    port: int
    model: str
    clients: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Outcome:
    """What the clients saw. `statuses` counts answers by HTTP status, "broken" those that ended without [DONE]."""

    seconds: float
    tokens: int
    first_token_s: list[float]
    statuses: dict[str, int]
    cpu_share: float  # of one core, used by the clients themselves

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


async def ask(load: Load, draw: random.Random) -> tuple[str, float, int]:
    """One answer, streamed over a connection of its own: its status, seconds to the first token, and tokens.

    The bare server breaks connections that are used again after a stream, so neither gets a chance to.
    """
    prompt = [1, *(draw.randrange(10, load.vocab_size) for _ in range(load.prompt_tokens - 1))]
    request: dict[str, Any] = {"model": load.model, "prompt": prompt, "max_tokens": load.max_tokens, "temperature": 0}
    body = json.dumps({**request, "stream": True, "stream_options": {"include_usage": True}}).encode()
    headers = ("POST /v1/completions HTTP/1.1", "Host: bench", "Content-Type: application/json", "Connection: close")
    head = "\r\n".join((*headers, f"Content-Length: {len(body)}", "", "")).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    try:
        writer.write(head + body)
        status = (await reader.readline()).split()[1].decode()
        received, first_s = b"", 0.0
        while piece := await reader.read(65_536):
            received += piece
            if not first_s and b"data: " in received:
                first_s = time.perf_counter() - began
    finally:
        writer.close()
    whole = b"data: [DONE]" in received
    tokens = int(USAGE.findall(received)[-1]) if whole else 0
    return status if whole or status != "200" else "broken", first_s, tokens


async def client(load: Load, seed: int) -> list[tuple[str, float, int]]:
    draw = random.Random(seed)
    return [await ask(load, draw) for _ in range(load.requests)]


async def run(load: Load, seed: int) -> Outcome:
    began, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(client(load, seed * 1_000 + index) for index in range(load.clients)))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    flat = [answer for answers_of_one in answers for answer in answers_of_one]
    return Outcome(
        seconds,
        sum(tokens for _, _, tokens in flat),
        [first_s for status, first_s, _ in flat if status == "200"],
        dict(Counter(status for status, _, _ in flat)),
        cpu_s / seconds,
    )


class Clients:
    """The process, from the side of the benchmark."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.serve_client"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, load: Load) -> Outcome:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(asdict(load)), file=self.process.stdin, flush=True)
        return Outcome(**json.loads(self.process.stdout.readline()))

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()


if __name__ == "__main__":
    for seed, line in enumerate(sys.stdin):
        print(json.dumps(asdict(asyncio.run(run(Load(**json.loads(line)), seed)))), flush=True)
