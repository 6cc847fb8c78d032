"""The rules that a document is judged by, and the named sets of them (`danube_ray.curate.heuristics` measures).

A rule is a field of `HeuristicRules`: `min_X` or `max_X` bounds the signal `X`, and its name is the reason of a drop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from danube_ray.config.check import require

OFF = 1e9


@dataclass(frozen=True, kw_only=True)
class LineRules:
    """Which lines are the body of a document: what C4's and FineWeb's rules look at.

    Args:
        rewrite: whether the document is cut down to its body, or stays as it is.
        min_words: lines with fewer words (between white space) are left out.
        max_word_chars: lines with a longer word are left out.
        closed: leave out lines that don't end in closing punctuation, or are cut off by an ellipsis; FineWeb doesn't.
        scripts: leave out lines that mention JavaScript.
        policies: leave out lines that mention terms of use or cookies.
        citations: cut marks of citations and edits, [1] and [edit], out of lines.
    """

    rewrite: bool = True
    min_words: int = 3
    max_word_chars: int = 1_000
    closed: bool = False
    scripts: bool = True
    policies: bool = True
    citations: bool = True

    def __post_init__(self) -> None:
        for name in ("min_words", "max_word_chars"):
            require(getattr(self, name) >= 1, f"LineRules.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True, kw_only=True)
class HeuristicRules:
    """Bounds on a document's signals; a value on the bound passes, so a share at 1 or a minimum at 0 is off.

    The defaults are for web pages: the papers' thresholds (Rae et al., 2021, A1.1; Raffel et al., 2020, 2.2; Penedo et
    al., 2024, 3.6), as FineWeb combines them.
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
    # C4, in the lines of the body: placeholders, code, and pages without sentences.
    max_lorem_ipsum: float = 0
    max_curly_brackets: float = 0
    min_sentences: float = 5
    # FineWeb, over the same lines. `repeated_line_chars` is a share of the characters without line breaks.
    min_punctuated_lines: float = 0.12
    max_short_lines: float = 0.67
    max_repeated_line_chars: float = 0.01
    max_newlines_per_word: float = 0.30
    # C4 again: which lines are the body, and whether the document is cut down to it.
    lines: LineRules = field(default_factory=LineRules)
    # FineWeb asks for repetition before quality. That drops the same documents, and tiny ones for other reasons.
    repetition_first: bool = False

    def __post_init__(self) -> None:
        for name in RULES:
            require(getattr(self, name) >= 0, f"HeuristicRules.{name}", getattr(self, name), "0 or more")

    def broken(self, signals: Mapping[str, float]) -> str | None:
        """The first rule that these signals break, in their order."""
        for signal, value in signals.items():
            for rule, is_minimum in RULES_OF[signal]:
                bound = getattr(self, rule)
                if (value < bound) if is_minimum else (value > bound):
                    return rule
        return None


RULES = tuple(rule.name for rule in fields(HeuristicRules) if rule.name.startswith(("min_", "max_")))
SIGNALS = tuple(dict.fromkeys(rule[4:] for rule in RULES))
RULES_OF = {signal: [(rule, rule.startswith("min_")) for rule in RULES if rule[4:] == signal] for signal in SIGNALS}

WEB_RULES = HeuristicRules()
NO_RULES = replace(
    WEB_RULES, lines=LineRules(rewrite=False), **{rule: 0.0 if rule.startswith("min_") else OFF for rule in RULES}
)
RULE_SETS = {
    # FineWeb's: all four groups, and lines may end without punctuation.
    "web": WEB_RULES,
    # C4's stricter lines: navigation goes, but so do headings and lists.
    "c4": replace(WEB_RULES, lines=LineRules(closed=True)),
    # Books, encyclopedias and papers were edited, and nothing in them stems from a page around the text. Their lines
    # may be verse, dialogue, headings or wrapped at a margin, and their length is no sign of anything; brackets are
    # mathematics; an abstract may have three sentences. A line that holds a space alone is a line like others, so
    # repeated ones count by characters, not by number. What stays tells broken or repeated text from sound text.
    "prose": replace(
        WEB_RULES,
        lines=LineRules(rewrite=False),
        max_words=OFF,
        max_duplicate_paragraphs=1,
        max_duplicate_lines=1,
        min_alphabetic_words=0.50,
        max_curly_brackets=OFF,
        min_sentences=2,
        min_punctuated_lines=0,
        max_short_lines=1,
        max_repeated_line_chars=0.20,
        max_newlines_per_word=OFF,
    ),
    "none": NO_RULES,
}
