"""Evaluation items in documents: a model must not be trained on what it will be asked.

An item is in a document when 8-grams of words that both hold cover over half of the item's words; of an item under 8
words the document must hold the whole. Words are compared whatever their case and the symbols between them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from danube_ray.artifacts import write_atomically
from danube_ray.curate.benchmarks import read_questions
from danube_ray.curate.words import WORD, Words, fold, ngram_hashes, tokenize, word_hash

NGRAM_WORDS = 8
MIN_COVERAGE = 0.5
# "What is the capital" says nothing about where a text comes from.
MIN_ITEM_WORDS = 5
# What more items than these share is how they are asked ("Choose the correct answer to the question: ..."), not what.
# Variants of one question, as in MetaMath, are fewer.
MAX_SHARING_ITEMS = 10
# With as many beginnings of hashes as 8 times the n-grams, at most one strange n-gram in 8 is looked for any further.
SPARE_BITS = 3


@dataclass(frozen=True)
class Match:
    """An item that a document holds. `item` counts a benchmark's questions from 0, in its files' order; `coverage` is
    the share of its words in common 8-grams.
    """

    benchmark: str
    item: int
    coverage: float


@dataclass(frozen=True, eq=False)
class BenchmarkIndex:
    """The n-grams of I items, G of them, with W words in all: about 1.3 kB of memory an item of 46 words (GSM8K's).

    left_out: by benchmark, how many items were too short, only boilerplate, or repeated.
    """

    left_out: dict[str, int]
    benchmarks: tuple[str, ...]  # (I,)
    numbers: tuple[int, ...]  # (I,) of the item in its benchmark
    texts: tuple[str, ...]  # (I,)
    grams: np.ndarray  # (G,) uint64, in order
    owners: np.ndarray  # (G,) int32 into the items
    starts: np.ndarray  # (G,) int32, words of the item before the n-gram
    own: np.ndarray  # (W,) bool, whether a word is the item's own, not boilerplate
    offsets: np.ndarray  # (I + 1,) int64, where each item's words begin in `own`

    @classmethod
    def build(cls, benchmarks: Mapping[str, Path]) -> Self:
        """Read evaluation sets by name, each a file or a folder; `ConfigError` where one has no questions."""
        read = [item for name, path in benchmarks.items() for item in _items(name, path)]
        own = _own_words([item.hashes for item in read])
        items = [(item, mask) for item, mask in zip(read, own, strict=True) if mask.sum() >= MIN_ITEM_WORDS]
        left_out = Counter(item.benchmark for item in read)
        left_out.subtract(item.benchmark for item, _ in items)
        grams, starts = (
            zip(*(_own_grams(item.hashes, mask) for item, mask in items), strict=True) if items else ((), ())
        )
        owners = [np.full(len(each), row, np.int32) for row, each in enumerate(grams)]
        order = np.argsort(_joined(grams, np.uint64), kind="stable")
        return cls(
            left_out={name: left_out[name] for name in benchmarks},
            benchmarks=tuple(item.benchmark for item, _ in items),
            numbers=tuple(item.number for item, _ in items),
            texts=tuple(item.text for item, _ in items),
            grams=_joined(grams, np.uint64)[order],
            owners=_joined(owners, np.int32)[order],
            starts=_joined(starts, np.int32)[order],
            own=_joined([mask for _, mask in items], np.bool_),
            offsets=np.cumsum([0, *(len(mask) for _, mask in items)], dtype=np.int64),
        )

    def matches(self, words: Words) -> list[Match]:
        """The items that a document holds, in the index's order.

        Most documents share no n-gram with any: looking up theirs in 49,000 items' takes 0.8 ms for 20 kB, in 1,319 of
        8 words or more (GSM8K's) 0.15 ms.
        """
        if not len(self.grams):
            return []
        grams = np.concatenate([ngram_hashes(words.hashes, n) for n in self._lengths])
        grams = np.unique(grams[self._begins[grams >> np.uint64(64 - self._begin_bits)]])
        first = np.searchsorted(self.grams, grams)
        is_found = self.grams[np.minimum(first, len(self.grams) - 1)] == grams
        if not is_found.any():
            return []
        end = np.searchsorted(self.grams, grams[is_found], "right")
        entries = np.concatenate([np.arange(*run) for run in zip(first[is_found], end, strict=True)])
        passage, matches = Passage(words.text), []
        for row in np.unique(self.owners[entries]).tolist():
            starts = self.starts[entries[self.owners[entries] == row]]
            if self._coverage(row, starts) > MIN_COVERAGE:
                equal = [start for start, places in passage.places(self.texts[row], starts.tolist()) if places]
                if (coverage := self._coverage(row, np.array(equal, np.int64))) > MIN_COVERAGE:
                    matches.append(Match(self.benchmarks[row], self.numbers[row], coverage))
        return matches

    def item_text(self, benchmark: str, item: int) -> str:
        """The question that a match names."""
        return self.texts[self._rows[benchmark, item]]

    def evidence(self, words: Words, match: Match) -> str:
        """The passage of a document that holds an item: where most of the common n-grams lie close together."""
        return Passage(words.text).densest(self.item_text(match.benchmark, match.item))

    def save(self, path: Path) -> None:
        """Write one safetensors file; equal indexes give equal bytes."""
        texts = [text.encode() for text in self.texts]
        tensors = {name: getattr(self, name) for name in ("grams", "owners", "starts", "own", "offsets")}
        tensors["texts"] = np.frombuffer(b"".join(texts), np.uint8)
        tensors["text_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
        about = {"left_out": self.left_out, "benchmarks": self.benchmarks, "numbers": self.numbers}
        # One entry: the order of several is left to chance.
        write_atomically(path, save(tensors, {"index": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> Self:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads(file.metadata()["index"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        blob, ends = tensors.pop("texts").tobytes(), tensors.pop("text_ends").tolist()
        texts = tuple(blob[start:end].decode() for start, end in zip([0, *ends], ends, strict=False))
        return cls(about["left_out"], tuple(about["benchmarks"]), tuple(about["numbers"]), texts, **tensors)

    @cached_property
    def _rows(self) -> dict[tuple[str, int], int]:
        return {key: row for row, key in enumerate(zip(self.benchmarks, self.numbers, strict=True))}

    @cached_property
    def _lengths(self) -> list[int]:
        return np.unique(np.minimum(np.diff(self.offsets), NGRAM_WORDS)).tolist()

    @property
    def _begin_bits(self) -> int:
        return len(self.grams).bit_length() + SPARE_BITS

    @cached_property
    def _begins(self) -> np.ndarray:
        """(2 ** begin_bits,) bool, whether an n-gram's hash begins with these bits: a look-up that most end with."""
        begins = np.zeros(2**self._begin_bits, np.bool_)
        begins[self.grams >> np.uint64(64 - self._begin_bits)] = True
        return begins

    def _coverage(self, row: int, starts: np.ndarray) -> float:
        """The share of an item's own words that its n-grams at `starts` cover."""
        own = self.own[self.offsets[row] : self.offsets[row + 1]]
        return float((_covered(starts, len(own)) & own).sum() / own.sum())


@dataclass(frozen=True, eq=False)
class Passage:
    """A document's words in full, to see that what hashes call equal is equal, and where."""

    text: str

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        return [word.span() for word in WORD.finditer(self.text) if word_hash(word[0])]

    @cached_property
    def words(self) -> list[str]:
        return [fold(self.text[start:end]) for start, end in self.spans]

    @cached_property
    def hashes(self) -> np.ndarray:
        return np.fromiter(map(word_hash, self.words), np.uint64, len(self.words))

    def places(self, item: str, starts: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """For each n-gram of an item, by its start: where the document has the same words."""
        wanted = Passage(item)
        length = min(NGRAM_WORDS, len(wanted.words))
        grams, item_grams = ngram_hashes(self.hashes, length), ngram_hashes(wanted.hashes, length)
        for start in starts:
            places = np.flatnonzero(grams == item_grams[start]).tolist()
            words = wanted.words[start : start + length]
            yield start, [place for place in places if self.words[place : place + length] == words]

    def densest(self, item: str) -> str:
        """The text from the first to the last n-gram of the largest group that lie less than an item apart."""
        size = len(Passage(item).words)
        length = min(NGRAM_WORDS, size)
        found = self.places(item, range(size - length + 1))
        places = np.array(sorted({place for _, places in found for place in places}))
        group = max(np.split(places, np.flatnonzero(np.diff(places) > size) + 1), key=len)
        return self.text[self.spans[group[0]][0] : self.spans[group[-1] + length - 1][1]]


@dataclass(frozen=True, eq=False)
class Item:
    benchmark: str
    number: int
    text: str
    hashes: np.ndarray  # (n,) uint64, of its words


def _items(name: str, path: Path) -> Iterator[Item]:
    """A benchmark's questions; a repeated one without words, so that it is counted and found once."""
    seen: set[bytes] = set()
    for number, text in enumerate(read_questions(path)):
        hashes = tokenize(text).hashes
        is_new = (key := hashes.tobytes()) not in seen
        seen.add(key)
        yield Item(name, number, text, hashes if is_new else hashes[:0])


def _own_words(items: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each item's word hashes (n,), which words lie in no n-gram that too many items share: (n,) bool."""
    grams = [ngram_hashes(item, min(NGRAM_WORDS, len(item))) if len(item) else item for item in items]
    values, times = np.unique(_joined([np.unique(gram) for gram in grams], np.uint64), return_counts=True)
    is_shared = np.isin(_joined(grams, np.uint64), values[times > MAX_SHARING_ITEMS])
    by_item = np.split(is_shared, np.cumsum([len(gram) for gram in grams])[:-1])
    return [~_covered(np.flatnonzero(shared), len(item)) for item, shared in zip(items, by_item, strict=True)]


def _own_grams(hashes: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An item's n-grams with a word of its own, and their starts; the others can't cover any."""
    length = min(NGRAM_WORDS, len(hashes))
    starts = np.flatnonzero(np.convolve(own, np.ones(length), "valid"))
    return ngram_hashes(hashes, length)[starts], starts.astype(np.int32)


def _covered(starts: np.ndarray, size: int) -> np.ndarray:
    """(size,) bool, which of an item's words lie in its n-grams at `starts`."""
    change = np.zeros(size + 1, np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, starts + min(NGRAM_WORDS, size), -1)
    return np.cumsum(change[:-1]) > 0


def _joined(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays])
