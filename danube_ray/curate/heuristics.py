"""Whether a text reads like text: the rules of Gopher, C4 and FineWeb over one tokenization.

A rule is a field of `HeuristicRules`: `min_X` or `max_X` bounds the signal `X`. A document is dropped for the first
rule it breaks, in the fields' order, and the rule's name is the reason: a reason is also the setting to change.
What rewrites a document is apart: `HeuristicRules.lines`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from danube_ray.config import NO_RULES, HeuristicRules
from danube_ray.curate.c4 import body_of
from danube_ray.curate.fineweb import line_shape
from danube_ray.curate.gopher import quality
from danube_ray.curate.repetition import line_repetition, ngram_repetition
from danube_ray.curate.splitter import PATTERNS, Splitter
from danube_ray.curate.words import Words


@dataclass(frozen=True)
class Verdict:
    """Why a document is dropped (None: it is kept), and the signals measured until that was clear: all, if it is kept.

    text: the document as the rules leave it; as it came (the same object) where they change nothing, or drop it.
    words: the tokenization of `text`.
    """

    reason: str | None
    signals: dict[str, float]
    text: str
    words: Words


def judge(text: str, rules: HeuristicRules, splitter: Splitter = PATTERNS) -> Verdict:
    """Measure and judge one document; cheap to drop, as what comes after a broken rule is not measured."""
    words = left = splitter.words(text)
    signals: dict[str, float] = {}
    for measured, left in _measured(words, rules, splitter):  # noqa: B007
        signals |= measured
        if (reason := rules.broken(measured)) is not None:
            return Verdict(reason, signals, text, words)
    return Verdict(None, signals, left.text, left)


def measure(text: str) -> dict[str, float]:
    """Every signal of a text, by `SIGNALS`: what any rule set whose lines are the default's measures of it."""
    return judge(text, NO_RULES).signals


def _measured(words: Words, rules: HeuristicRules, splitter: Splitter) -> Iterator[tuple[dict[str, float], Words]]:
    """Signals, group by group, and what is left of the document by then."""
    text = words.text
    if not rules.repetition_first:
        yield quality(words), words
    yield line_repetition(text), words
    yield ngram_repetition(words.numbers, words.each(len), max(1, len(text))), words
    if rules.repetition_first:
        yield quality(words), words

    body = body_of(words, rules.lines, rules.max_lorem_ipsum, rules.max_curly_brackets)
    yield {"lorem_ipsum": body.lorem_ipsum, "curly_brackets": body.curly_brackets}, words
    yield {"sentences": splitter.count_sentences(body.text)}, words
    if body.text == text:
        left = body_words = words
    else:
        body_words = replace(words, text=body.text) if body.is_whole else splitter.words(body.text)
        left = body_words if rules.lines.rewrite else words
    yield line_shape(body.text, len(body_words)), left
