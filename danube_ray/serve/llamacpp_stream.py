"""What is asked of llama.cpp for one answer, and what its chunks say."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from danube_ray.serve.engines import EngineError, EngineRejected, FinishReason, Sampling, TokenLogprob
from danube_ray.serve.json_grammar import UnsupportedSchema, grammar

RANDOM_SEED = 2**32 - 1  # llama.cpp's word for "draw one"


def request(prompt: Sequence[int], sampling: Sampling, context_tokens: int, adapters: Mapping[str, int]) -> str:
    """llama.cpp's request, as JSON. Samplers that nobody asked for (its defaults have top_k 40, min_p 0.05) are
    switched off, and every adapter but the chosen one is. `EngineRejected` for a schema or an adapter it can't have."""
    chosen = None if sampling.adapter is None else adapter_id(sampling.adapter, adapters)
    wanted: dict[str, Any] = {
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
        # Every adapter is named, those that must not act too: a slot that is asked with an empty list keeps what it
        # computed under another adapter.
        "lora": [{"id": number, "scale": float(number == chosen)} for number in adapters.values()],
    }
    if sampling.seed is not None:
        wanted["seed"] = sampling.seed % RANDOM_SEED
    if sampling.logprobs is not None:
        wanted |= {"n_probs": max(1, sampling.logprobs), "timings_per_token": True}
    if sampling.json_schema is not None:
        try:
            wanted["grammar"] = grammar(sampling.json_schema)
        except UnsupportedSchema as error:
            raise EngineRejected(str(error)) from None
    return json.dumps(wanted)


def adapter_id(name: str, adapters: Mapping[str, int]) -> int:
    if name not in adapters:
        raise EngineRejected(f"there is no adapter {name!r}")
    return adapters[name]


@dataclass
class Drawn:
    """A token as llama.cpp tells it. One whose text is but a part of a character it does not tell: id None."""

    id: int | None = None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()

    def told(self) -> TokenLogprob:
        assert self.id is not None
        return TokenLogprob(self.id, self.logprob, self.top)


@dataclass
class Taken:
    """Everything that came since the last look. `groups` are tokens with the bytes that they make together."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    groups: list[tuple[list[Drawn], bytes]] = field(default_factory=list)


class Answer:
    """What llama.cpp's thread hands over to the event loop: chunks as they come, and word that there are no more."""

    def __init__(self, top_logprobs: int | None) -> None:
        self.arrived, self.ended = asyncio.Event(), asyncio.Event()
        self.cancelled = threading.Event()
        self.begun = self.finished = False
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._chunks: list[str] = []
        self._awake = False
        self._num_tokens = 0
        self._top_logprobs = top_logprobs
        self._pending: list[Drawn] = []  # tokens whose text is held back: it may be the start of a stop text

    def run(self, complete: Callable[[str, Callable[[str], bool]], None], payload: str) -> None:
        """In a thread: llama.cpp's whole work on the answer."""
        self.begun = True
        try:
            if not self.cancelled.is_set():
                complete(payload, self.put)
        except Exception as error:
            self.error = error
        self.end()

    def put(self, chunk: str) -> bool:
        """Called by llama.cpp for each chunk; True stops the answer and frees its slot."""
        if self.cancelled.is_set():
            return True
        self._chunks.append(chunk)
        if not self._awake:  # waking the loop costs more than all the rest here: once until it has looked
            self._awake = True
            self._wake(self.arrived.set)
        return False

    def end(self) -> None:
        """From any thread: no more chunks will come."""
        self.cancelled.set()
        self._wake(self._end)

    def _end(self) -> None:
        self.ended.set()
        self.arrived.set()

    def _wake(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed, and so whoever read the answer is gone
            self.cancelled.set()

    def take(self) -> Taken | None:
        """Everything that came since the last call, or None where that is nothing to tell."""
        self._awake = False  # before the chunks are taken: one that comes between wakes the loop in vain, not never
        chunks, self._chunks = self._chunks, []
        if not self.ended.is_set():
            self.arrived.clear()
        taken, tokens_before = Taken(), self._num_tokens
        for chunk in map(json.loads, chunks):
            if error := chunk.get("error"):
                refused = 400 <= error.get("code", 500) < 500
                raise (EngineRejected if refused else EngineError)(error.get("message", "unknown error"))
            if "prompt_progress" in chunk:
                continue
            choice = chunk["choices"][0]
            if choice["logprobs"]:
                self._tell(choice["logprobs"]["content"][0], chunk["timings"]["predicted_n"], taken)
            taken.text += choice["text"]
            taken.finish_reason = choice["finish_reason"]
            usage = chunk.get("usage")
            self._num_tokens = usage["completion_tokens"] if usage else self._num_tokens + 1
        self.finished = self.finished or taken.finish_reason is not None
        taken.num_tokens = self._num_tokens
        if not taken.text and taken.finish_reason is None and self._num_tokens == tokens_before:
            return None
        return taken

    def _tell(self, token: dict[str, Any], num_tokens: int, taken: Taken) -> None:
        """A chunk's token, after those that were swallowed before it. A chunk with text has that of all before it."""
        top = tuple((other["id"], other["logprob"]) for other in token["top_logprobs"][: self._top_logprobs])
        self._pending += [Drawn() for _ in range(num_tokens - 1 - self._num_tokens)]
        self._pending.append(Drawn(token["id"], token["logprob"], top))
        self._num_tokens = num_tokens - 1  # `take` counts this one
        if token["bytes"]:
            taken.groups.append((self._pending, bytes(token["bytes"])))
            self._pending = []
