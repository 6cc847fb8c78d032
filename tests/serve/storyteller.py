"""An engine that says what a test tells it to, when the test lets it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from danube_ray.serve.engines import Delta, EngineRejected, Sampling, TokenLogprob


@dataclass
class Storyteller:
    """Tells `story` piece by piece, a token each. An exception in it is raised; None waits for `go`."""

    story: list[str | Exception | None] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)

    def tell(self, *story: str | Exception | None) -> None:
        self.story = list(story)
        self.go.clear()

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        for number, piece in enumerate(list(self.story), start=1):
            if isinstance(piece, Exception):
                raise piece
            elif piece is None:
                while not self.go.is_set():  # a thread that waits would outlive a client that left
                    await asyncio.sleep(0.005)
            else:
                yield Delta(piece, number)
        yield Delta("", len(self.story), "stop")

    async def score(self, prompt: Sequence[int], top: int = 0, adapter: str | None = None) -> list[TokenLogprob]:
        raise EngineRejected("a storyteller scores nothing")

    async def embed(self, prompt: Sequence[int], adapter: str | None = None) -> list[float]:
        raise EngineRejected("a storyteller embeds nothing")
