from __future__ import annotations

import numpy as np
import pytest

from danube_ray.config import ConfigError
from danube_ray.presets import PRESETS
from danube_ray.search.proxies import override, proxy
from danube_ray.search.scaling import fit_power_law
from danube_ray.search.studies import Study, Trial, read_trials, write_trials


def test_a_proxy_keeps_the_stages_and_the_schedule_of_its_run():
    run, small = PRESETS["danube3_4b"](), PRESETS["nano"]().model
    stand_in = proxy(run, "stand-in", small, total_tokens=100 * run.global_batch_tokens)
    assert stand_in.num_steps == 100 and stand_in.model == small
    assert [stage.shares for stage in stand_in.stages] == [stage.shares for stage in run.stages]
    assert stand_in.stages[0].tokens / stand_in.total_tokens == pytest.approx(4.6 / 6, abs=1e-3)
    assert {stage.sequence_length for stage in stand_in.stages} == {small.context_length}
    warmup = run.optimizer.warmup_steps / run.num_steps
    assert stand_in.optimizer.warmup_steps == max(1, round(warmup * 100))


def test_override_reaches_a_nested_field_and_names_an_unknown_one():
    run = PRESETS["nano"]()
    changed = override(run, {"optimizer.learning_rate": 1e-3, "max_epochs": 2.0})
    assert changed.optimizer.learning_rate == 1e-3 and changed.max_epochs == 2.0
    assert changed.optimizer.beta2 == run.optimizer.beta2
    with pytest.raises(ConfigError, match="'learning' is|is 'learning'"):
        override(run, {"optimizer.learning": 1e-3})
    with pytest.raises(ConfigError, match=r"learning_rate is -1"):
        override(run, {"optimizer.learning_rate": -1.0})


def test_a_power_law_is_found_again():
    sizes = np.array([1e6, 3e6, 1e7, 3e7, 1e8])
    losses = 1.7 + (5e6 / sizes) ** 0.3
    law = fit_power_law(list(zip(sizes, losses, strict=True)))
    assert (law.irreducible, law.exponent) == pytest.approx((1.7, 0.3), rel=1e-2)
    assert law(1e9) == pytest.approx(1.7 + (5e6 / 1e9) ** 0.3, rel=1e-2)
    with pytest.raises(ConfigError, match="run more proxies"):
        fit_power_law([(1.0, 2.0)] * 3)


def test_trials_are_ranked_and_read_back(tmp_path):
    trials = [Trial({"a": 1.0}, None, 0, "out of memory"), Trial({"a": 2.0}, 3.0, 8), Trial({"a": 3.0}, 2.0, 8)]
    write_trials(tmp_path, trials)
    assert [trial.config["a"] for trial in read_trials(tmp_path)] == [3.0, 2.0, 1.0]


def test_a_study_refuses_an_empty_or_reversed_range():
    for ranges in ({}, {"optimizer.learning_rate": (1e-2, 1e-3)}):
        with pytest.raises(ConfigError, match="Study.ranges"):
            Study(ranges=ranges)
