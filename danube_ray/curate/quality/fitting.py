"""Train the gradient-boosted model, and measure both models for the card."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from danube_ray.config import NO_RULES
from danube_ray.curate.heuristics import judge
from danube_ray.curate.quality.calibration import NOWHERE, Platt, calibrate, least_certain, log_loss
from danube_ray.curate.quality.encoder import Encoder
from danube_ray.curate.quality.examples import Passages
from danube_ray.curate.quality.gbm import train_linear_and_trees
from danube_ray.curate.quality.linear import buckets
from danube_ray.curate.quality.metrics import at_threshold, auc, auc_interval, reliability
from danube_ray.curate.quality.model import QualityModel
from danube_ray.curate.quality.settings import QualitySettings

# What the encoder's calibration and figures are made of, of each class: it is slow.
JUDGED_BY_ENCODER = 500
TIMED = 200
LARGER_CLASS = 4


def fit(passages: Passages, settings: QualitySettings) -> QualityModel:
    """Train on the training part, then calibrate and choose the band on the calibration part."""
    training, calibration = passages.of("training"), passages.of("calibration")
    model = QualityModel(
        *train_linear_and_trees(training.buckets, training.signals, training.good, training.document, settings),
        platt=Platt(1.0, 0.0),
        band=NOWHERE,
        threshold=settings.threshold,
    )
    platt = calibrate(log_odds(model, calibration), calibration.good)
    raw = calibration.select(~calibration.good)
    band = least_certain(platt(log_odds(model, raw)), settings.encoder_share) if settings.encoder else NOWHERE
    return replace(model, platt=platt, band=band)


def log_odds(model: QualityModel, passages: Passages) -> np.ndarray:
    return model.log_odds(passages.buckets, passages.signals)


def for_encoder(passages: Passages, most: int) -> Passages:
    """What an encoder is trained on: at most `most` passages of a class, and 4 times as many as of the other."""
    numbers = int(passages.good.sum()), int((~passages.good).sum())
    return some_of_each(passages, min(most, LARGER_CLASS * min(numbers)))


def some_of_each(passages: Passages, most: int) -> Passages:
    """At most so many good and raw passages, the first ones of an order that says nothing."""
    kept = [np.flatnonzero(passages.good == label)[:most] for label in (True, False)]
    return passages.select(np.sort(np.concatenate(kept)))


def calibrate_encoder(
    model: QualityModel, encoder: Encoder, passages: Passages, settings: QualitySettings
) -> QualityModel:
    """The model with the encoder's calibration, on the calibration part.

    The encoder is asked nowhere if it is no better, in the band, than the trees it would overrule.
    """
    judged = some_of_each(passages.of("calibration"), JUDGED_BY_ENCODER)
    encoded, trees = encoder.log_odds(judged.texts), model.platt(log_odds(model, judged))
    platt, inside = calibrate(encoded, judged.good), model.uncertain(trees)
    good = judged.good[inside]
    helps = bool(inside.any()) and log_loss(platt(encoded[inside]), good) < log_loss(trees[inside], good)
    return replace(model, encoder=platt, band=model.band if helps or settings.always_ask_encoder else NOWHERE)


@dataclass(frozen=True)
class Measured:
    """A model's figures on the held-out part. `reliability` is as of `metrics.reliability`.

    `auc_passing` is among the texts that the rules would let pass, NaN where one class has none.
    """

    auc: float
    auc_low: float
    auc_high: float
    auc_passing: float
    precision: float
    recall: float
    raw_kept: float
    reliability: list[tuple[float, float, int]]


def measure(
    model: QualityModel, encoder: Encoder | None, passages: Passages, settings: QualitySettings
) -> dict[str, Any]:
    """The card's figures on the held-out part: of each model, what goes to the encoder, and how fast each part is."""
    held_out = passages.of("held-out")
    if encoder is not None:
        held_out = some_of_each(held_out, JUDGED_BY_ENCODER)
    probabilities = {"gbm": model.platt(log_odds(model, held_out))}
    in_band = model.uncertain(probabilities["gbm"])
    if encoder is not None and model.encoder is not None:
        probabilities["encoder"] = model.encoder(encoder.log_odds(held_out.texts))
        probabilities["cascade"] = np.where(in_band, probabilities["encoder"], probabilities["gbm"])
    return {
        "models": {name: asdict(_measured(values, held_out, settings)) for name, values in probabilities.items()},
        "sent_to_encoder": {
            "of_raw": float(in_band[~held_out.good].mean()),
            "of_good": float(in_band[held_out.good].mean()),
        },
        "documents_per_s": _speeds(model, encoder, some_of_each(held_out, TIMED)),
    }


def _measured(probabilities: np.ndarray, held_out: Passages, settings: QualitySettings) -> Measured:
    good, passes = held_out.good, held_out.passes
    low, high = auc_interval(probabilities, good, held_out.document, settings.seed)
    operation = at_threshold(probabilities, good, settings.threshold)
    return Measured(
        auc=auc(probabilities, good),
        auc_low=low,
        auc_high=high,
        auc_passing=auc(probabilities[passes], good[passes]),
        precision=operation.precision,
        recall=operation.recall,
        raw_kept=operation.raw_kept,
        reliability=reliability(probabilities, good),
    )


def _speeds(model: QualityModel, encoder: Encoder | None, some: Passages) -> dict[str, float]:
    """Documents/s of each part, on one thread, of passages as they are in training."""
    verdicts, rules = _timed(lambda: [judge(text, NO_RULES) for text in some.texts])
    texts, hashed = _timed(lambda: [buckets(verdict.words, model.num_buckets) for verdict in verdicts])
    _, linear = _timed(lambda: [model.linear.score(text) for text in texts])
    _, scored = _timed(lambda: model.log_odds(texts, some.signals))
    seconds = {"rules": rules, "n-grams": hashed + linear, "trees": scored - linear}
    if encoder is not None:
        asked = some_of_each(some, 32)
        seconds["encoder"] = _timed(lambda: encoder.log_odds(asked.texts))[1] * len(some) / len(asked)
    return {name: len(some) / max(each, 1e-9) for name, each in seconds.items()}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started
