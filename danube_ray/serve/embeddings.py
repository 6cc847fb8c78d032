"""Embeddings: a vector for each input."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence

from danube_ray.serve.engines import Engine
from danube_ray.serve.errors import ApiError
from danube_ray.serve.schema import EmbeddingRequest
from danube_ray.serve.shapes import EmbeddingList


async def embed(
    body: EmbeddingRequest, engine: Engine, prompts: Sequence[list[int]], adapter: str | None, at_once: int
) -> EmbeddingList:
    """The answer of `/v1/embeddings`; the engine has `at_once` inputs at a time."""
    vectors: list[list[float]] = []
    for start in range(0, len(prompts), at_once):
        several = (engine.embed(prompt, adapter) for prompt in prompts[start : start + at_once])
        vectors += await asyncio.gather(*several)
        if body.dimensions not in (None, len(vectors[0])):
            message = f"this model's embeddings have {len(vectors[0])} dimensions"
            raise ApiError(400, message, param="dimensions")
    num_tokens = sum(map(len, prompts))
    encode = _base64 if body.encoding_format == "base64" else list
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": encode(v)} for i, v in enumerate(vectors)],
        "model": body.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
