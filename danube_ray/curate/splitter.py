"""How the rules split a text into words and sentences: by patterns, or as another tool does (`curate.reference`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from danube_ray.curate.words import Words, tokenize

# The end of a sentence inside of a line.
SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*[^\S\n]")


class Splitter(Protocol):
    def words(self, text: str) -> Words:
        """The words of a text. White space parts them, and how much of it does not matter."""
        ...

    def count_sentences(self, text: str) -> int:
        """The sentences of a text whose every line, set apart by a line feed alone, ends one."""
        ...


@dataclass(frozen=True)
class PatternSplitter:
    """The words of `curate.words`, and a sentence wherever closing punctuation stands before white space."""

    def words(self, text: str) -> Words:
        return tokenize(text)

    def count_sentences(self, text: str) -> int:
        return len(SENTENCE_END.findall(text)) + text.count("\n") + 1 if text else 0


PATTERNS = PatternSplitter()
