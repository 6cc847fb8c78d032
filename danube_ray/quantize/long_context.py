"""What quantization costs far into a long context: divergence by position, and words to be found again.

Two checks, each against the float model on the same prompts, because neither is absolute: a model can only lose what it
had. Divergence by position says something of any model. Retrieval hides five words in a text and asks for them at its
end; a word counts where it is the likeliest of ten, so chance is one in ten, and a model too small to find them is seen
to be: then nothing follows from its quantized files finding as little.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from danube_ray.config import require
from danube_ray.data.tokenizer import SPACE, Tokenizer
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.scoring import token_mean
from danube_ray.quantize.divergence import score, summarize
from danube_ray.quantize.measure import Passage

MOST_WINDOWS = 4  # of the longest usable context
NUM_SPANS = 5  # of positions, each twice as long as the one before
ROWS_PER_SPAN = 64
LENGTHS = (0.25, 0.5, 1.0)  # of the context
DEPTHS = (0.0, 0.5, 1.0)  # where the words stand: at the beginning, in the middle, shortly before the question
PROMPTS_PER_CELL = 2
NUM_WORDS, NUM_CHOICES = 5, 10
SEED = 1234


@dataclass(frozen=True)
class Needle(Passage):
    """A prompt that ends in the words hidden in it. `rows` stand before those words; `choices` are the ten ids."""

    length: int
    depth: float
    choices: np.ndarray

    def found(self, logits: np.ndarray) -> int:
        """How many of the words are the likeliest of the ten where they stand (those before them are given)."""
        return int((self.choices[logits[:, self.choices].argmax(axis=1)] == self.labels).sum())


@dataclass(frozen=True)
class LongContext:
    """What both models read: long windows of a text, and prompts with words to be found again."""

    context: int
    windows: list[Passage]
    needles: list[Needle]

    @property
    def passages(self) -> list[Passage]:
        """All of them, in the order in which `compare_far` takes the reference's logits."""
        return [*self.windows, *self.needles]


def long_context(tokens: np.ndarray, context: int, tokenizer: Tokenizer) -> LongContext:
    """The check at `context` tokens on a text of at least as many."""
    remedy = "give a longer text, or leave the long-context check out"
    require(len(tokens) >= context, "tokens of the long-context check", len(tokens), f"at least {context}", remedy)
    require(context >= 128, "context of the long-context check", context, "at least 128", "a short one says nothing")
    known = [(start, min(end, context - 1)) for start, end in spans(context)]  # after the last token nothing is
    rows = np.concatenate([np.unique(np.linspace(a, b - 1, ROWS_PER_SPAN).astype(int)) for a, b in known])
    starts = range(0, min(len(tokens) - context + 1, MOST_WINDOWS * context), context)
    windows = [Passage(tokens[start : start + context].astype(np.int32), rows) for start in starts]
    return LongContext(context, windows, list(needles(tokens, context, tokenizer)))


def spans(context: int) -> list[tuple[int, int]]:
    """Ranges of positions that double in length: the last one is the second half of the context."""
    edges = [0, *(context >> shift for shift in range(NUM_SPANS - 1, -1, -1))]
    return list(pairwise(edges))


def needles(tokens: np.ndarray, context: int, tokenizer: Tokenizer) -> Iterator[Needle]:
    """A prompt for each length, depth and repetition: text, the words, text again, the question and the words again."""
    random = np.random.default_rng(SEED)
    choices = ten_words(tokenizer)
    said = np.array(tokenizer.encode("The secret words are"), np.int32)
    for length in (int(share * context) for share in LENGTHS):
        filler = length - 2 * (len(said) + NUM_WORDS)
        for depth in DEPTHS:
            for _ in range(PROMPTS_PER_CELL):
                words = random.choice(choices, NUM_WORDS, replace=False)
                start = random.integers(0, len(tokens) - filler + 1)
                text = tokens[start : start + filler].astype(np.int32)
                before, after = np.split(text, [round(depth * filler)])
                ids = np.concatenate([before, said, words, after, said, words])
                rows = np.arange(len(ids) - 1 - NUM_WORDS, len(ids) - 1)
                yield Needle(ids, rows, length=length, depth=depth, choices=choices)


def ten_words(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of ten words that are one piece each, spread over the tokenizer's commonest: (10,) int32."""
    words = [index for index, piece in enumerate(tokenizer.pieces) if re.fullmatch(f"{SPACE}[a-z]{{3,}}", piece)]
    remedy = "leave the long-context check out"
    require(len(words) >= NUM_CHOICES, "words that are one piece", len(words), f"at least {NUM_CHOICES}", remedy)
    common = words[:500]
    return np.array(common[:: len(common) // NUM_CHOICES][:NUM_CHOICES], np.int32)


def compare_far(model: GgufModel, check: LongContext, reference: Iterable[np.ndarray]) -> dict[str, Any]:
    """A level's part of the table, `long_context`:

    `context`; `by_position`: rows of `start`, `end` (positions), `kld_mean`, `kld_error`, `same_top`;
    `retrieval`: rows of `length`, `depth`, `found`, `reference_found` (shares of the words), `words`;
    `found`, `found_error`, `reference_found`: over all prompts; `chance`.
    """
    wanted = iter(reference)
    windows = [score(next(wanted), text.logits(model), text.labels) for text in check.windows]
    rows = check.windows[0].rows
    by_position = []
    for start, end in spans(check.context):
        part = summarize([window.at((start <= rows) & (rows < end)) for window in windows])
        values = {"kld_mean": part.kld_mean, "kld_error": part.kld_error, "same_top": part.same_top}
        by_position.append({"start": start, "end": end, **values})
    found = [(needle.found(needle.logits(model)), needle.found(next(wanted))) for needle in check.needles]
    share = token_mean([mine for mine, _ in found], [NUM_WORDS] * len(found))
    return {
        "context": check.context,
        "by_position": by_position,
        "retrieval": _by_cell(check.needles, found),
        "found": share.value,
        "found_error": share.error,
        "reference_found": sum(theirs for _, theirs in found) / (NUM_WORDS * len(found)),
        "chance": 1 / NUM_CHOICES,
    }


def _by_cell(prompts: Sequence[Needle], found: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    cells: dict[tuple[int, float], list[tuple[int, int]]] = {}
    for prompt, pair in zip(prompts, found, strict=True):
        cells.setdefault((prompt.length, prompt.depth), []).append(pair)
    return [
        {
            "length": length,
            "depth": depth,
            "found": sum(mine for mine, _ in pairs) / (NUM_WORDS * len(pairs)),
            "reference_found": sum(theirs for _, theirs in pairs) / (NUM_WORDS * len(pairs)),
            "words": NUM_WORDS * len(pairs),
        }
        for (length, depth), pairs in cells.items()
    ]
