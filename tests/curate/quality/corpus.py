"""Made-up labelled text: sentences of a register, good or raw, with the quirks of a source."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from danube_ray.curate.quality.settings import EncoderSettings, QualitySettings

COMMON = ("the", "of", "and", "that", "with", "have", "was", "this", "from", "which", "their", "each", "they", "more")
GOOD = ("evidence", "method", "therefore", "century", "analysis", "river", "theory", "measured", "described", "history")
RAW = ("click", "buy", "free", "subscribe", "login", "cookies", "offer", "discount", "menu", "share", "tweet", "cart")
TINY = QualitySettings(num_buckets=2**14, num_trees=40, num_leaves=7, passages_per_source=400, encoder=None)
TINY_ENCODER = EncoderSettings(
    vocab_size=300, num_layers=1, hidden_size=32, num_heads=2, max_tokens=64, epochs=4, batch_size=8,
    learning_rate=3e-3, cpus_per_worker=1,
)  # fmt: skip


def text(generator: np.random.Generator, good: bool, quirk: Iterable[str] = (), register: float = 0.25) -> str:
    """Some twelve sentences; a share `register` of the words tells good from raw, and some are the source's own."""
    special, own = (GOOD if good else RAW), list(quirk)
    sentences = []
    for _ in range(12):
        draws = generator.random(14)
        words = [str(generator.choice(special if draw < register else COMMON)) for draw in draws]
        if own:
            words[int(generator.integers(14))] = str(generator.choice(own))
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)


def write_source(path: Path, seed: int, good: bool, number: int, quirk: Iterable[str] = ()) -> Path:
    """JSON lines of `number` documents."""
    generator = np.random.default_rng(seed)
    rows = [{"text": text(generator, good, quirk), "url": f"{path.stem}/{index}"} for index in range(number)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
