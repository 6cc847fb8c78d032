"""Conversations and preference pairs: read, checked, encoded, and dealt out step by step for SFT and DPO.

Rows of the input are JSON lines or Parquet:

    {"messages": [{"role": ..., "content": ...}, ...]}    or    {"prompt": ..., "response": ...}        conversations
    {"messages": [...]} or {"prompt": ...}, with {"chosen": ..., "rejected": ...}                       pairs

What can't be used is quarantined with its reason, what doesn't fit is cut or dropped by one rule, and all are counted.

Shapes: n examples of a rank, T the step's padded length (a row has T + 1 tokens: the last is only a label).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.artifacts import content_hash, file_hash
from danube_ray.config import ConfigError, require
from danube_ray.data.chat import Message, conversation_problem, render
from danube_ray.data.permutation import permutation
from danube_ray.data.shards import token_dtype
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.data.windows import rank_rows

VERSION = 1  # part of the hash: raise it when the same rows would give other batches
PAD_MULTIPLE = 16  # lengths are padded to this: few shapes for a compiled model, whole tiles for a GPU
SAMPLE_CHARACTERS = 200

T = TypeVar("T")


class Quarantined(NamedTuple):
    """A row that can't be used: its number in the file (from 1), why, and how it begins."""

    row: int
    reason: str
    sample: str


class Pair(NamedTuple):
    """A prompt (ending with the user's turn), the answer preferred and the one it was preferred to."""

    prompt: list[Message]
    chosen: str
    rejected: str


def load_conversations(path: Path) -> tuple[list[list[Message]], list[Quarantined]]:
    """The conversations of a JSONL or Parquet file, each ending with an answer, and the rows that are none.

    Raises `ConfigError` for a file that is missing, of another kind, or without one good row.
    """

    def conversation(row: dict[str, Any]) -> list[Message]:
        messages = _messages(row, extra=[{"role": "assistant", "content": row.get("response")}])
        _demand(messages[-1]["role"] == "assistant", "the last message is not the assistant's")
        return messages

    return _load(path, conversation)


def load_pairs(path: Path) -> tuple[list[Pair], list[Quarantined]]:
    """The preference pairs of a JSONL or Parquet file, and the rows that are none; errors as `load_conversations`."""

    def pair(row: dict[str, Any]) -> Pair:
        prompt, answers = _messages(row, extra=[]), [row.get("chosen"), row.get("rejected")]
        _demand(prompt[-1]["role"] == "user", "the prompt's last message is not the user's")
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            problem = conversation_problem([*prompt, {"role": "assistant", "content": answer}])
            _demand(problem is None, f"{name}: {problem}")
        chosen, rejected = map(str, answers)
        _demand(chosen != rejected, "chosen and rejected are the same")
        return Pair(prompt, chosen, rejected)

    return _load(path, pair)


class _Unusable(Exception):
    """Why a row is quarantined."""


def _demand(condition: bool, reason: str) -> None:
    if not condition:
        raise _Unusable(reason)


def _messages(row: dict[str, Any], extra: list[dict[str, Any]]) -> list[Message]:
    """A row's `messages`, or its `prompt` with `extra` behind it, once they are a conversation."""
    messages = row.get("messages")
    if messages is None:
        _demand("prompt" in row, "the row has neither messages nor prompt")
        messages = [{"role": "user", "content": row["prompt"]}, *extra]
    _demand(isinstance(messages, list), "messages is not a list")
    problem = conversation_problem(messages)
    _demand(problem is None, str(problem))
    return [Message(role=message["role"], content=message["content"]) for message in messages]


def _load(path: Path, convert: Callable[[dict[str, Any]], T]) -> tuple[list[T], list[Quarantined]]:
    good: list[T] = []
    bad: list[Quarantined] = []
    for number, row in enumerate(_rows(path), start=1):
        try:
            _demand(isinstance(row, dict), "the row is not a JSON object")
            good.append(convert(row))
        except _Unusable as problem:
            bad.append(Quarantined(number, str(problem), str(row)[:SAMPLE_CHARACTERS]))
    reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(b.reason for b in bad).most_common(3))
    require(bool(good), "data", str(path), "a file with at least one usable row", reasons or "the file is empty")
    return good, bad


def _rows(path: Path) -> Iterator[Any]:
    """Rows of a Parquet or JSON-lines file; a line that isn't JSON comes as text."""
    require(path.is_file(), "data", str(path), "an existing .jsonl or .parquet file")
    kinds = (".jsonl", ".parquet")
    require(path.suffix in kinds, "data", str(path), f"a file ending in {' or '.join(kinds)}")
    if path.suffix == ".parquet":
        try:
            yield from (row for batch in pq.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        except pa.ArrowInvalid as error:
            raise ConfigError("data", str(path), "a Parquet file", str(error)) from None
        return
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):  # a number of over 4,300 digits is a ValueError too
                if line.strip():
                    yield line


class Encoded(NamedTuple):
    """An example's sequences (one, or chosen and rejected): ids, which are trained, and whether anything was cut."""

    ids: list[list[int]]
    trained: list[list[bool]]
    cut: bool


def encode_example(prompt: list[Message], answers: list[str], tokenizer: Tokenizer, max_length: int) -> Encoded | None:
    """The prompt with each of its answers in at most `max_length` tokens; None where no answer would have one.

    What is too long first loses its oldest exchanges, never the system message nor the last question; the same ones
    for every answer. If that isn't enough the answers lose their end, and with it the eos: an answer cut short must not
    teach to stop there.
    """
    system = [message for message in prompt if message["role"] == "system"]
    turns = prompt[len(system) :]
    rendered: list[tuple[list[int], list[bool]]] = []
    for oldest in range(0, len(turns), 2):
        kept = [*system, *turns[oldest:]]
        rendered = [render([*kept, Message(role="assistant", content=answer)], tokenizer) for answer in answers]
        if all(len(ids) <= max_length for ids, _ in rendered):
            return Encoded([ids for ids, _ in rendered], [trained for _, trained in rendered], oldest > 0)
    if not all(any(trained[:max_length]) for _, trained in rendered):
        return None
    return Encoded([ids[:max_length] for ids, _ in rendered], [trained[:max_length] for _, trained in rendered], True)


@dataclass(frozen=True)
class Facts:
    """What became of a file's rows. All of them are kept + dropped + quarantined; `cut` counts among the kept.

    Dropped ones leave no room for an answer within the longest length; cut ones lost old turns or an answer's end.
    """

    kept: int
    cut: int
    dropped: int
    quarantined: int
    tokens: int
    trained_tokens: int


class _ExampleReader:
    """A `StepReader` over a file's examples of `width` sequences each, encoded when it is made.

    Rows of the run are `epochs` passes over the examples, each pass in a keyed order of its own; a step has the next
    `batch_size` of them, the last one perhaps fewer. Pickles with its arrays: 3 bytes a token.
    """

    width: ClassVar[int]

    def __init__(self, data: Path, base: Path, *, batch_size: int, epochs: float, max_length: int, seed: int) -> None:
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        require(batch_size > 0 and epochs > 0, "batch_size and epochs", (batch_size, epochs), "greater than 0")
        tokenizer = Tokenizer.load(base)
        examples, self.quarantine = self._load(data)
        encoded = [encode_example(prompt, answers, tokenizer, max_length) for prompt, answers in examples]
        kept = [example for example in encoded if example is not None]
        remedy = "raise it, or shorten the prompts"
        require(bool(kept), "max_length", max_length, "room for a prompt and some of its answer", remedy)
        self._eos_id, dtype = tokenizer.eos_id, token_dtype(tokenizer.vocab_size)
        self._tokens = np.concatenate([np.array(ids, dtype) for example in kept for ids in example.ids])
        self._trained = np.concatenate([np.array(mask, np.uint8) for example in kept for mask in example.trained])
        self._ends = np.cumsum([0, *(len(ids) for example in kept for ids in example.ids)])
        self.facts = Facts(
            kept=len(kept),
            cut=sum(example.cut for example in kept),
            dropped=len(encoded) - len(kept),
            quarantined=len(self.quarantine),
            tokens=len(self._tokens),
            trained_tokens=int(self._trained.sum()),
        )
        self._num_rows = max(1, round(epochs * len(kept)))
        self.num_steps = -(-self._num_rows // batch_size)
        self.hash = content_hash([VERSION, file_hash(data), tokenizer.sha256, batch_size, epochs, max_length, seed])

    @staticmethod
    def _load(data: Path) -> tuple[list[tuple[list[Message], list[str]]], list[Quarantined]]:
        """The file's examples as a prompt and its answers, `width` of them, and the rows that are none."""
        raise NotImplementedError

    def _example(self, row: int) -> int:
        epoch, place = divmod(row, self.facts.kept)
        return permutation(self.facts.kept, self.seed, "examples", epoch)(place)

    def __call__(self, step: int, rank: int, world_size: int) -> dict[str, np.ndarray]:
        """tokens and trained (n, width, T + 1), weight (n,); T is the longest of the whole step, padded with eos."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        rows = range(step * self.batch_size, min(self._num_rows, (step + 1) * self.batch_size))
        sequences = [range(e * self.width, (e + 1) * self.width) for e in map(self._example, rows)]
        inputs = max(int(self._ends[i + 1] - self._ends[i]) for indexes in sequences for i in indexes) - 1
        length = min(-(-inputs // PAD_MULTIPLE) * PAD_MULTIPLE, self.max_length)
        own, share = rank_rows(len(rows), rank, world_size)
        tokens = np.full((share, self.width, length + 1), self._eos_id, self._tokens.dtype)
        trained, weight = np.zeros(tokens.shape, np.uint8), np.zeros(share, np.uint8)
        for place, row in enumerate(own):
            for column, index in enumerate(sequences[row]):
                begin, end = self._ends[index], self._ends[index + 1]
                tokens[place, column, : end - begin] = self._tokens[begin:end]
                trained[place, column, : end - begin] = self._trained[begin:end]
        weight[: len(own)] = 1
        return {"tokens": tokens, "trained": trained, "weight": weight}

    def tokens_at(self, steps_done: int) -> int:
        """Tokens that the first `steps_done` steps hold, padding not counted."""
        return int(self._tokens_by_step[steps_done - 1]) if steps_done else 0

    @cached_property
    def _tokens_by_step(self) -> np.ndarray:
        sizes = np.diff(self._ends[:: self.width])[[self._example(row) for row in range(self._num_rows)]]
        return np.add.reduceat(sizes, range(0, self._num_rows, self.batch_size)).cumsum()


class ConversationReader(_ExampleReader):
    """SFT batches of the conversations in `data`, with the tokenizer of the folder `base`."""

    width = 1

    @staticmethod
    def _load(data: Path) -> tuple[list[tuple[list[Message], list[str]]], list[Quarantined]]:
        conversations, quarantine = load_conversations(data)
        return [(messages[:-1], [messages[-1]["content"]]) for messages in conversations], quarantine

    def __call__(self, step: int, rank: int, world_size: int) -> dict[str, np.ndarray]:
        """{"tokens": (n, T + 1), "trained": (n, T + 1) uint8, "weight": (n,) uint8}, padded with eos, untrained."""
        batch = super().__call__(step, rank, world_size)
        return {**batch, "tokens": batch["tokens"][:, 0], "trained": batch["trained"][:, 0]}


class PairReader(_ExampleReader):
    """DPO batches {"tokens": (n, 2, T + 1), "trained": (n, 2, T + 1), "weight": (n,)}, the chosen answer first."""

    width = 2

    @staticmethod
    def _load(data: Path) -> tuple[list[tuple[list[Message], list[str]]], list[Quarantined]]:
        pairs, quarantine = load_pairs(data)
        return [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs], quarantine
