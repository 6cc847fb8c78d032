"""The reference mode: datatrove's decisions, reasons and texts, on texts made to break each rule and on real ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION
from trafilatura import html2txt

from danube_ray.config import RULES, WEB_RULES, ConfigError
from danube_ray.curate.heuristics import judge
from danube_ray.curate.punctuation import CLOSING, SYMBOLS
from danube_ray.curate.reference import DATATROVE_REASONS, SpacySplitter
from tests.benchmarks.rules_vs_datatrove import Datatrove, with_spacy
from tests.benchmarks.texts import MIN_CHARS, abstracts, encyclopedia_sections, novel_pieces, tar_texts
from tests.curate.test_heuristics import BROKEN, PROSE, VERSE, with_line

TRICKY = [
    PROSE,
    VERSE,
    with_line("Read more"),
    with_line("[1] [2] [3]"),
    with_line("It ends with a mark.[1] "),
    with_line("Here is lorem ipsum, and JavaScript."),
    with_line("Please turn JavaScript on { to see it."),
    with_line("A { in our privacy policy."),
    with_line("Mr. J. R. Smith can't (or won't) pay $1,234.56... e.g. at 5 p.m.!? \u201cNo.\u201d Yes"),
    "\ufeff\n\n" + PROSE.replace("\n", "\r\n") + "\n\n\n",
    PROSE.replace("\n", "\u2028").replace(" ", "\xa0"),
    PROSE.replace("\n", " \n \n") + " IS_ALPHA ID IS_ALPHA",
    *[PROSE + f"\n{letter} " * count for letter in ("-", "\u0964", "日本。", "a.b") for count in (3, 40)],
]


@pytest.fixture(scope="module")
def theirs():
    return Datatrove()


@pytest.fixture(scope="module")
def splitter():
    return SpacySplitter()


def test_every_rule_has_a_name_there():
    assert set(DATATROVE_REASONS) == set(RULES)
    assert len(set(DATATROVE_REASONS.values())) == len(RULES)


def test_punctuation_is_the_same():
    assert (SYMBOLS, CLOSING) == (PUNCTUATION_SET, TERMINAL_PUNCTUATION)


def test_bounds_are_the_same(theirs):
    repetition, gopher, c4, fineweb = theirs.filters
    bounds = {rule: getattr(WEB_RULES, rule) for rule in RULES}
    assert (bounds.pop("max_lorem_ipsum"), bounds.pop("max_curly_brackets")) == (0, 0)  # no numbers there
    assert bounds == {
        "min_words": gopher.min_doc_words,
        "max_words": gopher.max_doc_words,
        "min_mean_word_chars": gopher.min_avg_word_length,
        "max_mean_word_chars": gopher.max_avg_word_length,
        "max_hash_signs": gopher.max_symbol_word_ratio,
        "max_ellipses": gopher.max_symbol_word_ratio,
        "max_bullet_lines": gopher.max_bullet_lines_ratio,
        "max_ellipsis_lines": gopher.max_ellipsis_lines_ratio,
        "min_alphabetic_words": gopher.max_non_alpha_words_ratio,  # which is a minimum by another name
        "min_stop_words": gopher.min_stop_words,
        "max_duplicate_paragraphs": repetition.dup_para_frac,
        "max_duplicate_paragraph_chars": repetition.dup_para_char_frac,
        "max_duplicate_lines": repetition.dup_line_frac,
        "max_duplicate_line_chars": repetition.dup_line_char_frac,
        **{f"max_top_{n}gram_chars": share for n, share in repetition.top_n_grams},
        **{f"max_duplicate_{n}gram_chars": share for n, share in repetition.dup_n_grams},
        "min_sentences": c4.min_num_sentences,
        "min_punctuated_lines": fineweb.line_punct_thr,
        "max_short_lines": fineweb.short_line_threshold,
        "max_repeated_line_chars": fineweb.char_duplicates_ratio,
        "max_newlines_per_word": fineweb.new_line_ratio,
    }
    lines = WEB_RULES.lines
    assert (lines.min_words, lines.max_word_chars) == (c4.min_words_per_line, c4.max_word_length)


@pytest.mark.parametrize("text", [*BROKEN.values(), *TRICKY])
def test_made_texts_are_decided_alike(text, theirs, splitter):
    assert with_spacy(text, splitter) == theirs(text)


def real_texts(data: Path) -> Iterator[str]:
    yield from islice(abstracts(data), 0, None, 25)
    yield from islice(encyclopedia_sections(data), 0, None, 9)
    yield from islice(novel_pieces(data), 90)
    yield from map(html2txt, islice(tar_texts(data / "web" / "html_trafilatura" / "html.tar.xz"), 160))


def test_real_texts_are_decided_alike(shared_data, theirs, splitter):
    texts = [text for text in real_texts(shared_data) if MIN_CHARS <= len(text) <= 3_000]
    found = [theirs(text) for text in texts]
    assert [with_spacy(text, splitter) for text in texts] == found
    assert len(texts) > 200 and len({reason for reason, _ in found}) > 8

    default = [judge(text, WEB_RULES).reason is None for text in texts]
    same = sum(kept == (reason is None) for kept, (reason, _) in zip(default, found, strict=True))
    assert same / len(texts) > 0.93


def test_the_reference_says_that_it_needs_spacy(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match="pip install spacy"):
        SpacySplitter()
