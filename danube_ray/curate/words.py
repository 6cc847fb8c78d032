"""One tokenization of a text, which rules, duplicates, decontamination and quality models share.

A word is a run of letters and digits with its inner apostrophes; every other visible character is a symbol of its own.
Each distinct one is looked at once, and carries a hash that is the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import xxhash

WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
CACHED_WORDS = 2**18
# Odd multipliers make each step of an n-gram's hash a bijection of 64 bits (Knuth's, of the golden ratio).
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class Words:
    """The N words and symbols of a text, by number, and its D distinct ones."""

    text: str
    distinct: list[str]
    ids: np.ndarray  # (N,) int64 into `distinct`, in the text's order
    times: np.ndarray  # (D,) int64

    @cached_property
    def lengths(self) -> np.ndarray:
        """(D,) int64, characters of each distinct word."""
        return np.fromiter(map(len, self.distinct), np.int64, len(self.distinct))

    @cached_property
    def hashes(self) -> np.ndarray:
        """(M,) uint64, the text's words in order, without symbols and whatever their case."""
        of_distinct = np.fromiter(map(word_hash, self.distinct), np.uint64, len(self.distinct))
        hashes = of_distinct[self.ids]
        return hashes[hashes != 0]

    def count(self, predicate: Callable[[str], object]) -> int:
        """How many of the N words have a property, tested on the D distinct ones."""
        return int(self.times[[bool(predicate(word)) for word in self.distinct]].sum())


def tokenize(text: str) -> Words:
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word, len(numbers)) for word in WORD.findall(text)]
    array = np.array(ids, np.int64)
    return Words(text, list(numbers), array, np.bincount(array, minlength=len(numbers)))


@lru_cache(CACHED_WORDS)
def word_hash(word: str) -> int:
    """XXH3's 64 bits of a case-folded word; 0 for a symbol."""
    folded = word.casefold()
    return xxhash.xxh3_64_intdigest(folded.encode()) or 1 if folded[0].isalnum() or len(folded) > 1 else 0


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
