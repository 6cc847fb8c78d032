"""One tokenization of a text, which rules, duplicates, decontamination and quality models share.

A word is a run of letters and digits with its inner apostrophes; every other visible character is a symbol, and equal
symbols in a row (`...`, `--`) are one. No word reaches over white space, so a text is split by that first; and what a
process has split, measured or hashed once it remembers, so most of a text is looked up.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
# Symbols that no word holds. Set apart first, they leave words bare, and a text with less that wasn't met before.
COMMON_SYMBOLS = '.,;:"()?!-'
# What a vocabulary may take, and about what each string in it takes beside its characters.
VOCABULARY_BYTES = 64 * 2**20
ENTRY_BYTES = 240
# Odd multipliers make each step of an n-gram's hash a bijection of 64 bits (Knuth's, of the golden ratio).
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Vocabulary(dict[str, bytes]):
    """What a process has met between white space, and the numbers of its words, int32 in a row.

    Words are numbered as they came: the numbers mean nothing outside of their vocabulary.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        self.bytes = 0
        self._columns: dict[Callable[[str], int], np.ndarray] = {}
        self._filled: dict[Callable[[str], int], int] = {}

    def __missing__(self, chunk: str) -> bytes:
        if chunk.isalnum() or len(words := WORD.findall(chunk)) == 1:
            return self.enter(chunk)
        self[chunk] = numbers = b"".join(map(self.__getitem__, words))
        self.bytes += ENTRY_BYTES + len(chunk)
        return numbers

    def enter(self, word: str) -> bytes:
        """Number a new word."""
        self[word] = number = len(self.words).to_bytes(4, "little")
        self.words.append(word)
        self.bytes += ENTRY_BYTES + len(word)
        return number

    def column(self, function: Callable[[str], int], dtype: type[np.generic]) -> np.ndarray:
        """(V or more,) a property of each word by its number; `function` is called once a word."""
        column, filled = self._columns.get(function, np.empty(0, dtype)), self._filled.get(function, 0)
        known = len(self.words)
        if filled < known:
            if known > len(column):
                column = np.concatenate((column, np.empty(known, dtype)))
                self._columns[function] = column
            column[filled:known] = np.fromiter(map(function, self.words[filled:]), dtype, known - filled)
            self._filled[function] = known
        return column


@dataclass(frozen=True, eq=False)
class Words:
    """The N words and symbols of a text: each one's number in a vocabulary, or by the text's own D distinct ones."""

    text: str
    numbers: np.ndarray  # (N,) int32 into `vocabulary`, in the text's order
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.numbers)

    def each(self, function: Callable[[str], int], dtype: type[np.generic] = np.int64) -> np.ndarray:
        """(N,) a property of each word. `function` must be a module's own: its values are remembered by it."""
        return self.vocabulary.column(function, dtype)[self.numbers]

    @cached_property
    def hashes(self) -> np.ndarray:
        """(M,) uint64, the text's words in order, without symbols and whatever their case; the same on any machine."""
        hashes = self.each(word_hash, np.uint64)
        return hashes[hashes != 0]

    @cached_property
    def _distinct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        numbers, first, ids, times = np.unique(self.numbers, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return numbers[order], rank[ids], times[order]

    @cached_property
    def distinct(self) -> list[str]:
        """The D distinct words as they first come in the text."""
        return [self.vocabulary.words[number] for number in self._distinct[0].tolist()]

    @property
    def ids(self) -> np.ndarray:
        """(N,) int64 into `distinct`."""
        return self._distinct[1]

    @property
    def times(self) -> np.ndarray:
        """(D,) int64, how often each distinct word comes."""
        return self._distinct[2]


_this_thread = threading.local()


def vocabulary() -> Vocabulary:
    """This thread's vocabulary; a new one when the last has grown too big. `Words` keep the one they were made with."""
    known = getattr(_this_thread, "vocabulary", None)
    if known is None or known.bytes > VOCABULARY_BYTES:
        known = _this_thread.vocabulary = Vocabulary()
    return known


def tokenize(text: str) -> Words:
    known = vocabulary()
    spaced = text
    for mark in COMMON_SYMBOLS:
        spaced = spaced.replace(mark, f" {mark} ")
    numbers = np.frombuffer(b"".join(map(known.__getitem__, spaced.split())), "<i4")
    repeated = np.flatnonzero(numbers[1:] == numbers[:-1])
    if len(repeated):
        numbers = np.delete(numbers, repeated[known.column(_is_symbol, np.bool_)[numbers[repeated]]])
    return Words(text, numbers, known)


def words_of(text: str, words: Sequence[str]) -> Words:
    """A text that another tool has split."""
    own = Vocabulary()
    for word in dict.fromkeys(words):
        own.enter(word)
    return Words(text, np.frombuffer(b"".join(map(own.__getitem__, words)), "<i4"), own)


def word_hash(word: str) -> int:
    """XXH3's 64 bits of a folded word; 0 for a symbol."""
    return 0 if _is_symbol(word) else xxhash.xxh3_64_intdigest(fold(word).encode()) or 1


def fold(word: str) -> str:
    """What words are compared by: neither case nor the form of apostrophes."""
    return word.casefold().replace("\u2019", "'")


def _is_symbol(word: str) -> bool:
    return len(word) == 1 and not word.isalnum()


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """(M - n + 1,) uint64 hashes of the n-grams of a text's word `hashes` (M,) uint64; empty where M < n."""
    if len(hashes) < n:
        return np.empty(0, np.uint64)
    size = len(hashes) - n + 1
    grams = hashes[:size].copy()
    for step in range(1, n):
        grams *= MULTIPLIER
        grams ^= grams >> np.uint64(29)
        grams += hashes[step : step + size]
    return grams
