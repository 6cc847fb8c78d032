"""llama.cpp as an engine: its server generates many answers at once, inside this process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from danube_ray.config import ConfigError, require, require_positive
from danube_ray.inference.gguf import GgufModel, Interrupted
from danube_ray.serve.engines import Delta, EngineError, EngineRejected, Sampling, TokenLogprob
from danube_ray.serve.llamacpp_stream import Answer, Drawn, adapter_id, request

T = TypeVar("T")
COALESCE_S = 0.02  # a message through Ray costs about 0.2 ms, most of it per message: 20 ms of tokens share one
BATCH_TOKENS = 64  # of a prompt between two looks at who left, and two tokens of other answers; fewer is slower
LOG_ERRORS = 1
SIGNAL_BYTES = 256  # at least a `struct sigaction`, on any Linux or macOS


class LlamaCppEngine:
    """A GGUF file in llama.cpp's server, inside this process.

    `context_tokens` is what one answer may hold, prompt included. llama.cpp divides `n_ctx` by its slots, so it gets
    their product. Prompts are token ids: neither llama.cpp's template nor its tokenizer has a say. The key-value cache
    stays f16, the default: at head dims 80 and 120 a quantized one fails to start. `adapters` are GGUF files by name
    (`danube_ray.quantize.adapter` makes them), which must stay until `close`. Pieces come `coalesce_s` apart.

    Scores and embeddings, which the server has not, come from a second model over the same file, loaded when first
    asked for. It maps the weights, so it costs its key-value cache and little more.
    """

    def __init__(
        self,
        gguf: Path,
        context_tokens: int,
        num_slots: int = 4,
        num_threads: int | None = None,
        adapters: Mapping[str, Path] | None = None,
        coalesce_s: float = COALESCE_S,
    ) -> None:
        # 100 MB of shared object: loaded by who runs an engine, not by who reads this module
        from xllamacpp.xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

        self.context_tokens, self.num_slots = context_tokens, num_slots
        require_positive(self, "context_tokens", "num_slots")
        self._gguf, self._adapters, self._coalesce_s = gguf, dict(adapters or {}), coalesce_s
        for file in (gguf, *self._adapters.values()):
            require(file.is_file(), "GGUF file", str(file), "an existing file")
        self._adapter_ids = {name: number for number, name in enumerate(self._adapters)}
        self._num_threads = num_threads or os.cpu_count() or 1
        params = CommonParams()
        params.model.path = str(gguf)
        params.n_ctx = context_tokens * num_slots
        params.n_parallel = num_slots
        params.n_batch = params.n_ubatch = max(BATCH_TOKENS, num_slots)
        params.cpuparams.n_threads = self._num_threads
        params.fit_params = False  # would shrink the context to the memory it finds, without a word
        params.cache_ram_mib = 0  # the default keeps up to 8 GiB of old prompts
        params.verbosity = LOG_ERRORS
        params.lora_adapters = [CommonAdapterLoraInfo(str(file), 0.0) for file in self._adapters.values()]
        params.lora_init_without_apply = True
        # It always opens a port on loopback as well. Nobody learns this key, so nothing gets in past the gate.
        params.api_keys, params.ui, params.n_threads_http = [secrets.token_hex()], False, 1
        try:
            with signal_handlers_kept():
                self._server = Server(params)
        except RuntimeError:
            raise ConfigError("gguf", str(gguf), "a GGUF file that llama.cpp loads", "its log says why") from None
        self._answers: set[Answer] = set()
        self._threads = ThreadPoolExecutor(num_slots, thread_name_prefix="llama.cpp")
        self._model: GgufModel | None = None
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp scores")
        self._closed = threading.Event()

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """Deltas of about `coalesce_s` each; the first as soon as it is there."""
        payload = request(prompt, sampling, self.context_tokens, self._adapter_ids)
        answer, ids = Answer(sampling.logprobs), list(prompt)
        call = self._begin(answer, payload)
        try:
            while not answer.finished:
                await answer.arrived.wait()
                ended = answer.ended.is_set()  # before the last look: nothing comes after
                if taken := answer.take():
                    logprobs = await self._logprobs(taken.groups, ids, sampling) if taken.groups else ()
                    yield Delta(taken.text, taken.num_tokens, taken.finish_reason, logprobs)
                if ended and not answer.finished:
                    raise EngineError("the engine stopped without an end of the answer") from answer.error
                if taken:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._coalesce_s):
                            await answer.ended.wait()
        finally:
            answer.cancelled.set()
            call.cancel()  # one that waits for a thread never starts; one that runs sees `cancelled` at its next token

    async def score(self, prompt: Sequence[int], top: int = 0, adapter: str | None = None) -> list[TokenLogprob]:
        """As `Engine.score` says, one prompt after the other; the context bounds the prompt."""
        ids = list(prompt)
        found = await self._ask(lambda model, stop: model.score(ids, top, stop=stop), adapter)
        return [TokenLogprob(*told) for told in zip(ids[1:], found.log_probs.tolist(), found.pairs(), strict=True)]

    async def embed(self, prompt: Sequence[int], adapter: str | None = None) -> list[float]:
        ids = list(prompt)
        return (await self._ask(lambda model, stop: model.embed(ids, stop=stop), adapter)).tolist()

    def stats(self) -> dict[str, int]:
        """How many slots there are, how many of them answer, and how many answers wait for one."""
        answers = list(self._answers)
        busy = sum(answer.begun for answer in answers)
        return {"slots": self.num_slots, "busy": busy, "queued": len(answers) - busy}

    def close(self) -> None:
        """Unload the model; answers under way end with an error. Returns when llama.cpp has ended, within a batch."""
        if self._closed.is_set():
            return
        self._closed.set()
        for answer in list(self._answers):
            answer.end()
        for threads in (self._threads, self._model_thread):
            threads.shutdown()  # what waits there ends at once: it is told first
        if self._model is not None:
            self._model.close()
        del self._server

    def _begin(self, answer: Answer, payload: str) -> Future[None]:
        try:
            call = self._threads.submit(answer.run, lambda *args: self._server.handle_completions(*args), payload)
        except RuntimeError:
            raise EngineError("the engine is closed") from None
        self._answers.add(answer)
        call.add_done_callback(lambda _: self._answers.discard(answer))
        return call

    async def _logprobs(
        self, groups: list[tuple[list[Drawn], bytes]], ids: list[int], sampling: Sampling
    ) -> tuple[TokenLogprob, ...]:
        """What is told of the tokens in `groups`, which follow `ids` and are added to them; `ids` are emptied, and
        swallowed tokens no longer told, once one was swallowed that can't be named."""
        if ids and any(token.id is None for tokens, _ in groups for token in tokens):
            top = sampling.logprobs or 0
            named = await self._ask(lambda model, stop: spell(groups, ids, model, top, stop), sampling.adapter)
            if not named:
                ids.clear()
        told = tuple(token.told() for tokens, _ in groups for token in tokens if token.id is not None)
        if ids:
            ids += [token.id for token in told]
        return told

    async def _ask(self, work: Callable[[GgufModel, Callable[[], bool]], T], adapter: str | None) -> T:
        """`work` with the second model, in its thread. It is told to stop when nobody waits for it any more."""
        if adapter is not None:
            adapter_id(adapter, self._adapter_ids)
        left = threading.Event()

        def stop() -> bool:
            return left.is_set() or self._closed.is_set()

        def run() -> T:
            if stop():
                raise Interrupted
            model = self._loaded()
            model.use_adapter(adapter)
            try:
                return work(model, stop)
            except ConfigError as error:
                raise EngineRejected(str(error)) from None

        try:
            return await asyncio.get_running_loop().run_in_executor(self._model_thread, run)
        except EngineError:
            raise
        except (ConfigError, RuntimeError) as error:  # the last: llama.cpp's, `Interrupted`, or the thread has ended
            raise EngineError("the engine is closed" if self._closed.is_set() else str(error)) from error
        finally:
            left.set()

    def _loaded(self) -> GgufModel:
        if self._model is None:
            self._model = GgufModel(
                self._gguf,
                context_length=self.context_tokens,
                num_threads=self._num_threads,
                adapters=self._adapters,
                decode_tokens=BATCH_TOKENS,
            )
        return self._model


def spell(
    groups: list[tuple[list[Drawn], bytes]], ids: Sequence[int], model: GgufModel, top: int, stop: Callable[[], bool]
) -> bool:
    """Fill in the tokens that llama.cpp swallowed because each was but a byte of a character: their ids from the bytes
    of the text that they made, their log-probabilities by asking again. `groups` follow `ids`.

    False where it swallowed others: behind bytes that make no character it does so with whole pieces, unknown ones.
    """
    whole, swallowed = list(ids), []
    for tokens, text in groups:
        place = 0
        for token in tokens:
            if token.id is None:
                name = model.byte_ids.get(text[place]) if place < len(text) and text[place] >= 0x80 else None
                if name is None:
                    return False
                swallowed.append((len(whole), name, token))
                whole.append(name)
                place += 1
            else:
                whole.append(token.id)
                place += len(model.piece(token.id))
        if place != len(text) and any(token.id is None for token in tokens):
            return False
    first = swallowed[0][0]
    scores = model.score(whole, top, first=first, stop=stop)
    tops = scores.pairs()
    for place, name, token in swallowed:
        token.id, token.logprob, token.top = name, float(scores.log_probs[place - first]), tops[place - first]
    return True


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """llama.cpp's server takes over SIGINT and SIGTERM of its process; what was there comes back after the block."""
    sigaction = ctypes.CDLL(None).sigaction
    kept = {number: ctypes.create_string_buffer(SIGNAL_BYTES) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, action in kept.items():
        sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in kept.items():
            sigaction(number, action, None)
