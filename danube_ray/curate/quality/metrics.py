"""How well probabilities tell good from raw: what the card states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from danube_ray.curate.quality.gbm import class_weights

RESAMPLES = 200
BINS = 10


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """The chance that a good text scores above a raw one (ties count half); NaN without both. (N,) each."""
    num_good = int(good.sum())
    num_raw = len(good) - num_good
    if not num_good or not num_raw:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1, the mean of ties
    return float((ranks[good].sum() - num_good * (num_good + 1) / 2) / (num_good * num_raw))


def auc_interval(scores: np.ndarray, good: np.ndarray, documents: np.ndarray, seed: int) -> tuple[float, float]:
    """Where the AUC lies with about 95 %: resampled by document, as passages of one document are alike."""
    generator = np.random.default_rng(seed)
    order = np.argsort(documents, kind="stable")
    starts = np.flatnonzero(np.diff(documents[order], prepend=-1))
    groups = np.split(order, starts[1:])
    good_groups = [group for group in groups if good[group[0]]]
    raw_groups = [group for group in groups if not good[group[0]]]
    drawn = []
    for _ in range(RESAMPLES):
        rows = [
            side[index]
            for side in (good_groups, raw_groups)
            for index in generator.integers(0, len(side), len(side)).tolist()
        ]
        rows = np.concatenate(rows)
        drawn.append(auc(scores[rows], good[rows]))
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


@dataclass(frozen=True)
class Operation:
    """What keeping texts of at least a threshold means, both classes weighing the same."""

    precision: float
    recall: float
    raw_kept: float


def at_threshold(probabilities: np.ndarray, good: np.ndarray, threshold: float) -> Operation:
    """(N,) probabilities and labels, both classes there."""
    kept = probabilities >= threshold
    recall, raw_kept = float(kept[good].mean()), float(kept[~good].mean())
    return Operation(recall / max(recall + raw_kept, 1e-12), recall, raw_kept)


def reliability(probabilities: np.ndarray, good: np.ndarray) -> list[tuple[float, float, int]]:
    """By tenth of the scale that holds any: mean probability, share of good texts, number; classes weigh the same."""
    weights = class_weights(good)
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    rows = []
    for number in np.unique(bins):
        inside = bins == number
        mean = np.average(probabilities[inside], weights=weights[inside])
        share = np.average(good[inside], weights=weights[inside])
        rows.append((float(mean), float(share), int(inside.sum())))
    return rows
