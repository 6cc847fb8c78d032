"""Ray Train around the training loop: workers, their streams, restarts."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
from ray.data import Dataset
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from danube_ray.artifacts import (
    MANIFEST,
    ArtifactError,
    content_hash,
    finished,
    provenance,
    read_json,
    require_space,
    write_json,
)
from danube_ray.config import DpoConfig, FinetuneConfig, LoopConfig, OptimizerConfig, RunConfig, require, to_dict
from danube_ray.data.windows import MixtureReader
from danube_ray.model.huggingface import load_config
from danube_ray.runtime.session import session
from danube_ray.runtime.streaming import RankStreams, read_stream, steps_dataset
from danube_ray.train.checkpoint import STATE, checkpoint_folder, newest_verified, step_of
from danube_ray.train.loop import fit
from danube_ray.train.pretrain import PretrainTask
from danube_ray.train.progress import Progress
from danube_ray.train.protocol import Batch, StepReader, Task

MakeTask = Callable[[], Task]
STREAM = "steps"
PATHS = {"output_dir", "tokens_dir", "base", "data"}
PLACES = {"name", "kind", *PATHS}
ConfigT = TypeVar("ConfigT", RunConfig, FinetuneConfig, DpoConfig)
CHECKPOINT_BYTES = 12  # a parameter: its float32 master weight and AdamW's two moments


class RayContext:
    """The loop's `Context` inside a Ray Train worker."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = get_device()

    def batches(self, reader: StepReader, start_step: int) -> Iterator[tuple[int, Batch]]:
        """Ray Data's stream; it was started from the same checkpoint, which the loop verifies with the first step."""
        shard = ray.train.get_dataset_shard(STREAM)
        assert shard is not None  # the trainer was given the stream
        return read_stream(shard)

    def report(self, metrics: dict[str, Any]) -> None:
        """The checkpoint is committed on storage already: Ray learns its metrics, and the ranks wait for each other."""
        ray.train.report(metrics)


def pretrain(run: RunConfig, progress: Progress | None = None) -> Path:
    """Pretrain `run` on the cluster, or go on with it; the last checkpoint's folder."""
    run = located(run)
    checkpoint = train(lambda: PretrainTask(run), run, run.optimizer, run.loop, progress)
    write_json(Path(run.output_dir) / run.name / "mixture.json", MixtureReader(run).plan.mixture())
    return checkpoint


def sft(config: FinetuneConfig, progress: Progress | None = None) -> Path:
    """Supervised fine-tuning on conversations; the last checkpoint's folder."""
    from danube_ray.posttrain.sft import SftTask  # PEFT takes seconds to import, which pretraining's workers need not

    config = located(config)
    return train(lambda: SftTask(config), config, config.optimizer, config.loop, progress)


def dpo(config: DpoConfig, progress: Progress | None = None) -> Path:
    """Direct preference optimisation on pairs; the last checkpoint's folder."""
    from danube_ray.posttrain.dpo import DpoTask

    config = located(config)
    return train(lambda: DpoTask(config), config, config.optimizer, config.loop, progress)


def train(
    make_task: MakeTask,
    config: RunConfig | FinetuneConfig,
    optimizer: OptimizerConfig,
    settings: LoopConfig,
    progress: Progress | None,
) -> Path:
    """Run the loop under Ray Train until the task's last step is committed, restarting workers that die.

    A finished run returns at once; a stopped one goes on from its newest verified checkpoint, after a worker's death,
    the driver's or the cluster's. Raises what the loop raised, once `max_restarts` are used up.
    """
    folder = Path(config.output_dir) / config.name
    task = make_task()  # reads the data's manifests: whatever is wrong with them is said before a worker starts
    decisive = identity(to_dict(config))
    inputs = {"config": decisive, "data": task.data_hash}
    last = checkpoint_folder(folder / "checkpoints", task.reader.num_steps)
    if finished(folder, inputs):
        return last
    require_same_run(folder, decisive, task.data_hash)
    trained = config.model.num_parameters if isinstance(config, RunConfig) else base_parameters(config)
    kept = settings.keep_checkpoints + 1  # the next one is written before the oldest goes
    require_space(folder, kept * CHECKPOINT_BYTES * trained, f"keeping {settings.keep_checkpoints} checkpoints")
    write_json(folder / "config.json", {**to_dict(config), "kind": task.name})
    write_json(folder / "provenance.json", provenance())
    with session(), (progress or Progress()).follow(folder, task.reader.num_steps, task.name):
        require_capacity(settings)
        trainer(make_task, task.reader, folder, optimizer, settings).fit()
    # What lies here is told by its inputs: the checkpoints have manifests of hashes of their own.
    write_json(folder / MANIFEST, {"inputs": content_hash(inputs), "files": {}})
    return last


def located(config: ConfigT) -> ConfigT:
    """The configuration with absolute paths: a worker runs in a folder of its own."""
    fields = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: str(Path(getattr(config, name)).resolve()) for name in PATHS & fields})


def base_parameters(config: FinetuneConfig) -> int:
    """How many parameters post-training may change: all of the base's, or adapters too small to count here."""
    return 0 if config.lora else load_config(Path(config.base)).num_parameters


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run produces, without those that only say where and how often.

    Data, and a base to start from, are known by their content (`Task.data_hash`), not by where they lie.
    """
    decisive = {name: value for name, value in settings.items() if name not in PLACES}
    decisive["loop"] = {name: settings["loop"][name] for name in ("precision", "seed")}
    return decisive


def require_same_run(folder: Path, decisive: dict[str, Any], data_hash: str) -> None:
    """Raise `ArtifactError` where the folder holds checkpoints of a run with other settings or data."""
    newest = newest_verified(folder / "checkpoints")
    if newest is None:
        return
    now = {**json.loads(json.dumps(decisive)), "data": data_hash}  # as the file has it: tuples are lists
    file = folder / "config.json"  # not there when the loop ran without Ray, on its caller's word
    before = {**(identity(read_json(file)) if file.is_file() else now), "data": read_json(newest / STATE)["data_hash"]}
    changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if changed:
        raise ArtifactError(
            f"{folder} holds a run with other settings ({', '.join(changed)}): "
            "give this one another name, or remove that folder"
        )


def require_capacity(settings: LoopConfig) -> None:
    """Refuse a run that would wait for ever: workers take CPUs, and the stream needs one beside them."""
    total = ray.cluster_resources().get("CPU", 0)
    needed = settings.num_workers * settings.cpus_per_worker + 1
    require(
        needed <= total,
        "LoopConfig.num_workers",
        settings.num_workers,
        f"at most {int((total - 1) // settings.cpus_per_worker)} on this cluster of {total:g} CPUs",
        "each worker takes cpus_per_worker, and one CPU is left for the stream",
    )


def trainer(
    make_task: MakeTask, reader: StepReader, folder: Path, optimizer: OptimizerConfig, settings: LoopConfig
) -> TorchTrainer:
    """The trainer of one launch. Ray's bookkeeping gets a new name each time: resuming is the checkpoints' affair."""
    on_gpu = ray.cluster_resources().get("GPU", 0) >= settings.num_workers
    # Deaths are noticed at the next poll (2 s by default); Ray carries these variables to its controller.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

    def work() -> None:
        fit(make_task(), folder, settings, optimizer, RayContext())

    def remaining_steps() -> Dataset:
        """What Ray Train evaluates whenever workers (re)start."""
        return steps_dataset(reader, step_of(newest_verified(folder / "checkpoints")))

    return TorchTrainer(
        work,
        datasets={STREAM: remaining_steps},
        dataset_config=RankStreams(reader),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=settings.max_restarts),
        ),
    )
