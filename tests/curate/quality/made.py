"""Passages without files, for tests of what is trained on them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from danube_ray.config import NO_RULES
from danube_ray.curate.heuristics import judge
from danube_ray.curate.quality.examples import Passages
from danube_ray.curate.quality.gbm import as_table
from danube_ray.curate.quality.linear import buckets
from danube_ray.curate.quality.settings import QualitySettings


def passages_of(sources: Mapping[str, tuple[bool, list[str]]], settings: QualitySettings) -> Passages:
    """By source: whether it is good, and its texts, each a document; of five, three are trained on."""
    texts = [text for _, rows in sources.values() for text in rows]
    source = np.repeat(np.arange(len(sources)), [len(rows) for _, rows in sources.values()])
    place = np.concatenate([np.arange(len(rows)) for _, rows in sources.values()]) % 5
    verdicts = [judge(text, NO_RULES) for text in texts]
    return Passages(
        sources=tuple(sources),
        source=source,
        good=np.array([good for good, _ in sources.values()])[source],
        document=np.arange(len(texts)),
        part=np.array(["held-out", "calibration", "training", "training", "training"])[place],
        passes=np.ones(len(texts), bool),
        signals=as_table([verdict.signals for verdict in verdicts]),
        buckets=[buckets(verdict.words, settings.num_buckets) for verdict in verdicts],
        texts=texts,
    )
