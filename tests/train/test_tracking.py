"""W&B and MLflow, both real and both without a network: what they stored is read back."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import struct
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from danube_ray.artifacts import read_json, write_json
from danube_ray.config import ConfigError
from danube_ray.train.metrics import METRICS, MetricsLog
from danube_ray.train.tracking import check_tracker
from tests.train.test_metrics import SAMPLE, log_steps

pytest.importorskip("wandb")
pytest.importorskip("mlflow")

ROW = {"step": 1, "tokens": 10, "loss": 1.0, "learning_rate": 1e-3}
CONFIG = {"name": "run", "model": {"num_layers": 2}, "parts": [{"tokens": 10}, {"tokens": 20}]}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a run in them: making them takes a second."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A run's folder, with both tools kept from the network and from this machine's own settings."""
    shutil.copy(empty_store, tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    write_json(tmp_path / "run" / "config.json", CONFIG)
    return tmp_path / "run"


def records(file: Path) -> Iterator[bytes]:
    """Records of a LevelDB log, which W&B's offline file is after 7 bytes: blocks of 32 KiB, each record in pieces."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_rows(folder: Path) -> tuple[list[dict[str, Any]], set[str], dict[str, Any]]:
    """History rows, run ids and configuration in W&B's offline files, once its service has written them out."""
    from wandb import teardown
    from wandb.proto import wandb_internal_pb2

    teardown()
    record: Any = wandb_internal_pb2.Record()  # type: ignore
    rows, ids, config = [], set(), {}
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        for data in records(file):
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item for item in record.history.item}
                values = {name: json.loads(item.value_json) for name, item in items.items()}
                rows.append({**values, "_step": record.history.step.num})
    return sorted(rows, key=lambda row: row["_step"]), ids, config


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return client, run


def test_wandb_has_every_step_once_in_one_run(run_folder: Path) -> None:
    log_steps(run_folder, 0, 12, tracker="wandb")
    log_steps(run_folder, 8, 10, tracker="wandb")  # dies before it has come as far as the first time
    log_steps(run_folder, 8, 15, tracker="wandb")
    rows, ids, config = wandb_rows(run_folder)
    assert ids == {read_json(run_folder / "tracker.json")["id"]}
    losses = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert sum("train/loss" in row for row in rows) == 15
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 16)}
    validated = [(row["_step"], row["validation/by_source/web"]) for row in rows if "validation/by_source/web" in row]
    assert validated == [(5, 2.5), (10, 2.5), (15, 2.5)]
    assert [row["_step"] for row in rows if "samples/_type" in row] == [5, 10, 15]
    assert config["model"] == CONFIG["model"]
    tables = [path.read_text() for path in run_folder.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert len(tables) == 3 and all("The Danube" in table for table in tables)


def test_mlflow_has_every_step_once_in_one_run(run_folder: Path) -> None:
    log_steps(run_folder, 0, 12, tracker="mlflow")
    log_steps(run_folder, 8, 10, tracker="mlflow")
    log_steps(run_folder, 8, 15, tracker="mlflow")
    client, run = mlflow_run(run_folder)
    assert run.info.run_id == read_json(run_folder / "tracker.json")["id"] and run.info.status == "FINISHED"
    history = [(item.step, item.value) for item in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(history) == [(step, pytest.approx(1 / step)) for step in range(1, 16)]
    assert len(client.get_metric_history(run.info.run_id, "validation/by_source/web")) == 3
    assert run.data.params["model.num_layers"] == "2" and run.data.params["parts.1.tokens"] == "20"
    texts = sorted(run_folder.parent.glob("mlartifacts/**/step-*.txt"))
    assert [text.stem for text in texts] == ["step-00000005", "step-00000010", "step-00000015"]
    assert SAMPLE["continuation"] in texts[0].read_text()


def test_a_run_that_raises_is_marked_as_failed(run_folder: Path) -> None:
    with pytest.raises(RuntimeError), MetricsLog(run_folder, 0, "mlflow") as log:
        log.write("train", ROW)
        raise RuntimeError
    assert mlflow_run(run_folder)[1].info.status == "FAILED"


def break_mlflow(folder: Path) -> None:
    with sqlite3.connect(folder.parent / "mlflow.db") as database:
        database.execute("DROP TABLE metrics")


def break_wandb(folder: Path) -> None:
    import psutil

    services = [child for child in psutil.Process().children(recursive=True) if "wandb" in " ".join(child.cmdline())]
    assert services
    for service in services:
        service.kill()
        service.wait()


@pytest.mark.parametrize(("tracker", "break_it"), [("mlflow", break_mlflow), ("wandb", break_wandb)])
def test_a_tracker_that_breaks_is_one_warning_and_training_goes_on(
    run_folder: Path, tracker: Any, break_it: Any
) -> None:
    with warnings.catch_warnings(record=True) as caught, MetricsLog(run_folder, 0, tracker) as log:
        warnings.simplefilter("always")
        log.write("train", ROW)
        break_it(run_folder)
        for step in range(2, 6):
            log.write("train", {**ROW, "step": step})
    if tracker == "wandb":  # forget the dead service, so that nobody speaks to it when the tests end
        with contextlib.suppress(Exception):
            import_module("wandb").teardown()
    said = [str(warning.message) for warning in caught if "gets nothing more" in str(warning.message)]
    assert len(said) == 1 and said[0].startswith(f"{tracker} failed")
    assert len((run_folder / METRICS).read_text().splitlines()) == 5


def test_a_server_that_is_not_there_is_one_warning_in_seconds(run_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match="mlflow could not be opened"):
        log_steps(run_folder, 0, 5, tracker="mlflow")
    assert not (run_folder / "tracker.json").exists()


def test_another_tracker_gets_the_run_from_where_it_begins(run_folder: Path) -> None:
    log_steps(run_folder, 0, 12)
    log_steps(run_folder, 8, 15, tracker="mlflow")
    client, run = mlflow_run(run_folder)
    steps = [item.step for item in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(9, 16))


@pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "sqlalchemy")])
def test_a_missing_package_is_said_before_the_run(monkeypatch: Any, tracker: Any, package: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_tracker(tracker)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"LoopConfig\.tracker .* {package}"):
        check_tracker(tracker)
    check_tracker("none")
