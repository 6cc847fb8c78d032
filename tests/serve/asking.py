"""How tests of this room ask an engine without the gate."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from danube_ray.serve.engines import Delta, Engine, Sampling

PROMPT = [1, 300, 301, 302, 303]
GREEDY = Sampling(max_tokens=24, temperature=0)


def answer(engine: Engine, sampling: Sampling, prompt: Sequence[int] = PROMPT) -> list[Delta]:
    async def collect() -> list[Delta]:
        return [delta async for delta in engine.generate(prompt, sampling)]

    return asyncio.run(collect())


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)
