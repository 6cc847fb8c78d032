"""Engines: token ids in, pieces of text out. The gate speaks to this protocol and never learns what runs behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


class EngineError(RuntimeError):
    """The engine can't finish an answer it began, or can't begin it at all."""


class EngineBusy(EngineError):
    """Every slot and every place in the queue is taken: ask again later."""


class EngineRejected(EngineError):
    """The engine refuses this request; another try would end the same way."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw an answer. Temperature 0 takes the likeliest token; `seed` None draws a new one each time.

    `top_k` 0 leaves the vocabulary whole. `repetition_penalty` divides (or multiplies, below zero) the logits of every
    token seen so far, the prompt's too, as transformers does; 1 changes nothing. `logprobs` is how many of the
    likeliest tokens are told beside each drawn one (0: the drawn one alone; None: nothing). `json_schema` holds the
    answer to a schema (JSON text; "{}" is any object). `adapter` names the LoRA adapter to use.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    json_schema: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """One token and its log-probability (nats, before temperature); `top`: the likeliest at its place, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer: its text, and the tokens drawn so far. The last one has a `finish_reason`.

    `logprobs` are of the tokens whose text came with this piece, where `Sampling.logprobs` asks for them. The token
    that ends an answer is not told, nor those of a stop text or of bytes that make no character.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Engine(Protocol):
    """One model that answers. `generate` yields deltas, the last with a `finish_reason`, or raises `EngineError`;
    closing the generator early (a client that left) frees what the answer held."""

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]: ...

    async def score(self, prompt: Sequence[int], top: int = 0, adapter: str | None = None) -> list[TokenLogprob]:
        """Every token of the prompt but the first, given those before it, with the `top` likeliest at its place."""
        ...

    async def embed(self, prompt: Sequence[int], adapter: str | None = None) -> list[float]:
        """The prompt's last hidden states, their mean, at length 1; `EngineRejected` where the engine can't."""
        ...
