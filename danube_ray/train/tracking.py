"""Where a run's numbers are shown while it runs: TensorBoard always, W&B or MLflow by a switch.

Keys, servers and projects come from the environment, as those tools read it (`WANDB_API_KEY`, `WANDB_MODE`,
`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`). Neither W&B nor MLflow can take back what it was
given, so a run that resumes tells it only what is new: the run's own files are exact, these are for looking at.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from torch.utils.tensorboard.writer import SummaryWriter

from danube_ray.artifacts import leaves, read_json, write_json
from danube_ray.config import require

Tracker = Literal["none", "wandb", "mlflow"]
Samples = list[dict[str, str]]  # each with `prompt` and `continuation`
STATE = "tracker.json"
PROJECT = "danube_ray"
FINISH_S = 60.0  # that the end of a run waits for W&B's uploads


class Sink(Protocol):
    """Takes what a run logs. May raise: `MetricsLog` then leaves it out."""

    def numbers(self, kind: str, step: int, numbers: dict[str, float]) -> None: ...

    def texts(self, step: int, samples: Samples) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_tracker(tracker: Tracker) -> None:
    """Raise `ConfigError` where the tracker's package is not installed. Cheap: nothing is imported."""
    needed = {"none": (), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}[tracker]
    if tracker == "mlflow" and not own_store():
        needed = ("mlflow",)
    missing = [package for package in needed if find_spec(package) is None]
    remedy = "pip install 'danube-ray[trackers]'"
    require(not missing, "LoopConfig.tracker", tracker, f"a tracker that is installed, {', '.join(missing)}", remedy)


def open_tracker(tracker: Tracker, run_folder: Path, logged: dict[str, int]) -> Sink:
    """Begin the tracker's run, or go on with the one that `run_folder` names.

    `logged` is the last step of each kind of row that was logged before a stop: the tracker has those already. They are
    kept with the run's id, because the rows themselves are dropped when the steps are trained again.
    """
    config = read_json(run_folder / "config.json") if (run_folder / "config.json").is_file() else {}
    before: dict[str, Any] = read_json(run_folder / STATE) if (run_folder / STATE).is_file() else {}
    if before.get("tracker") != tracker:
        before = {"id": None, "logged": {}}
        logged = {}
    known = {kind: max(logged.get(kind, 0), before["logged"].get(kind, 0)) for kind in logged | before["logged"]}
    make = {"wandb": Wandb, "mlflow": Mlflow}[tracker]
    sink = make(run_folder.resolve(), config, before["id"], known)
    write_json(run_folder / STATE, {"tracker": tracker, "id": sink.id, "logged": known})
    return sink


class TensorBoard:
    """Event files; steps after `steps_done` that an earlier process wrote are taken back."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def numbers(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def texts(self, step: int, samples: Samples) -> None:
        for index, sample in enumerate(samples):
            text = f"{sample['prompt']} | {sample['continuation']}".replace("\n", "\n    ")
            self.writer.add_text(f"samples/{index}", f"    {text}", step)  # indented: markdown's code block

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """One W&B run, its steps the run's own."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None, logged: dict[str, int]) -> None:
        import wandb

        self.logged = logged
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=folder,
            name=folder.name,
            id=run_id,
            resume="allow",
            config=config,
            reinit="create_new",
            # The worker's output is Ray's to carry, and a dead network shall not hold up the end of a run: what was
            # not uploaded lies in the run's folder, for `wandb sync`.
            settings=wandb.Settings(console="off", finish_timeout=FINISH_S),
        )
        self.id = self.run.id

    def numbers(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        if step > self.logged.get(kind, 0):
            self.run.log(numbers, step=step)

    def texts(self, step: int, samples: Samples) -> None:
        from wandb import Table

        if step > self.logged.get("samples", 0):
            rows: list[Any] = [[sample["prompt"], sample["continuation"]] for sample in samples]
            self.run.log({"samples": Table(columns=["prompt", "continuation"], data=rows)}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Mlflow:
    """One MLflow run, on the server that the environment names, or in `mlflow.db` beside the run folders."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None, logged: dict[str, int]) -> None:
        # A server that doesn't answer shall cost training seconds, not minutes; whoever sets these is not overruled.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        self.logged = logged
        self.client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}" if own_store() else None)
        self.id = run_id or self.begin(folder, config)
        self.client.update_run(self.id, status="RUNNING")

    def begin(self, folder: Path, config: dict[str, Any]) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        artifacts = (folder.parent / "mlartifacts").as_uri() if own_store() else None
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name, artifacts)
        run_id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
        params = [Param(key, str(value)[:6000]) for key, value in leaves(config, ".")]
        for start in range(0, len(params), 100):  # what the server takes at once
            self.client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def numbers(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if step > self.logged.get(kind, 0):
            now_ms = int(1000 * time.time())
            self.client.log_batch(self.id, [Metric(name, number, now_ms, step) for name, number in numbers.items()])

    def texts(self, step: int, samples: Samples) -> None:
        if step > self.logged.get("samples", 0):
            text = "\n\n".join(f"{sample['prompt']} | {sample['continuation']}" for sample in samples)
            self.client.log_text(self.id, text, f"samples/step-{step:08d}.txt")

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def own_store() -> bool:
    """Whether no server is named: mlflow would then write into whatever folder the process stands in."""
    return "MLFLOW_TRACKING_URI" not in os.environ
