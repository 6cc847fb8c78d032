"""Whether lines read like paragraphs, not like menus and lists (FineWeb: Penedo et al., 2024, section 3.6)."""

from __future__ import annotations

from danube_ray.curate.punctuation import CLOSING
from danube_ray.curate.repetition import duplicates

SHORT_LINE_CHARS = 30


def line_shape(text: str, num_words: int) -> dict[str, float]:
    """Signals of the lines that are not blank. `repeated_line_chars`: of the characters without line breaks."""
    lines = [line for line in text.split("\n") if line and not line.isspace()] or [""]
    newlines = text.count("\n")
    return {
        "punctuated_lines": sum(line[-1:] in CLOSING for line in lines) / len(lines),
        "short_lines": sum(len(line) <= SHORT_LINE_CHARS for line in lines) / len(lines),
        "repeated_line_chars": duplicates(lines)[1] / max(1, len(text) - newlines),
        "newlines_per_word": newlines / max(1, num_words),
    }
