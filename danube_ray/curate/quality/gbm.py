"""The gradient-boosted model: the rules' signals and the linear model's score, in LightGBM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from danube_ray.config import SIGNALS
from danube_ray.curate.quality import linear
from danube_ray.curate.quality.linear import LinearModel
from danube_ray.curate.quality.settings import QualitySettings

if TYPE_CHECKING:
    from lightgbm import Booster

# How long a text is tells its source (an abstract, a page, a chapter) more than its worth: no feature says it.
LENGTHS = {"words", "sentences", "stop_words"}
FEATURES = tuple(signal for signal in SIGNALS if signal not in LENGTHS)
LINEAR = "linear"
FOLDS = 5


def as_table(signals: Sequence[Mapping[str, float]], names: Sequence[str] = FEATURES) -> np.ndarray:
    """(N, F) float64: the named signals of N texts, NaN where one was not measured."""
    rows = [[row.get(name, np.nan) for name in names] for row in signals]
    return np.array(rows, np.float64).reshape(len(rows), len(names))


def out_of_fold_scores(
    texts: list[np.ndarray], labels: np.ndarray, weights: np.ndarray, documents: np.ndarray, settings: QualitySettings
) -> np.ndarray:
    """(N,) the linear score of each training text by a model that never saw its document.

    The linear model is nearly always right about what it was trained on: trees that saw such scores would trust it more
    than it deserves. documents: (N,) int, which document each text is of.
    """
    folds = documents % FOLDS
    scores = np.zeros(len(texts))
    for fold in range(FOLDS):
        seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(np.unique(labels[seen])) == 2:
            chosen = [texts[index] for index in seen]
            model = linear.train(chosen, labels[seen], weights[seen], settings.num_buckets, settings.seed)
            scores[unseen] = [model.score(texts[i]) for i in unseen]
    return scores


def train_linear_and_trees(
    texts: list[np.ndarray], signals: np.ndarray, labels: np.ndarray, documents: np.ndarray, settings: QualitySettings
) -> tuple[LinearModel, Booster]:
    """Both models on N texts: their `linear.buckets`, signals (N, F), labels (N,) bool and documents (N,) int."""
    weights = class_weights(labels)
    out_of_fold = out_of_fold_scores(texts, labels, weights, documents, settings)
    trees = train_trees(np.column_stack((signals, out_of_fold)), labels, weights, settings)
    return linear.train(texts, labels, weights, settings.num_buckets, settings.seed), trees


def train_trees(rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, settings: QualitySettings) -> Booster:
    """LightGBM on rows (N, F + 1); the same rows give the same trees, on any number of cores."""
    import lightgbm

    parameters = {
        "objective": "binary",
        "learning_rate": 0.05,
        "num_leaves": settings.num_leaves,
        "min_data_in_leaf": min(20, max(1, len(rows) // 20)),
        "feature_fraction": 0.8,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "lambda_l2": 1.0,
        "seed": settings.seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    data = lightgbm.Dataset(rows, labels.astype(np.float64), weight=weights, feature_name=[*FEATURES, LINEAR])
    return lightgbm.train(parameters, data, num_boost_round=settings.num_trees)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """(N,) float64: both classes weigh N / 2 in all."""
    good = labels.mean()
    return np.where(labels, 0.5 / max(good, 1e-9), 0.5 / max(1 - good, 1e-9))
