"""What becomes of one document: every judge in its order, all over one tokenization.

    blocked address → language → rules (which may rewrite the text) → source code → blocked words → contamination →
    masking of personal data → quality

The first judge to object names the reason, and the later ones don't look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from danube_ray.config import CurationConfig, HeuristicRules
from danube_ray.curate.decontaminate import BenchmarkIndex, Match
from danube_ray.curate.heuristics import judge
from danube_ray.curate.language import identify
from danube_ray.curate.lists import UrlList, WordList
from danube_ray.curate.pii import mask
from danube_ray.curate.quality import QualityModel
from danube_ray.curate.records import Document
from danube_ray.curate.source_code import code_share
from danube_ray.curate.words import Words, tokenize


@dataclass(frozen=True)
class Found:
    """An evaluation item in a document: the match, the item's text, and the passage that holds it."""

    match: Match
    question: str
    evidence: str


@dataclass(frozen=True)
class Judged:
    """A document's `text` as it is stored from here on, why it is dropped (None: it is kept), and what was measured."""

    text: str
    reason: str | None
    signals: dict[str, float] = field(default_factory=dict)
    words: Words | None = None  # of `text`; None where the rules were not asked
    language: str | None = None
    quality: float | None = None
    masked: dict[str, int] = field(default_factory=dict)
    found: tuple[Found, ...] = ()


@dataclass(frozen=True)
class Judging:
    """What the tasks of a run share. Equal where `inputs` are: the hash of all that decides, files' contents too."""

    inputs: str
    settings: CurationConfig = field(compare=False)
    benchmark_index: Path | None = field(compare=False, default=None)


@lru_cache(maxsize=8)
def judge_for(judging: Judging, source: str) -> Judge:
    """The judge of a source's documents, made once a process."""
    settings, index = judging.settings, judging.benchmark_index
    return Judge(settings, settings.rules_of(source), BenchmarkIndex.load(index) if index else None)


class Judge:
    """Judges a source's documents, some hundred at a time, as the quality model takes them."""

    def __init__(self, settings: CurationConfig, rules: HeuristicRules, index: BenchmarkIndex | None) -> None:
        self.settings, self.rules, self.index = settings, rules, index
        self.urls = UrlList.load(settings.blocked_urls) if settings.blocked_urls else None
        self.blocked_words = WordList.load(settings.blocked_words) if settings.blocked_words else None
        self.quality = QualityModel.load(settings.quality_model) if settings.quality_model else None

    def __call__(self, documents: Sequence[Document]) -> list[Judged]:
        judged = [self._judge(document) for document in documents]
        kept = {index: one.words for index, one in enumerate(judged) if one.reason is None and one.words is not None}
        if self.quality is None or not kept:
            return judged
        scores = self.quality.score([(words, judged[index].signals) for index, words in kept.items()])
        # What the encoder will score again is not judged by the first score.
        open_still = self.quality.uncertain(scores) if self.quality.has_encoder else np.zeros(len(scores), bool)
        for index, score, is_open in zip(kept, scores.tolist(), open_still.tolist(), strict=True):
            too_low = score < self.settings.min_quality and not is_open
            judged[index] = replace(judged[index], quality=score, reason="min_quality" if too_low else None)
        return judged

    def _judge(self, document: Document) -> Judged:
        settings = self.settings
        if self.urls and self.urls.blocks(document.url):
            return Judged(document.text, "blocked_url")
        language = identify(document.text)
        one = Judged(document.text, None, {"language_score": language.score}, language=language.code)
        if not language.is_one_of(settings.languages, settings.min_language_score):
            return replace(one, reason="language")

        verdict = judge(document.text, self.rules)
        words = verdict.words
        one = replace(one, text=verdict.text, words=words, signals=one.signals | verdict.signals)
        if verdict.reason is not None:
            return replace(one, reason=verdict.reason)
        one.signals["code_share"] = share = code_share(verdict.text)
        if share > settings.max_code_share:
            return replace(one, reason="max_code_share")
        if self.blocked_words and self.blocked_words.found(words):
            return replace(one, reason="blocked_word")
        if self.index and (matches := self.index.matches(words)):
            return replace(one, reason="contaminated", found=tuple(self._evidence(words, matches)))
        text, masked = mask(verdict.text, settings.mask)
        return replace(one, text=text, words=tokenize(text), masked=masked) if masked else one

    def _evidence(self, words: Words, matches: Sequence[Match]) -> Iterator[Found]:
        assert self.index is not None
        for match in matches:
            yield Found(match, self.index.item_text(match.benchmark, match.item), self.index.evidence(words, match))
