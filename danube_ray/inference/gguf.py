"""A GGUF file run by llama.cpp: logits, scores and hidden states of whole prompts, and generation of one sequence with
exact token ids.

This is for measuring; serving many streams at once is llama.cpp's server, in `danube_ray.serve`. Both compute with the
same kernels and the default 16-bit key-value cache, so what is measured here is what is served.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import c_float, c_void_p, create_string_buffer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from danube_ray.config import ConfigError, require, require_positive
from danube_ray.inference.llamacpp import library

DECODE_TOKENS = 512  # tokens a call of llama.cpp: bounds its logits buffer at 512 * V floats
SOFTMAX_ROWS = 64  # positions at a time: three float32 copies of 64 * V, 25 MB at 32,000 pieces


class Interrupted(RuntimeError):
    """The caller no longer wants what it asked for."""


class Scores(NamedTuple):
    """Of S tokens in a row: the log-probability (nats) of each (S,), and of the likeliest at its place, best first."""

    log_probs: np.ndarray  # (S,) float32
    top_ids: np.ndarray  # (S, top) int64
    top_log_probs: np.ndarray  # (S, top) float32

    def pairs(self) -> list[tuple[tuple[int, float], ...]]:
        """The likeliest at each place as (id, log-probability)."""
        rows = zip(self.top_ids.tolist(), self.top_log_probs.tolist(), strict=True)
        return [tuple(zip(ids, scores, strict=True)) for ids, scores in rows]


class GgufModel:
    """A `LanguageModel` over a GGUF file; a context manager, or `close` it. One sequence at a time, one thread of use.

    `context_length` None takes the file's. `adapters` are GGUF adapter files by name; none acts until `use_adapter`.
    `decode_tokens` is how many tokens one call of llama.cpp takes: between two of them `stop` is asked. Weights are
    mapped, so that two models over one file in a machine share its pages.
    `ConfigError` when llama.cpp can't load the file, or an adapter is not of this model.
    """

    def __init__(
        self,
        path: Path,
        *,
        context_length: int | None = None,
        num_threads: int = 1,
        adapters: Mapping[str, Path] | None = None,
        decode_tokens: int = DECODE_TOKENS,
    ) -> None:
        self.num_threads, self.decode_tokens = num_threads, decode_tokens
        require_positive(self, "num_threads", "decode_tokens")
        require(path.is_file(), "GGUF file", str(path), "an existing file")
        self._context = None
        self._llama = llama = library()
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            raise ConfigError("GGUF file", str(path), "one that llama.cpp loads", "its message above says why")
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self.vocab_size: int = llama.llama_vocab_n_tokens(self._vocabulary)
        self.eos_id: int = llama.llama_vocab_eos(self._vocabulary)
        self.hidden_size: int = llama.llama_model_n_embd_out(self._model)
        trained_context = llama.llama_model_n_ctx_train(self._model)
        self.context_length = context_length or trained_context
        self._held: list[int] = []  # the tokens whose keys and values the context holds
        try:
            allowed = f"1 to {trained_context}, which the model was trained for"
            require(0 < self.context_length <= trained_context, "context_length", self.context_length, allowed)
            self._adapters = {name: self._load_adapter(file) for name, file in (adapters or {}).items()}
            self._context = self._new_context(path)
        except ConfigError:
            self.close()
            raise
        self._adapter: str | None = None

    def _new_context(self, path: Path) -> int:
        params = self._llama.llama_context_default_params()
        self.decode_tokens = min(self.decode_tokens, self.context_length)
        params.n_ctx, params.n_batch, params.n_ubatch = self.context_length, self.decode_tokens, self.decode_tokens
        context = self._llama.llama_init_from_model(self._model, params)
        if not context:
            raise ConfigError("GGUF file", str(path), f"one that fits in memory with {self.context_length} tokens")
        self._llama.llama_set_n_threads(context, self.num_threads, self.num_threads)
        return context

    def _load_adapter(self, file: Path) -> int:
        require(file.is_file(), "adapter", str(file), "an existing GGUF file")
        adapter = self._llama.llama_adapter_lora_init(self._model, str(file).encode())
        if not adapter:
            raise ConfigError("adapter", str(file), "a LoRA adapter of this model", "its message above says why")
        return adapter

    def use_adapter(self, name: str | None) -> None:
        """From here on compute with this adapter; None is the model alone. What the context held is forgotten."""
        if name == self._adapter:
            return
        count = int(name is not None)
        adapters = (c_void_p * count)(*([self._adapters[name]] if name is not None else []))
        if self._llama.llama_set_adapters_lora(self._context, adapters, count, (c_float * count)(*[1.0] * count)):
            raise RuntimeError(f"llama.cpp could not switch to adapter {name}")
        self._adapter, self._held = name, []

    def logits(self, ids: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Next-token logits at every position of one sequence: (T, V) float32; or only at `rows`, ascending."""
        return np.concatenate([part.copy() for part in self._prefill(ids, range(len(ids)) if rows is None else rows)])

    def log_probs(self, batch: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability (nats) of every token but the first of each sequence: (T - 1,) float32 each."""
        return [self.score(ids).log_probs for ids in batch]

    def score(
        self, ids: Sequence[int], top: int = 0, *, first: int = 1, stop: Callable[[], bool] | None = None
    ) -> Scores:
        """Scores of `ids[first:]`, each token given all before it. What the context still holds of the tokens before
        them is not computed again. `Interrupted` soon after `stop` says so."""
        parts, position = [], first
        for logits in self._prefill(ids, range(first - 1, len(ids)), stop):
            for start in range(0, len(logits), SOFTMAX_ROWS):
                rows = logits[start : start + SOFTMAX_ROWS]
                labels = np.asarray(ids[position : position + len(rows)], dtype=np.int64)
                parts.append(_scores(rows[: len(labels)], labels, top))  # what follows the last token is not known
                position += len(rows)
        return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def embed(self, ids: Sequence[int], *, stop: Callable[[], bool] | None = None) -> np.ndarray:
        """Mean of the last hidden states, after the final norm, at length 1: (hidden size,) float64."""
        self._llama.llama_set_embeddings(self._context, True)
        try:
            total = np.zeros(self.hidden_size)
            for logits in self._prefill(ids, range(len(ids)), stop):
                states = self._llama.llama_get_embeddings(self._context)
                total += np.ctypeslib.as_array(states, (len(logits), self.hidden_size)).sum(axis=0, dtype=np.float64)
        finally:
            self._llama.llama_set_embeddings(self._context, False)
        return total / np.linalg.norm(total)

    def piece(self, token: int) -> bytes:
        """What a token adds to a text; nothing for a control token."""
        text = create_string_buffer(256)
        length = self._llama.llama_token_to_piece(self._vocabulary, token, text, len(text), 0, False)
        return text.raw[: max(0, length)]

    @functools.cached_property
    def byte_ids(self) -> dict[int, int]:
        """The tokens that stand for single bytes, by byte."""
        named = {b"<0x%02X>" % byte: byte for byte in range(256)}
        texts = (self._llama.llama_vocab_get_text(self._vocabulary, token) for token in range(self.vocab_size))
        return {named[text]: token for token, text in enumerate(texts) if text in named}

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
        *_, last = self._prefill(ids, [len(ids) - 1])
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

    def _prefill(
        self, ids: Sequence[int], rows: Sequence[int], stop: Callable[[], bool] | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the logits at `rows` (ascending) in parts of up to `decode_tokens`, each until the next is asked for.

        The context keeps what it holds of the tokens before them, and forgets the rest.
        """
        allowed = f"1 to the context's {self.context_length}"
        require(0 < len(ids) <= self.context_length, "number of tokens", len(ids), allowed)
        strange = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        require(strange is None, "token id", strange, f"0 to {self.vocab_size - 1}")
        wanted = np.zeros(len(ids), np.int8)
        wanted[rows] = 1
        kept, reusable = 0, min(int(wanted.argmax()), len(self._held))
        while kept < reusable and self._held[kept] == ids[kept]:
            kept += 1
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_seq_rm(memory, 0, kept, -1)
        del self._held[kept:]
        for start in range(kept, len(ids), self.decode_tokens):
            if stop is not None and stop():
                raise Interrupted
            end = start + self.decode_tokens
            logits = self._decode(ids[start:end], start, wanted[start:end])
            if len(logits):
                yield logits

    def _decode(self, ids: Sequence[int], start: int, wanted: np.ndarray | int = 1) -> np.ndarray:
        """Logits (rows, V) float32 of `ids` at positions `start` and on, where `wanted` (T,) is 1, behind what the
        context holds. They lie in llama.cpp's own memory, until its next call."""
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        batch = self._llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            np.ctypeslib.as_array(batch.token, tokens.shape)[:] = tokens
            np.ctypeslib.as_array(batch.pos, tokens.shape)[:] = np.arange(start, start + len(tokens))
            np.ctypeslib.as_array(batch.n_seq_id, tokens.shape)[:] = 1
            np.ctypeslib.as_array(batch.logits, tokens.shape)[:] = wanted
            for row in range(len(tokens)):
                batch.seq_id[row][0] = 0
            status = self._llama.llama_decode(self._context, batch)
        finally:
            self._llama.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens at position {start} (status {status})")
        self._held[start:] = tokens.tolist()
        num_rows = int(np.broadcast_to(wanted, tokens.shape).sum())
        if num_rows == 0:
            return np.empty((0, self.vocab_size), np.float32)
        return np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), (num_rows, self.vocab_size))


def _scores(logits: np.ndarray, labels: np.ndarray, top: int) -> Scores:
    """Scores of labels (S,) under logits (S, V), and the `top` likeliest."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_totals = np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    top = min(top, shifted.shape[1])
    best = np.argpartition(shifted, -top, axis=1)[:, -top:] if top else np.empty((len(labels), 0), np.int64)
    order = np.argsort(-np.take_along_axis(shifted, best, axis=1), axis=1)
    best = np.take_along_axis(best, order, axis=1)
    chosen = np.take_along_axis(shifted, labels[:, None], axis=1) - log_totals
    return Scores(chosen[:, 0], best, np.take_along_axis(shifted, best, axis=1) - log_totals)


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
