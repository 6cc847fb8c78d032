"""Ray Tune over proxy runs: each trial runs the one loop in its own process, on one worker."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from danube_ray.artifacts import complete_once
from danube_ray.config import RunConfig, require, to_dict
from danube_ray.runtime.session import session
from danube_ray.search.proxies import override
from danube_ray.search.studies import Study, Trial, read_trials, write_trials
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from danube_ray.train.pretrain import PretrainTask


class TrialContext(LocalContext):
    """A single process whose checkpoints tell the scheduler how the trial is doing, so that poor ones stop early."""

    def report(self, metrics: dict[str, Any]) -> None:
        tune.report({"loss": metrics["validation_loss"], "step": metrics["step"]})


def search(run: RunConfig, study: Study, out: Path) -> list[Trial]:
    """Try the study's settings on the proxy `run`; trials best first, also in `out/trials.json`.

    Optuna proposes, ASHA stops what falls behind. Every trial validates where it saves, on the run's own steps.
    """

    def make(folder: Path) -> None:
        with session():
            write_trials(folder, run_trials(run, study, folder.resolve()))

    data = PretrainTask(run).identity()  # also says what is wrong with the data, before a trial starts
    complete_once(out, {"run": to_dict(run), "study": to_dict(study), "data": data}, make)
    return read_trials(out)


def run_trials(run: RunConfig, study: Study, folder: Path) -> list[Trial]:
    every = max(1, run.num_steps // 4)
    loop = dataclasses.replace(run.loop, validate_every_steps=every, checkpoint_every_steps=every, keep_checkpoints=1)
    candidate = dataclasses.replace(run, loop=loop, tokens_dir=str(Path(run.tokens_dir).resolve()))

    def trial(settings: dict[str, float]) -> None:
        proxy: RunConfig = override(candidate, settings)
        place = folder / "trials" / tune.get_context().get_trial_id()
        fit(PretrainTask(proxy), place, proxy.loop, proxy.optimizer, TrialContext())

    cpus, each = int(ray.cluster_resources().get("CPU", 0)), run.loop.cpus_per_worker
    require(each <= cpus, "LoopConfig.cpus_per_worker", each, f"at most the {cpus} CPUs of this cluster")
    concurrent = min(study.max_concurrent, cpus // each)
    on_gpu = ray.cluster_resources().get("GPU", 0) >= concurrent
    resources: dict[str, float] = {"cpu": each, "gpu": 1 if on_gpu else 0}
    # A search has a result, not a running commentary: Tune's new output prints a table even when told to be silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={path: tune.loguniform(low, high) for path, (low, high) in study.ranges.items()},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=study.num_trials,
            max_concurrent_trials=concurrent,
            search_alg=OptunaSearch(seed=study.seed),
            scheduler=ASHAScheduler(time_attr="step", max_t=run.num_steps, grace_period=every),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    return [describe(result) for result in tuner.fit()]


def describe(result: Any) -> Trial:
    """A Tune result as a plain record."""
    metrics = result.metrics or {}
    error = str(result.error).splitlines()[-1] if result.error else None
    return Trial(dict(result.config), metrics.get("loss"), metrics.get("step", 0), error)
