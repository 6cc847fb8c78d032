"""Whether a text reads like text: the rules of Gopher, C4 and FineWeb over one tokenization.

A rule is a field of `HeuristicRules`: `min_X` or `max_X` bounds the signal `X`. A document is dropped for the first
rule it breaks, in the fields' order, and the rule's name is the reason: a reason is also the setting to change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import numpy as np

from danube_ray.config import require
from danube_ray.curate.repetition import duplicates, line_repetition, ngram_repetition
from danube_ray.curate.words import Words, tokenize

LETTER = re.compile(r"[^\W\d_]")
SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)")
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
ELLIPSES = ("...", "…")
BULLETS = ("•", "-")
TERMINAL_PUNCTUATION = (".", "?", "!", "…", "。", "！", "？", "।", "؟", "۔")  # noqa: RUF001
SHORT_LINE_CHARS = 30
MIN_SENTENCE_LINE_WORDS = 3


@dataclass(frozen=True, kw_only=True)
class HeuristicRules:
    """Bounds on a document's signals; a value on the bound passes, so a share at 1 or a minimum at 0 is off.

    The defaults are for web pages: the papers' thresholds (Rae et al., 2021, A1.1; Raffel et al., 2020, 2.2; Penedo et
    al., 2024, 3.6). Only what judges a document is here: C4's removal of single lines rewrites it.
    """

    # Gopher, quality. `words` leaves symbols out; `hash_signs` and `ellipses` are per word or symbol.
    min_words: float = 50
    max_words: float = 100_000
    min_mean_word_chars: float = 3
    max_mean_word_chars: float = 10
    max_hash_signs: float = 0.10
    max_ellipses: float = 0.10
    max_bullet_lines: float = 0.90
    max_ellipsis_lines: float = 0.30
    min_alphabetic_words: float = 0.80
    min_stop_words: float = 2
    # Gopher, repetition: shares of paragraphs, lines, and of the text's characters.
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_paragraph_chars: float = 0.20
    max_duplicate_lines: float = 0.30
    max_duplicate_line_chars: float = 0.20
    max_top_2gram_chars: float = 0.20
    max_top_3gram_chars: float = 0.18
    max_top_4gram_chars: float = 0.16
    max_duplicate_5gram_chars: float = 0.15
    max_duplicate_6gram_chars: float = 0.14
    max_duplicate_7gram_chars: float = 0.13
    max_duplicate_8gram_chars: float = 0.12
    max_duplicate_9gram_chars: float = 0.11
    max_duplicate_10gram_chars: float = 0.10
    # C4: placeholders, code (curly brackets per word or symbol), and pages without sentences.
    max_lorem_ipsum: float = 0
    max_curly_brackets: float = 0
    min_sentences: float = 5
    # FineWeb, over lines that are not blank. `repeated_line_chars` is a share of the characters without line breaks.
    min_punctuated_lines: float = 0.12
    max_short_lines: float = 0.67
    max_repeated_line_chars: float = 0.01
    max_newlines_per_word: float = 0.30

    def __post_init__(self) -> None:
        for rule in fields(self):
            bound = getattr(self, rule.name)
            require(bound >= 0, f"HeuristicRules.{rule.name}", bound, "0 or more")

    def broken(self, signals: dict[str, float]) -> str | None:
        """The first rule that these signals break."""
        for rule, signal, is_minimum in _BOUNDS:
            if signal in signals:
                value, bound = signals[signal], getattr(self, rule)
                if (value < bound) if is_minimum else (value > bound):
                    return rule
        return None


WEB_RULES = HeuristicRules()

_BOUNDS = tuple((rule.name, rule.name[4:], rule.name.startswith("min_")) for rule in fields(HeuristicRules))
SIGNALS = tuple(dict.fromkeys(signal for _, signal, _ in _BOUNDS))


@dataclass(frozen=True)
class Verdict:
    """Why a document is dropped (None: it is kept), and the signals measured until that was clear."""

    reason: str | None
    signals: dict[str, float]


def judge(text: str, rules: HeuristicRules) -> Verdict:
    """Measure and judge one document; cheap to drop, as the groups after a broken rule are not measured."""
    words = tokenize(text)
    signals: dict[str, float] = {}
    for measure in (_quality, _line_repetition, _ngram_repetition, _c4, _fineweb):
        measured = measure(words)
        signals |= measured
        if (reason := rules.broken(measured)) is not None:
            return Verdict(reason, signals)
    return Verdict(None, signals)


def _quality(words: Words) -> dict[str, float]:
    text, lines = words.text, words.text.splitlines() or [""]
    number = max(1, len(words.ids))
    is_word = np.array([word[0].isalnum() or len(word) > 1 for word in words.distinct], bool)
    num_words = int(words.times[is_word].sum())
    return {
        "words": num_words,
        "mean_word_chars": float((words.times * words.lengths)[is_word].sum()) / max(1, num_words),
        "hash_signs": text.count("#") / number,
        "ellipses": sum(map(text.count, ELLIPSES)) / number,
        "bullet_lines": sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines),
        "ellipsis_lines": sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines),
        "alphabetic_words": words.count(LETTER.search) / number,
        "stop_words": len(STOP_WORDS.intersection(words.distinct)),
    }


def _line_repetition(words: Words) -> dict[str, float]:
    return line_repetition(words.text)


def _ngram_repetition(words: Words) -> dict[str, float]:
    return ngram_repetition(words.ids, words.lengths[words.ids], max(1, len(words.text)))


def _c4(words: Words) -> dict[str, float]:
    # C4 looks at lines of three words or more, and each of them is a sentence at least.
    lines = [line for line in words.text.splitlines() if len(line.split(None, 2)) >= MIN_SENTENCE_LINE_WORDS]
    return {
        "lorem_ipsum": words.text.lower().count("lorem ipsum"),
        "curly_brackets": words.text.count("{") / max(1, len(words.ids)),
        "sentences": sum(max(1, len(SENTENCE_END.findall(line))) for line in lines),
    }


def _fineweb(words: Words) -> dict[str, float]:
    lines = [line.strip() for line in words.text.split("\n") if line.strip()] or [""]
    newlines = words.text.count("\n")
    return {
        "punctuated_lines": sum(line.endswith(TERMINAL_PUNCTUATION) for line in lines) / len(lines),
        "short_lines": sum(len(line) <= SHORT_LINE_CHARS for line in lines) / len(lines),
        "repeated_line_chars": duplicates(lines)[1] / max(1, len(words.text) - newlines),
        "newlines_per_word": newlines / max(1, len(words.ids)),
    }
