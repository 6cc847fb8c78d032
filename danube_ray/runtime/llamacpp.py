"""llama.cpp on CPUs, as Serve runs it. A replica's process imports this, and nothing of the gate: who asks an unloaded
model waits for every import."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory

from danube_ray.config import ServedModel
from danube_ray.quantize.adapter import convert_adapters
from danube_ray.serve.engines import Delta, Sampling, TokenLogprob
from danube_ray.serve.llamacpp_engine import LlamaCppEngine


class LlamaCppReplica:
    """A deployment's replica: one engine, fed through Serve, which cancels what the gate lets go of."""

    def __init__(self, model: ServedModel, context_tokens: int) -> None:
        began = time.perf_counter()
        self._adapters = TemporaryDirectory(prefix="danube-adapters-")  # llama.cpp's form of them, while it runs
        adapters = convert_adapters(model.adapters, model.weights, Path(self._adapters.name))
        self._engine = LlamaCppEngine(model.weights, context_tokens, model.num_slots, model.num_threads, adapters)
        self._load_s = time.perf_counter() - began

    async def load_s(self) -> float:
        """How long loading took."""
        return self._load_s

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._engine.generate(prompt, sampling)) as deltas:
            async for delta in deltas:
                yield delta

    async def score(self, prompt: list[int], top: int, adapter: str | None) -> list[TokenLogprob]:
        return await self._engine.score(prompt, top, adapter)

    async def embed(self, prompt: list[int], adapter: str | None) -> list[float]:
        return await self._engine.embed(prompt, adapter)
