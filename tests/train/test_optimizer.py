from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from torch import nn

from danube_ray.config import OptimizerConfig
from danube_ray.train.optimizer import build_optimizer, learning_rate_at

CONFIG = OptimizerConfig(learning_rate=2e-4, min_learning_rate=1e-5, warmup_steps=100)


def test_the_schedule_warms_up_peaks_and_ends_at_its_minimum():
    rates = [learning_rate_at(step, 1000, CONFIG) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-6) and rates[99] == pytest.approx(2e-4) and rates[100] == pytest.approx(2e-4)
    assert rates[550] == pytest.approx((2e-4 + 1e-5) / 2)  # half way down the cosine
    assert rates[999] == pytest.approx(1e-5, rel=1e-3)
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_wsd_holds_the_peak_and_falls_in_a_line_over_the_last_tenth():
    config = dataclasses.replace(CONFIG, schedule="wsd", decay_fraction=0.1)
    rates = [learning_rate_at(step, 1000, config) for step in range(1000)]
    assert rates[:100] == [learning_rate_at(step, 1000, CONFIG) for step in range(100)]
    assert rates[100:901] == pytest.approx([2e-4] * 801)
    falls = [before - after for before, after in pairwise(rates[900:])]
    assert falls == pytest.approx([(2e-4 - 1e-5) / 100] * 99)
    assert rates[999] - falls[-1] == pytest.approx(1e-5)  # the minimum, where one more step would stand


def test_a_decay_longer_than_the_warmup_leaves_begins_after_it():
    config = dataclasses.replace(CONFIG, schedule="wsd", decay_fraction=1.0)
    rates = [learning_rate_at(step, 200, config) for step in range(200)]
    assert max(rates) == rates[99] == rates[100] == pytest.approx(2e-4)
    assert rates[150] == pytest.approx((2e-4 + 1e-5) / 2)


def test_a_constant_schedule_stays():
    config = OptimizerConfig(learning_rate=1e-3, min_learning_rate=0.0, warmup_steps=0, schedule="constant")
    assert {learning_rate_at(step, 10, config) for step in range(10)} == {1e-3}


def test_norms_do_not_decay_and_frozen_weights_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 4))
    model[2].requires_grad_(False)
    groups = build_optimizer(model, CONFIG).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (2, 0.0)]
