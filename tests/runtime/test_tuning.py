from __future__ import annotations

import dataclasses

import pytest

from danube_ray.config import ConfigError
from danube_ray.runtime.tuning import search
from danube_ray.search.studies import Study, read_trials
from tests.runtime.text import small_run, write_text


@pytest.mark.ray
def test_two_trials_of_a_proxy_are_ranked_by_their_validation_loss(ray_session, tmp_path):
    run = small_run(write_text(tmp_path / "tokens"), tmp_path, "proxy")
    study = Study(ranges={"optimizer.learning_rate": (2e-3, 2e-2)}, num_trials=2, max_concurrent=2)
    trials = search(run, study, tmp_path / "search")
    assert len(trials) == 2 and trials == read_trials(tmp_path / "search")
    assert [trial.error for trial in trials] == [None, None]
    assert all(2e-3 <= trial.config["optimizer.learning_rate"] <= 2e-2 for trial in trials)
    assert trials[0].loss is not None and trials[1].loss is not None and 0 < trials[0].loss <= trials[1].loss < 5
    assert trials[0].steps == run.num_steps

    def fail(*_):
        raise AssertionError("a finished search ran again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("danube_ray.runtime.tuning.run_trials", fail)
        assert search(run, study, tmp_path / "search") == trials


@pytest.mark.ray
def test_trials_that_no_machine_has_room_for_are_refused(ray_session, tmp_path):
    """Tune would wait for it for ever."""
    run = small_run(write_text(tmp_path / "tokens"), tmp_path, "proxy")
    wide = dataclasses.replace(run, loop=dataclasses.replace(run.loop, cpus_per_worker=5))
    study = Study(ranges={"optimizer.learning_rate": (2e-3, 2e-2)}, num_trials=1)
    with pytest.raises(ConfigError, match="cpus_per_worker is 5, allowed is at most the 4 CPUs"):
        search(wide, study, tmp_path / "search")
