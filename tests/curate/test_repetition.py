"""How repetition is counted: exactly, as its definition says."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

from danube_ray.curate.repetition import duplicates, line_repetition, ngram_repetition
from danube_ray.curate.words import WORD


def expected_ngram_repetition(words: list[str], num_chars: int) -> dict[str, float]:
    """The definition, word by word."""
    signals = {}
    for n in (2, 3, 4):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        top = max(grams.items(), key=lambda item: item[1]) if grams else ((), 0)
        signals[f"top_{n}gram_chars"] = len(" ".join(top[0])) * top[1] / num_chars
    for n in (5, 6, 7, 8, 9, 10):
        seen, chars, i = set(), 0, 0
        while i <= len(words) - n:
            gram = tuple(words[i : i + n])
            if gram in seen:
                chars, i = chars + len("".join(gram)), i + n
            else:
                seen.add(gram)
                i += 1
        signals[f"duplicate_{n}gram_chars"] = chars / num_chars
    return signals


@pytest.mark.parametrize("seed", range(60))
def test_ngram_repetition_is_exact(seed):
    rng = random.Random(seed)
    words = [rng.choice(["a", "bb", "ccc", "dddd", "-"][: rng.randint(1, 5)]) for _ in range(rng.randint(0, 80))]
    words += words[: rng.randint(0, 40)]
    assert_signals_equal(words, num_chars=400)


def test_ngram_repetition_is_exact_on_encyclopedic_text(shared_data):
    text = (shared_data / "wiki/wikitext2/word_language_model/data/wikitext-2/test.txt").read_text()[:200_000]
    assert_signals_equal(WORD.findall(text), len(text))


def assert_signals_equal(words: list[str], num_chars: int) -> None:
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)
    lengths = np.array([len(word) for word in words], np.int64)
    assert ngram_repetition(ids, lengths, num_chars) == expected_ngram_repetition(words, num_chars)


def test_line_repetition_counts_every_time_but_the_first():
    assert duplicates(["a", "bb", "a", "bb", "bb"]) == (3, 5)
    signals = line_repetition("one\n\ntwo\n\none\n\none")
    assert signals["duplicate_paragraphs"] == 0.5
    assert signals["duplicate_paragraph_chars"] == 6 / 18


@pytest.mark.parametrize("seed", range(40))
def test_lines_and_paragraphs_are_those_of_the_patterns(seed):
    rng = random.Random(seed)
    for _ in range(100):
        text = "".join(rng.choices("ab\n ", [2, 1, 3, 1], k=rng.randint(1, 16)))
        signals = line_repetition(text)
        for name, pieces in (
            ("paragraph", re.split(r"\n{2,}", text.strip())),
            ("line", re.split(r"\n+", text)),
        ):
            again = [piece for index, piece in enumerate(pieces) if piece in pieces[:index]]
            assert signals[f"duplicate_{name}s"] == len(again) / len(pieces)
            assert signals[f"duplicate_{name}_chars"] == len("".join(again)) / len(text)


def test_signals_do_not_depend_on_how_words_are_numbered():
    rng = np.random.default_rng(0)
    for _ in range(50):
        numbers = rng.integers(0, 6, 60)
        lengths = np.array([1, 2, 3, 5, 8, 13])[numbers]
        renamed = rng.permutation(6)[numbers]
        assert ngram_repetition(numbers, lengths, 500) == ngram_repetition(renamed, lengths, 500)
