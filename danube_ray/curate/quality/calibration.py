"""From a model's log-odds to a probability that holds, and where a model is unsure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from danube_ray.curate.quality.gbm import class_weights

LIMIT = 30.0  # log-odds beyond it change no probability that a float32 could tell from 0 or 1


@dataclass(frozen=True)
class Platt:
    """sigmoid(slope * log-odds + offset) (Platt, 1999): two numbers, and no two texts become equal, as in steps."""

    slope: float
    offset: float

    def __call__(self, log_odds: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(self.slope * log_odds + self.offset, -LIMIT, LIMIT)))


def calibrate(log_odds: np.ndarray, good: np.ndarray) -> Platt:
    """Fit on (N,) log-odds of texts that the model was not trained on; both classes weigh the same.

    Targets are Platt's, a little inside of 0 and 1: where the classes part without error, the probabilities are as
    sure as so many texts can make one.
    """
    from sklearn.linear_model import LogisticRegression

    numbers = np.where(good, good.sum(), (~good).sum())
    targets = np.where(good, numbers + 1, 1) / (numbers + 2)
    weights = class_weights(good)
    model = LogisticRegression(C=1e4)
    model.fit(
        np.concatenate((log_odds, log_odds))[:, None],
        np.repeat([True, False], len(good)),
        sample_weight=np.concatenate((targets * weights, (1 - targets) * weights)),
    )
    return Platt(np.ravel(model.coef_).item(), np.ravel(model.intercept_).item())


@dataclass(frozen=True)
class Band:
    """Where a probability is too near 1/2 to be trusted."""

    low: float
    high: float

    def holds(self, probabilities: np.ndarray) -> np.ndarray:
        """(N,) bool."""
        return (probabilities >= self.low) & (probabilities <= self.high)


NOWHERE = Band(1.0, 0.0)


def log_loss(probabilities: np.ndarray, good: np.ndarray) -> float:
    """The mean surprise at (N,) labels; nothing is surer than Platt's own limit."""
    of_label = np.where(good, probabilities, 1 - probabilities)
    return float(-np.log(np.maximum(of_label, np.exp(-LIMIT))).mean())


def least_certain(probabilities: np.ndarray, share: float) -> Band:
    """The band around 1/2 that holds about `share` of N probabilities; with 0 it holds nothing."""
    distances = np.sort(np.abs(probabilities - 0.5))
    number = round(share * len(distances))
    if number == 0:
        return NOWHERE
    width = float(distances[number - 1])
    return Band(0.5 - width, 0.5 + width)
