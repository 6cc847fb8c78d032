"""Which lines of a page are its text, and whether they are prose (C4: Raffel et al., 2020, section 2.2)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from danube_ray.config import LineRules
from danube_ray.curate.words import Words

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
CLOSING = (".", "?", "!", '"', "'")
CUT_OFF = "..."
PLACEHOLDER, SCRIPT, BRACKET = "lorem ipsum", "javascript", "{"
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass(frozen=True)
class Body:
    """The lines of a text that are left, stripped, and the placeholders and curly brackets (per word) in them.

    is_whole: whether nothing but white space was left out.
    """

    text: str
    is_whole: bool
    lorem_ipsum: float
    curly_brackets: float


def body_of(words: Words, rules: LineRules, max_lorem_ipsum: float, max_curly_brackets: float) -> Body:
    """The body of a text; it ends with the first line that brings a signal over its bound, and so names the reason."""
    text, num_words = words.text, max(1, len(words))
    lowered = text.lower()
    is_marked = BRACKET in text or any(mark in lowered for mark in (PLACEHOLDER, SCRIPT, *POLICIES))
    is_cited = rules.citations and CITATION.search(text) is not None
    num_lines = lorem_ipsum = curly_brackets = 0
    kept: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if not line:
            continue
        num_lines += 1
        if len(line.split(None, rules.min_words - 1)) < rules.min_words:
            continue
        if len(line) > rules.max_word_chars and len(max(line.split(), key=len)) > rules.max_word_chars:
            continue
        if is_cited:
            line = CITATION.sub("", line)
        if rules.closed and (not line.endswith(CLOSING) or line.endswith(CUT_OFF)):
            continue
        if is_marked:
            lowered = line.lower()
            lorem_ipsum += lowered.count(PLACEHOLDER)
            if lorem_ipsum > max_lorem_ipsum:
                break
            if rules.scripts and SCRIPT in lowered:
                continue
            curly_brackets += line.count(BRACKET)
            if curly_brackets / num_words > max_curly_brackets:
                break
            if rules.policies and any(phrase in lowered for phrase in POLICIES):
                continue
        kept.append(line)
    is_whole = len(kept) == num_lines and not is_cited
    return Body("\n".join(kept).strip(), is_whole, lorem_ipsum, curly_brackets / num_words)
