"""Engines: token ids in, pieces of text out. The gate speaks to this protocol and never learns what runs behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from danube_ray.config import ConfigError, require_positive

FinishReason = Literal["stop", "length"]

COALESCE_S = 0.02  # a message through Ray costs about 0.2 ms, most of it per message: 20 ms of tokens share one
LLAMA_LOG_ERRORS = 1
LLAMA_RANDOM_SEED = 2**32 - 1


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
    token seen so far, the prompt's too, as transformers does; 1 changes nothing. `logprobs` is how many of the likeliest
    tokens are told beside each drawn one (0: the drawn one alone; None: nothing). `json_schema` holds the answer to a
    schema (JSON text; "{}" is any object). `adapter` names the LoRA adapter to use.
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
    """One token and its log-probability (nats, before temperature); `top` are the likeliest at its place, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer: its text, and the tokens drawn so far. The last one has a `finish_reason`.

    `logprobs` are of the tokens that came with this piece, where `Sampling.logprobs` asks for them.
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


class LlamaCppEngine:
    """A GGUF file in llama.cpp's server, inside this process.

    `context_tokens` is what one answer may hold, prompt included. llama.cpp divides `n_ctx` by its slots, so it gets
    their product. Prompts are token ids: neither llama.cpp's template nor its tokenizer has a say. The key-value cache
    stays f16, the default: at head dims 80 and 120 a quantized one fails to start.
    """

    def __init__(self, gguf: Path, context_tokens: int, num_slots: int = 4, num_threads: int | None = None) -> None:
        from xllamacpp.xllamacpp import (
            CommonParams,
            Server,
        )  # 100 MB of shared object: loaded by who runs an engine, not by who reads this module

        self.context_tokens, self.num_slots = context_tokens, num_slots
        require_positive(self, "context_tokens", "num_slots")
        params = CommonParams()
        params.model.path = str(gguf)
        params.n_ctx = context_tokens * num_slots
        params.n_parallel = num_slots
        params.cpuparams.n_threads = num_threads or os.cpu_count() or 1
        params.fit_params = False  # would shrink the context to the memory it finds, without a word
        params.cache_ram_mib = 0  # the default keeps up to 8 GiB of old prompts
        params.verbosity = LLAMA_LOG_ERRORS
        # It always opens a port on loopback as well. Nobody learns this key, so nothing gets in past the gate.
        params.api_keys, params.ui, params.n_threads_http = [secrets.token_hex()], False, 1
        try:
            self._server = Server(params)
        except RuntimeError:
            raise ConfigError("gguf", str(gguf), "a GGUF file that llama.cpp loads", "its log says why") from None
        self._threads = ThreadPoolExecutor(num_slots, thread_name_prefix="llama.cpp")

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """Deltas of about 20 ms each; the first as soon as it is there."""
        answer = _Answer(asyncio.get_running_loop())
        payload = json.dumps(_completion(prompt, sampling, self.context_tokens))
        call = asyncio.wrap_future(self._threads.submit(self._server.handle_completions, payload, answer.put))
        call.add_done_callback(answer.end)
        try:
            while not answer.ended.is_set():
                await answer.arrived.wait()
                if delta := answer.take():
                    yield delta
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(answer.ended.wait(), COALESCE_S)
            if delta := answer.take():
                yield delta
            if not answer.finished:
                raise EngineError("the engine stopped without an end of the answer") from call.exception()
        finally:
            answer.cancelled.set()
            call.cancel()  # one that waits for a thread never starts; one that runs sees `cancelled` at its next token

    def close(self) -> None:
        """Unload the model; answers under way end early."""
        del self._server
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Answer:
    """What llama.cpp's thread hands over to the event loop: chunks as they come, and word that there are no more."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.arrived, self.ended = asyncio.Event(), asyncio.Event()
        self.cancelled = threading.Event()
        self.finished = False
        self._loop = loop
        self._chunks: list[str] = []
        self._num_tokens = 0

    def put(self, chunk: str) -> bool:
        """Called by llama.cpp for each chunk; True stops the answer and frees its slot."""
        if self.cancelled.is_set():
            return True
        self._chunks.append(chunk)
        self._loop.call_soon_threadsafe(self.arrived.set)
        return False

    def end(self, _: asyncio.Future[Any]) -> None:
        self.ended.set()
        self.arrived.set()

    def take(self) -> Delta | None:
        """Everything that came since the last call as one delta, or None where that is nothing to tell."""
        chunks, self._chunks = self._chunks, []
        self.arrived.clear()
        text, reason, tokens_before = "", None, self._num_tokens
        for chunk in map(json.loads, chunks):
            if error := chunk.get("error"):
                refused = 400 <= error.get("code", 500) < 500
                raise (EngineRejected if refused else EngineError)(error.get("message", "unknown error"))
            if "prompt_progress" in chunk:
                continue
            choice = chunk["choices"][0]
            text += choice["text"]
            reason = choice["finish_reason"]
            usage = chunk.get("usage")
            self._num_tokens = usage["completion_tokens"] if usage else self._num_tokens + 1
        self.finished = self.finished or reason is not None
        if not text and reason is None and self._num_tokens == tokens_before:
            return None
        return Delta(text, self._num_tokens, reason)


def _completion(prompt: Sequence[int], sampling: Sampling, context_tokens: int) -> dict[str, Any]:
    """llama.cpp's request. Samplers that nobody asked for (its defaults have top_k 40, min_p 0.05) are switched off."""
    request = {
        "prompt": list(prompt),
        "stream": True,
        "return_progress": True,  # so that a long prompt calls back too, and can be cancelled
        "n_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_last_n": context_tokens,
        "stop": list(sampling.stop),
    }
    if sampling.seed is not None:
        request["seed"] = sampling.seed % LLAMA_RANDOM_SEED
    return request
