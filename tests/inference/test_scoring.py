from __future__ import annotations

import math

import numpy as np
import pytest

from danube_ray.inference.scoring import log_softmax, token_mean, windows


def test_the_error_of_equal_windows_is_the_usual_standard_error():
    means = np.array([1.0, 2.0, 4.0, 5.0])
    estimate = token_mean(10 * means, [10] * 4)
    assert estimate.value == 3.0
    assert estimate.error == pytest.approx(means.std(ddof=1) / math.sqrt(4))
    assert estimate.exp().value == pytest.approx(math.e**3)
    assert estimate.exp().error == pytest.approx(math.e**3 * estimate.error)


def test_the_error_covers_the_mean_as_often_as_it_should_when_tokens_of_a_window_agree():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        counts = random.integers(1, 40, 200)
        sums = random.normal(2.0, 1.0, 200) * counts  # one draw a window: tokens in it are worth one
        estimate = token_mean(sums, counts)
        covered += abs(estimate.value - 2.0) < 1.96 * estimate.error
    assert 0.91 < covered / 400 < 0.98


def test_one_window_has_no_error_bar():
    assert math.isnan(token_mean([3.0], [2]).error)


def test_log_softmax_of_large_logits_is_finite_and_sums_to_one():
    scores = log_softmax(np.array([[1000.0, 999.0, -1000.0]], np.float32))
    assert np.exp(scores).sum() == pytest.approx(1)
    assert scores[0, 0] - scores[0, 1] == pytest.approx(1)


def test_windows_cover_every_token_that_has_one_before_it_in_its_window():
    assert windows(np.arange(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert windows(np.arange(8), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
