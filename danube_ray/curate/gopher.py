"""Whether a text is made of words, as prose is (Gopher's quality rules: Rae et al., 2021, appendix A1.1)."""

from __future__ import annotations

import numpy as np

from danube_ray.curate.punctuation import SYMBOLS
from danube_ray.curate.words import Words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
ELLIPSES = ("...", "…")
BULLETS = ("•", "-")
IS_ALPHABETIC, IS_WORD, FIRST_STOP_WORD = 1, 2, 4
STOP_WORD_BITS = {word: FIRST_STOP_WORD << index for index, word in enumerate(STOP_WORDS)}


def quality(words: Words) -> dict[str, float]:
    """Signals of a text's words and lines. `words` leaves symbols out; `hash_signs` and `ellipses` don't."""
    text, lines = words.text, words.text.splitlines() or [""]
    kinds, number = words.each(_kind, np.int16), max(1, len(words))
    is_word = kinds & IS_WORD != 0
    num_words = int(np.count_nonzero(is_word))
    num_ellipses = sum(map(text.count, ELLIPSES))
    ending = sum(line.rstrip().endswith(ELLIPSES) for line in lines) if num_ellipses else 0
    return {
        "words": num_words,
        "mean_word_chars": int(words.each(len)[is_word].sum()) / max(1, num_words),
        "hash_signs": text.count("#") / number,
        "ellipses": num_ellipses / number,
        "bullet_lines": sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines),
        "ellipsis_lines": ending / len(lines),
        "alphabetic_words": int(np.count_nonzero(kinds & IS_ALPHABETIC)) / number,
        "stop_words": (int(np.bitwise_or.reduce(kinds)) // FIRST_STOP_WORD).bit_count(),
    }


def _kind(word: str) -> int:
    kind = STOP_WORD_BITS.get(word, 0)
    if word.isalpha() or any(map(str.isalpha, word)):
        kind |= IS_ALPHABETIC
    if not SYMBOLS.issuperset(word):
        kind |= IS_WORD
    return kind
