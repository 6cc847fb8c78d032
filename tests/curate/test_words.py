"""The one tokenization: the words of its pattern, whatever was met before, with hashes that never change."""

from __future__ import annotations

import random
from itertools import groupby

import numpy as np
import pytest

from danube_ray.curate import words as module
from danube_ray.curate.words import WORD, Vocabulary, tokenize, word_hash, words_of

TEXTS = [
    "",
    " \n\t\u3000",
    "It's well-known: \u201cdon't\u201d costs $1,234.56 (or 20%)... -- see http://a.b/c_d?e=f#g!!",
    "snake_case __init__ _ x_1 O\u2019Neill's rock'n'roll 'quoted' \u2019tis",
    "Größe naïve e\u0301 日本語のテキスト。 \U0001f600\U0001f600 ½ ² Ⅷ",
    "a\x1cb\x85c\u2028d\xa0e\u200bf\x00g",
]


def strings(text: str) -> list[str]:
    words = tokenize(text)
    assert [words.distinct[index] for index in words.ids.tolist()] == [
        words.vocabulary.words[number] for number in words.numbers.tolist()
    ]
    return [words.distinct[index] for index in words.ids.tolist()]


def expected(text: str) -> list[str]:
    """The pattern's words, of equal symbols in a row the first."""
    found = [(word, list(run)) for word, run in groupby(WORD.findall(text))]
    return [word for first, run in found for word in ([first] if len(first) == 1 and not first.isalnum() else run)]


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_the_patterns(text):
    assert strings(text) == expected(text)


def test_words_are_the_patterns_for_any_characters():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("abZ19_'\u2019.,-!()\"“ \n\t\u0301é日$", k=rng.randint(0, 60)))
        assert strings(text) == expected(text)


def test_words_of_real_pages(shared_data):
    text = (shared_data / "wiki/wikitext2/word_language_model/data/wikitext-2/test.txt").read_text()[:300_000]
    assert strings(text) == expected(text)


def test_a_full_vocabulary_is_left_to_those_who_hold_it(monkeypatch):
    before = tokenize("first words that are met")
    monkeypatch.setattr(module, "VOCABULARY_BYTES", 0)
    after = tokenize("that are first")
    assert after.vocabulary is not before.vocabulary
    assert (before.distinct, after.distinct) == (["first", "words", "that", "are", "met"], ["that", "are", "first"])
    assert set(after.hashes.tolist()) <= set(before.hashes.tolist())


def test_distinct_words_come_in_the_texts_order_with_their_times():
    words = tokenize("b a c a, b a")
    assert words.distinct == ["b", "a", "c", ","]
    assert words.times.tolist() == [2, 3, 1, 1]
    assert words.ids.tolist() == [0, 1, 2, 1, 3, 0, 1]


def test_hashes_are_of_words_alone_whatever_their_case():
    assert tokenize("The STRASSE, the straße!").hashes.tolist() == [word_hash(w) for w in ("the", "strasse") * 2]
    assert [word_hash("river"), word_hash("$"), word_hash("_")] == [5749142224382066051, 0, 0]


def test_a_property_is_asked_for_once_a_word():
    asked = []

    def length(word: str) -> int:
        asked.append(word)
        return len(word)

    vocabulary = Vocabulary()
    for word in ("one", "three", "five"):
        vocabulary.enter(word)
        vocabulary.column(length, np.int64)
    assert asked == ["one", "three", "five"]
    assert vocabulary.column(length, np.int64)[:3].tolist() == [3, 5, 4]


def test_another_tools_words_stay_as_they_are():
    words = words_of("U.S. can't", ["U.S.", "ca", "n't", "U.S."])
    assert [words.distinct[index] for index in words.ids.tolist()] == ["U.S.", "ca", "n't", "U.S."]
    assert words.each(len).tolist() == [4, 2, 3, 4]
