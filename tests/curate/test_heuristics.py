"""Rules: each drops what it is for, by its own name, and signals equal what their definition gives."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from danube_ray.config import ConfigError
from danube_ray.curate.heuristics import SIGNALS, WEB_RULES, HeuristicRules, judge
from danube_ray.curate.repetition import duplicates, line_repetition, ngram_repetition
from danube_ray.curate.words import WORD

# Prose that passes every rule: 12 sentences without a repeated line or phrase.
PROSE = """The river rises in the hills to the north, where the snow lies until May.
It is a narrow stream at first and children jump across it on their way to school.
Below the old mill, two brooks that have come down from the forest join it.
From there on it is wide enough to carry boats, and the first village has a landing.
Farmers used to bring their apples to this place and sell them from the boats.
Some of the older people remember how crowded the water was on market days.
Trucks came with the new road, and within ten years nobody sailed any more.
Today visitors rent canoes and drift slowly with the current through quiet meadows.
Herons stand in the shallows, and in the evening you may see an otter swim.
After heavy rain everything changes, for the water turns brown and very quick.
Twice in the last century it has flooded the lower streets of the town.
A wall of stone was built, which holds so far and which everyone hopes will hold."""


def reason(text: str, rules: HeuristicRules = WEB_RULES) -> str | None:
    return judge(text, rules).reason


def test_prose_is_kept_with_every_signal_measured():
    verdict = judge(PROSE, WEB_RULES)
    assert verdict.reason is None
    assert set(verdict.signals) == set(SIGNALS)
    assert verdict.signals["words"] == len(PROSE.split())
    assert verdict.signals["sentences"] == verdict.signals["punctuated_lines"] * 12 == 12


LINES = PROSE.split("\n")
TWICE = " ".join([*LINES[:6], *LINES[:3]])
BROKEN = {
    "max_duplicate_paragraphs": "\n\n".join([PROSE, *["Share"] * 3]),
    "max_duplicate_paragraph_chars": "\n\n".join([*LINES, *LINES[:4]]),
    "max_duplicate_lines": "\n".join([PROSE, *["Home"] * 9]),
    "max_duplicate_line_chars": "\n".join([*LINES, *LINES[:4]]),
    "max_top_2gram_chars": PROSE.replace(" a ", " the ").replace(" the ", " extraordinarily circumstantial "),
    "max_top_3gram_chars": PROSE.replace(" the ", " of the extraordinary "),
    "max_top_4gram_chars": PROSE.replace(" the ", " that is to say "),
    **{f"max_duplicate_{n}gram_chars": TWICE for n in range(5, 11)},
    "min_words": LINES[0],
    "max_words": "word " * 100_001,
    "min_mean_word_chars": " ".join(a + b for a in "abcdefghij" for b in "klmnopqrst"),
    "max_mean_word_chars": PROSE.replace("e", "e" * 20),
    "max_hash_signs": PROSE.replace(".", " # # # #."),
    "max_ellipses": PROSE.replace(",", " …").replace(" a", " … a").replace(" h", " … h"),
    "max_bullet_lines": "- " + PROSE.replace("\n", "\n  • "),
    "max_ellipsis_lines": PROSE.replace(".\n", "...\n", 5),
    "min_alphabetic_words": PROSE + " " + " ".join(map(str, range(60))),
    "min_stop_words": re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "xyz", PROSE),
    "max_lorem_ipsum": PROSE + " Lorem ipsum dolor sit amet.",
    "max_curly_brackets": PROSE + "\nif (x) {",
    "min_sentences": PROSE.replace(".", ",").replace("\n", " "),
    "min_punctuated_lines": PROSE.replace(".\n", "\n"),
    "max_short_lines": "\n".join([PROSE, *["A short line here"] * 25]),
    "max_repeated_line_chars": "\n".join([PROSE, LINES[3]]),
    "max_newlines_per_word": PROSE.replace("\n", "\n" * 7),
}
OFF = HeuristicRules(**{rule.name: 0 if rule.name.startswith("min_") else 10**9 for rule in fields(HeuristicRules)})


@pytest.mark.parametrize("rule", [rule.name for rule in fields(HeuristicRules)])
def test_a_rule_drops_what_it_is_for(rule):
    alone = replace(OFF, **{rule: getattr(WEB_RULES, rule)})
    assert reason(BROKEN[rule], OFF) is None
    assert reason(BROKEN[rule], alone) == rule


def test_a_value_on_the_bound_passes():
    signals = judge(PROSE, WEB_RULES).signals
    for rule in fields(HeuristicRules):
        assert reason(PROSE, replace(WEB_RULES, **{rule.name: signals[rule.name[4:]]})) is None


def test_the_first_broken_rule_is_the_reason_and_ends_the_measuring():
    verdict = judge(PROSE + "\nHome" * 9 + "{", WEB_RULES)
    assert verdict.reason == "max_duplicate_lines"
    assert "duplicate_line_chars" in verdict.signals
    assert "curly_brackets" not in verdict.signals


@pytest.mark.parametrize("text", ["", "\n\n", "…", "\u200b", "\ufeff" * 10, "́" * 1000])
def test_texts_without_words_are_dropped(text):
    assert reason(text) is not None


def test_a_negative_bound_is_refused():
    with pytest.raises(ConfigError, match="max_short_lines"):
        HeuristicRules(max_short_lines=-0.1)


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
