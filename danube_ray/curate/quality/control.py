"""Did the model learn quality, or which source a text is from? The same training on shuffled labels tells.

Labels come from folders, so telling sources apart is enough to be right about held-out documents of the same sources,
whatever good means. Two things tell one from the other, and only together:

- the labels are shuffled over the sources, so that good means nothing but a set of names. What such a model reaches on
  held-out documents of its sources can be had by recognising them; only what the true labels reach beyond it can't;
- a source is left out of training and judged against held-out documents of the other class. Names don't help there. A
  new source can look unlike everything trained on and still fall on the right side by chance, so the shuffled labels,
  whose right side means nothing, are the level to compare with here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from danube_ray.curate.quality.calibration import NOWHERE, Platt
from danube_ray.curate.quality.examples import Passages
from danube_ray.curate.quality.gbm import train_linear_and_trees
from danube_ray.curate.quality.metrics import auc
from danube_ray.curate.quality.model import QualityModel
from danube_ray.curate.quality.settings import QualitySettings

# Enough to tell 0.9 from 0.95; the control trains many models.
PASSAGES_PER_SOURCE = 1_000


@dataclass(frozen=True)
class Labeling:
    """AUCs of models trained with these sources as the good ones.

    documents: on held-out documents of the sources trained on; left_out: by source, on that source, unseen, against
    held-out documents of the other class.
    """

    good: tuple[str, ...]
    documents: float
    left_out: dict[str, float]

    @property
    def mean_left_out(self) -> float:
        return float(np.mean(list(self.left_out.values()))) if self.left_out else float("nan")


@dataclass(frozen=True)
class Control:
    """The true labels, and the same labels dealt out otherwise; none with fewer than 3 sources."""

    true: Labeling
    shuffled: tuple[Labeling, ...]


def control(passages: Passages, settings: QualitySettings) -> Control:
    """Train the gradient-boosted model again and again, on at most 1,000 training passages of each source."""
    passages = _fewer(passages)
    true = tuple(bool(passages.good[passages.source == number][0]) for number in range(len(passages.sources)))
    others = _other_labelings(true, set(passages.source[passages.part == "held-out"].tolist()))
    drawn = np.random.default_rng(settings.seed).permutation(len(others))[: settings.control_labelings]
    shuffled = tuple(_train(passages, others[index], settings) for index in sorted(drawn.tolist()))
    return Control(_train(passages, true, settings), shuffled)


def _other_labelings(true: tuple[bool, ...], measured: set[int]) -> list[tuple[bool, ...]]:
    """Every other choice of as many good sources, with `measured` ones in both classes; of mirror images one."""
    found: list[tuple[bool, ...]] = []
    for chosen in combinations(range(len(true)), sum(true)):
        labels = tuple(number in chosen for number in range(len(true)))
        is_new = {labels, tuple(not label for label in labels)}.isdisjoint((true, *found))
        if is_new and len({labels[number] for number in measured}) == 2:
            found.append(labels)
    return found


def _train(passages: Passages, labels: tuple[bool, ...], settings: QualitySettings) -> Labeling:
    good = np.array(labels)[passages.source]
    held_out = passages.part == "held-out"
    scores = _scores(passages, good, ~held_out, held_out, settings)
    left_out = {}
    for number, name in enumerate(passages.sources):
        if sum(label == labels[number] for label in labels) > 1:
            unseen = passages.source == number
            judged = unseen | (held_out & (good != labels[number]))
            found = _scores(passages, good, ~held_out & ~unseen, judged, settings)
            left_out[name] = auc(found, good[judged])
    named = tuple(name for name, label in zip(passages.sources, labels, strict=True) if label)
    return Labeling(named, auc(scores, good[held_out]), left_out)


def _scores(
    passages: Passages, good: np.ndarray, trained: np.ndarray, judged: np.ndarray, settings: QualitySettings
) -> np.ndarray:
    """The log-odds of the `judged` rows by a model of the `trained` ones, both (N,) bool."""
    seen, asked = passages.select(trained), passages.select(judged)
    model = train_linear_and_trees(seen.buckets, seen.signals, good[trained], seen.document, settings)
    return QualityModel(*model, Platt(1.0, 0.0), NOWHERE, 0.5).log_odds(asked.buckets, asked.signals)


def _fewer(passages: Passages) -> Passages:
    kept = [
        np.flatnonzero((passages.source == number) & is_part)[:PASSAGES_PER_SOURCE]
        for number in range(len(passages.sources))
        for is_part in (passages.part == "held-out", passages.part != "held-out")
    ]
    return passages.select(np.sort(np.concatenate(kept)))
