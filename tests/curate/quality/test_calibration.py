"""Calibration, the uncertain band, and the figures of the card, against what is known to be right."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from danube_ray.curate.quality.calibration import calibrate, least_certain
from danube_ray.curate.quality.metrics import at_threshold, auc, auc_interval, reliability

GENERATOR = np.random.default_rng(0)


def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
    """True log-odds and labels drawn by them."""
    log_odds = np.random.default_rng(1).normal(0, 2, number)
    return log_odds, np.random.default_rng(2).random(number) < 1 / (1 + np.exp(-log_odds))


def test_distorted_log_odds_are_calibrated_again():
    log_odds, good = drawn(20_000)
    platt = calibrate(3 * log_odds + 2, good)
    assert platt.slope == pytest.approx(1 / 3, rel=0.05)
    assert platt.offset == pytest.approx(-2 / 3, abs=0.05)
    for mean, share, _ in reliability(platt(3 * log_odds + 2), good):
        assert abs(mean - share) < 0.03


def test_classes_that_part_without_error_give_no_certainty():
    log_odds = np.concatenate((np.full(20, 9.0), np.full(20, -9.0)))
    platt = calibrate(log_odds, log_odds > 0)
    assert platt(log_odds).max() == pytest.approx(21 / 22, abs=0.01)  # Platt's target of 20 texts
    assert np.isfinite(platt(np.array([1e9, -1e9]))).all()


def test_classes_weigh_the_same_whatever_their_numbers():
    log_odds, good = drawn(40_000)
    few = good | (np.arange(len(good)) % 10 == 0)  # a tenth of the raw texts
    assert calibrate(log_odds[few], good[few])(np.zeros(1))[0] == pytest.approx(0.5, abs=0.03)


def test_the_band_holds_the_least_certain_share():
    probabilities = np.array([0.01, 0.2, 0.45, 0.52, 0.7, 0.97, 0.99, 0.999, 0.03, 0.05])
    band = least_certain(probabilities, 0.3)
    assert band.holds(probabilities).tolist() == [False, False, True, True, True] + [False] * 5
    assert band.low + band.high == pytest.approx(1)
    assert not least_certain(probabilities, 0.0).holds(np.array([0.0, 0.5, 1.0])).any()
    assert least_certain(probabilities, 1.0).holds(probabilities).all()


def test_auc_is_scikit_learns_with_ties_and_nan_for_one_class():
    good = GENERATOR.random(500) < 0.3
    scores = (GENERATOR.normal(0, 1, 500) + good).round(1)
    assert auc(scores, good) == pytest.approx(roc_auc_score(good, scores), abs=1e-12)
    assert np.isnan(auc(scores, np.ones(500, bool)))


def test_an_interval_by_documents_is_wider_than_one_by_passages():
    documents = np.repeat(np.arange(40), 10)
    good = documents % 2 == 0
    scores = np.repeat(GENERATOR.normal(0, 1, 40), 10) + good  # a document's passages score alike
    by_document = auc_interval(scores, good, documents, seed=0)
    by_passage = auc_interval(scores, good, np.arange(400), seed=0)
    assert by_document[0] < auc(scores, good) < by_document[1]
    assert np.diff(by_document) > 2 * np.diff(by_passage)


def test_precision_counts_both_classes_as_equally_frequent():
    good = np.array([True] * 2 + [False] * 8)
    found = at_threshold(np.array([0.9, 0.2, 0.8, 0.6, *[0.1] * 6]), good, 0.5)
    assert (found.recall, found.raw_kept) == (0.5, 0.25)
    assert found.precision == pytest.approx(0.5 / 0.75)
