"""How much a text repeats itself: lines, paragraphs and word n-grams (Gopher: Rae et al., 2021, appendix A1.1).

All counts are exact: an n-gram is named by the rank of the pair (its first n - 1 words, its last word), so nothing is
hashed, and only what repeats at n - 1 words is looked at again at n.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

PARAGRAPH_BREAK = re.compile(r"\n{2,}")
LINE_BREAK = re.compile(r"\n+")
TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)


def line_repetition(text: str) -> dict[str, float]:
    """Shares of paragraphs and lines (by number, and by characters of the text) that came before in the same text."""
    num_chars = max(1, len(text))
    signals = {}
    for name, pieces in (
        ("paragraph", PARAGRAPH_BREAK.split(text.strip())),
        ("line", LINE_BREAK.split(text)),
    ):
        number, chars = duplicates(pieces)
        signals[f"duplicate_{name}s"] = number / len(pieces)
        signals[f"duplicate_{name}_chars"] = chars / num_chars
    return signals


def duplicates(pieces: Iterable[str]) -> tuple[int, int]:
    """How many pieces repeat an earlier one, and their characters."""
    seen: set[str] = set()
    number = chars = 0
    for piece in pieces:
        if piece in seen:
            number += 1
            chars += len(piece)
        else:
            seen.add(piece)
    return number, chars


def ngram_repetition(ids: np.ndarray, lengths: np.ndarray, num_chars: int) -> dict[str, float]:
    """Shares of a text's `num_chars` characters in its most frequent 2- to 4-gram and in repeated 5- to 10-grams.

    ids: (N,) int64, the words as numbers from 0 up; lengths: (N,) int64, characters of each word. The most frequent
    n-gram (the earliest of several) counts with the spaces between its words; repeated ones count without, from their
    second time on, and a counted n-gram's words start no other.
    """
    chars_before = np.concatenate(([0], np.cumsum(lengths)))
    signals = {f"top_{n}gram_chars": 0.0 for n in TOP_NGRAMS} | {
        f"duplicate_{n}gram_chars": 0.0 for n in DUPLICATE_NGRAMS
    }
    for n, starts, grams in _repeated_ngrams(ids):
        if n in TOP_NGRAMS and n <= len(ids):
            start, times = _most_frequent(starts, grams)
            chars = int(chars_before[start + n] - chars_before[start]) + n - 1
            signals[f"top_{n}gram_chars"] = times * chars / num_chars
        elif n in DUPLICATE_NGRAMS:
            chars = _chars_of_later_times(n, starts.tolist(), grams.tolist(), chars_before)
            signals[f"duplicate_{n}gram_chars"] = chars / num_chars
    return signals


def _repeated_ngrams(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For n = 2 to 10: the positions (ascending) where an n-gram starts that occurs more than once, and its number."""
    starts, grams = np.arange(len(ids)), ids
    base = int(ids.max(initial=0)) + 1
    for n in range(2, DUPLICATE_NGRAMS[-1] + 1):
        if len(starts):
            inside = starts <= len(ids) - n
            starts, grams = starts[inside], grams[inside]
            _, grams, times = np.unique(grams * base + ids[starts + n - 1], return_inverse=True, return_counts=True)
            again = times[grams] > 1
            starts, grams = starts[again], grams[again]
        yield n, starts, grams


def _most_frequent(starts: np.ndarray, grams: np.ndarray) -> tuple[int, int]:
    """Start and number of occurrences of the most frequent n-gram, the earliest of several."""
    if not len(starts):
        return 0, 1
    times = np.bincount(grams)
    first = int(np.argmax(times[grams] == times.max()))
    return int(starts[first]), int(times.max())


def _chars_of_later_times(n: int, starts: list[int], grams: list[int], chars_before: np.ndarray) -> int:
    seen: set[int] = set()
    chars = next_start = 0
    for start, gram in zip(starts, grams, strict=True):
        if start < next_start:
            continue
        if gram in seen:
            chars += int(chars_before[start + n] - chars_before[start])
            next_start = start + n
        else:
            seen.add(gram)
    return chars
