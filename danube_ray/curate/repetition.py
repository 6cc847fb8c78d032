"""How much a text repeats itself: lines, paragraphs and word n-grams (Gopher: Rae et al., 2021, appendix A1.1).

All counts are exact: an n-gram is named by the pair (number of its first n - 1 words, number of its last word), so
nothing is hashed, and only what repeats at n - 1 words is looked at again at n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)
NO_REPETITION = {f"top_{n}gram_chars": 0.0 for n in TOP_NGRAMS} | {
    f"duplicate_{n}gram_chars": 0.0 for n in DUPLICATE_NGRAMS
}


def line_repetition(text: str) -> dict[str, float]:
    """Shares of paragraphs and lines (by number, and by characters of the text) that came before in the same text.

    Paragraphs lie between two or more line feeds, lines between one or more; before the first line feed of a text that
    starts with one, and after the last, is an empty line.
    """
    num_chars = max(1, len(text))
    inner = [line for line in text.split("\n") if line]
    paragraphs = [part.lstrip("\n") for part in text.strip().split("\n\n") if part]
    lines = [""] * text.startswith("\n") + inner + [""] * text.endswith("\n")
    signals = {}
    for name, pieces in (("paragraph", paragraphs), ("line", lines)):
        number, chars = duplicates(pieces)
        signals[f"duplicate_{name}s"] = number / max(1, len(pieces))
        signals[f"duplicate_{name}_chars"] = chars / num_chars
    return signals


def duplicates(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces repeat an earlier one, and their characters."""
    distinct = set(pieces)
    number = len(pieces) - len(distinct)
    return number, sum(map(len, pieces)) - sum(map(len, distinct)) if number else 0


def ngram_repetition(numbers: np.ndarray, lengths: np.ndarray, num_chars: int) -> dict[str, float]:
    """Shares of a text's `num_chars` characters in its most frequent 2- to 4-gram and in repeated 5- to 10-grams.

    numbers: (N,) integers from 0 up, equal where words are; lengths: (N,) int64, characters of each word. The most
    frequent n-gram (the earliest of several) counts with the spaces between its words; repeated ones count without,
    from their second time on, and a counted n-gram's words start no other.
    """
    signals = dict(NO_REPETITION)
    numbers = numbers.astype(np.int64)
    starts, grams = np.arange(len(numbers)), numbers
    for n in TOP_NGRAMS:
        starts, grams, start, times = _repeated(n, starts, grams, numbers)
        if n <= len(numbers):
            signals[f"top_{n}gram_chars"] = times * (int(lengths[start : start + n].sum()) + n - 1) / num_chars
    starts, _, _, _ = _repeated(DUPLICATE_NGRAMS[0], starts, grams, numbers)
    if len(starts):
        candidates, words = starts.tolist(), numbers.tobytes()
        before = [0, *np.cumsum(lengths).tolist()]
        for n in DUPLICATE_NGRAMS:
            chars = _chars_of_later_times(n, candidates, words, numbers.itemsize, before)
            if not chars:
                break  # no n-gram comes again, so no longer one does
            signals[f"duplicate_{n}gram_chars"] = chars / num_chars
    return signals


def _repeated(
    n: int, starts: np.ndarray, grams: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """From the (n - 1)-grams that repeat to the n-grams that do.

    starts: (R,) ascending positions of repeated (n - 1)-grams (at n = 2, of all words); grams: (R,) the number of each.
    Returns both for n, and start and times of the most frequent n-gram: the earliest of several, the text's first
    where none repeats.
    """
    inside = int(np.searchsorted(starts, len(numbers) - n, "right"))
    if inside < 2:
        return starts[:0], grams[:0], 0, 1
    starts = starts[:inside]
    keys = grams[:inside] << 31 | numbers[starts + (n - 1)]  # numbers of words fit in 31 bits, of n-grams in 32
    order = keys.argsort()
    ordered = keys[order]
    differs = ordered[1:] != ordered[:-1]
    if differs.all():
        return starts[:0], grams[:0], 0, 1
    gram = np.zeros(inside, np.int64)  # in the keys' order at first
    np.cumsum(differs, out=gram[1:])
    times = np.bincount(gram)[gram]
    most = int(times.max())
    first = int(order[times == most].min())
    again = order[times > 1]
    again.sort()
    by_position = np.empty(inside, np.int64)
    by_position[order] = gram
    return starts[again], by_position[again], int(starts[first]), most


def _chars_of_later_times(n: int, starts: list[int], words: bytes, item_bytes: int, before: list[int]) -> int:
    """Characters of the n-grams at `starts` that came before; `before`: characters before each word."""
    seen: set[bytes] = set()
    chars = next_start = 0
    last_start = len(before) - 1 - n
    for start in starts:
        if next_start <= start <= last_start:
            gram = words[start * item_bytes : (start + n) * item_bytes]
            if gram in seen:
                chars += before[start + n] - before[start]
                next_start = start + n
            else:
                seen.add(gram)
    return chars
