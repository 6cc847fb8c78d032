"""Made-up texts and copies of them that differ by a known amount."""

from __future__ import annotations

import random

SYLLABLES = [first + vowel + last for first in "bcdfghjklmnprstvwz" for vowel in "aeiou" for last in ("", "n", "r")]


def prose(rng: random.Random, num_words: int) -> str:
    """Sentences of made-up words, of two or three syllables each."""
    words = ["".join(rng.choices(SYLLABLES, k=rng.choice([2, 3]))) for _ in range(num_words)]
    for end in range(11, num_words, 12):
        words[end] += "."
    return " ".join(words)


def with_replaced_words(rng: random.Random, text: str, number: int) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), number):
        words[place] = "other" + rng.choice(SYLLABLES)
    return " ".join(words)
