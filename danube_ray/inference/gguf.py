"""A GGUF file run by llama.cpp: logits of whole prompts, and generation of one sequence with exact token ids.

This is for measuring; serving many streams at once is llama.cpp's server, in `danube_ray.serve`. Both compute with the
same kernels and the default 16-bit key-value cache, so what is measured here is what is served.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from danube_ray.config import ConfigError, require, require_positive
from danube_ray.inference.llamacpp import library
from danube_ray.inference.scoring import log_softmax

DECODE_TOKENS = 512  # tokens a call of llama.cpp: bounds its logits buffer at 512 * V floats


class GgufModel:
    """A `LanguageModel` over a GGUF file; a context manager, or `close` it. One sequence at a time, one thread of use.

    `context_length` None takes the file's. `ConfigError` when llama.cpp can't load the file.
    """

    def __init__(self, path: Path, *, context_length: int | None = None, num_threads: int = 1) -> None:
        self.num_threads = num_threads
        require_positive(self, "num_threads")
        require(path.is_file(), "GGUF file", str(path), "an existing file")
        self._context = None
        self._llama = llama = library()
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            raise ConfigError("GGUF file", str(path), "one that llama.cpp loads", "its message above says why")
        vocabulary = llama.llama_model_get_vocab(self._model)
        self.vocab_size: int = llama.llama_vocab_n_tokens(vocabulary)
        self.eos_id: int = llama.llama_vocab_eos(vocabulary)
        trained_context = llama.llama_model_n_ctx_train(self._model)
        self.context_length = context_length or trained_context
        try:
            allowed = f"1 to {trained_context}, which the model was trained for"
            require(0 < self.context_length <= trained_context, "context_length", self.context_length, allowed)
            self._context = self._new_context(path)
        except ConfigError:
            self.close()
            raise

    def _new_context(self, path: Path) -> int:
        params = self._llama.llama_context_default_params()
        self._decode_tokens = min(DECODE_TOKENS, self.context_length)
        params.n_ctx, params.n_batch, params.n_ubatch = self.context_length, self._decode_tokens, self._decode_tokens
        context = self._llama.llama_init_from_model(self._model, params)
        if not context:
            raise ConfigError("GGUF file", str(path), f"one that fits in memory with {self.context_length} tokens")
        self._llama.llama_set_n_threads(context, self.num_threads, self.num_threads)
        return context

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits at every position of one sequence: (T, V) float32."""
        return np.concatenate(list(self._prefill(ids)))

    def log_probs(self, batch: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability (nats) of every token but the first of each sequence: (T - 1,) float32 each."""
        return [self._score(ids) for ids in batch]

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> list[int]:
        """New ids after the prompt, as `LanguageModel.generate` says; ends early where the context is full."""
        random = np.random.default_rng(seed)
        seen, answer = set(ids), []
        *_, last = self._prefill(ids)
        logits = last[-1]
        for position in range(len(ids), min(len(ids) + max_tokens, self.context_length)):
            token = _choose(logits, seen, temperature, repetition_penalty, random)
            if token == self.eos_id:
                break
            answer.append(token)
            seen.add(token)
            logits = self._decode([token], position)[0]
        return answer

    def tokens_per_second(self, num_tokens: int = 64) -> float:
        """Speed of decoding `num_tokens` one after the other behind a prompt of one token, sampling left out."""
        num_tokens = min(num_tokens, self.context_length - 2)
        self.logits([self.eos_id] * 2)  # touches every weight once: pages come in from disk
        started = time.perf_counter()
        for position in range(2, 2 + num_tokens):
            self._decode([self.eos_id], position)
        return num_tokens / (time.perf_counter() - started)

    def close(self) -> None:
        """Free llama.cpp's memory; the model can't be used after."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _score(self, ids: Sequence[int]) -> np.ndarray:
        scores, start = [], 0
        for logits in self._prefill(ids):
            labels = np.asarray(ids[start + 1 : start + 1 + len(logits)], dtype=np.int64)
            scores.append(log_softmax(logits)[np.arange(len(labels)), labels])
            start += len(logits)
        return np.concatenate(scores).astype(np.float32)

    def _prefill(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Forget what came before, then yield the logits of `ids` in parts of up to `DECODE_TOKENS` rows."""
        allowed = f"1 to the context's {self.context_length}"
        require(0 < len(ids) <= self.context_length, "number of tokens", len(ids), allowed)
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        for start in range(0, len(ids), self._decode_tokens):
            yield self._decode(ids[start : start + self._decode_tokens], start)

    def _decode(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Logits (T, V) float32 of `ids` at positions `start` and on, behind what is in the key-value cache."""
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        batch = self._llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            np.ctypeslib.as_array(batch.token, tokens.shape)[:] = tokens
            np.ctypeslib.as_array(batch.pos, tokens.shape)[:] = np.arange(start, start + len(tokens))
            np.ctypeslib.as_array(batch.n_seq_id, tokens.shape)[:] = 1
            np.ctypeslib.as_array(batch.logits, tokens.shape)[:] = 1
            for row in range(len(tokens)):
                batch.seq_id[row][0] = 0
            status = self._llama.llama_decode(self._context, batch)
        finally:
            self._llama.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens at position {start} (status {status})")
        logits = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(tokens), self.vocab_size)).copy()


def _choose(
    logits: np.ndarray, seen: set[int], temperature: float, repetition_penalty: float, random: np.random.Generator
) -> int:
    """The next token from logits (V,), as transformers' processors would have it: penalty first, then temperature."""
    logits = logits.astype(np.float64)
    repeated = np.fromiter(seen, dtype=np.int64)
    values = logits[repeated]
    logits[repeated] = np.where(values > 0, values / repetition_penalty, values * repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / temperature)
    return int(random.choice(len(weights), p=weights / weights.sum()))
