"""Ray Train around the training loop: workers, their streams, restarts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

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
    write_atomically,
    write_json,
)
from danube_ray.config import (
    ConfigError,
    DpoConfig,
    EncoderConfig,
    FinetuneConfig,
    LoopConfig,
    OptimizerConfig,
    RunConfig,
    require,
    to_dict,
)
from danube_ray.data.windows import MixtureReader
from danube_ray.model.huggingface import load_config
from danube_ray.model.precision import check_shapes
from danube_ray.runtime.session import session
from danube_ray.runtime.streaming import RankStreams, read_stream, steps_dataset
from danube_ray.train.checkpoint import (
    checkpoint_folder,
    checkpoint_steps,
    newest_committed,
    newest_verified,
    require_equal,
    require_identity,
    step_of,
)
from danube_ray.train.faults import Events, RunStopped, TrainingDiverged
from danube_ray.train.loop import fit
from danube_ray.train.pretrain import PretrainTask
from danube_ray.train.progress import Progress
from danube_ray.train.protocol import Batch, StepReader, Task
from danube_ray.train.tracking import check_tracker
from danube_ray.train.zero import check_zero

MakeTask = Callable[[], Task]
STREAM = "steps"
STOP = "stop"  # a file in the run's folder: what it says is why the run should save and end
PATHS = {"output_dir", "tokens_dir", "base", "data", "init_from", "tokenizer"}
# Settings that say where, how often or how much at once, and nothing of what comes out. Paths are known by the content
# behind them (`Task.identity`).
FREE = {"name", "kind", "micro_batch_size", "max_epochs", "validation_windows", "sample_prompts", *PATHS}
FREE_IN_STAGE = {"name", "micro_batch_size"}
DECISIVE_LOOP = ("precision", "fp8_scaling", "seed")
ConfigT = TypeVar("ConfigT", RunConfig, FinetuneConfig, DpoConfig)
CHECKPOINT_BYTES = 12  # a parameter: its float32 master weight and AdamW's two moments


class RayContext:
    """The loop's `Context` inside a Ray Train worker."""

    def __init__(self, run_folder: Path) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = get_device()
        self.stop_file = run_folder / STOP
        self.noticed: set[str] = set()
        self.stream = ThreadPoolExecutor(1, thread_name_prefix="stream").submit(open_stream)

    def batches(self, reader: StepReader, start_step: int) -> Iterator[tuple[int, Batch]]:
        """Ray Data's stream; it was started from the same checkpoint, which the loop verifies with the first step."""
        return self.stream.result()

    def stop_requested(self) -> str | None:
        """What the driver left in the run's folder; rank 0 looks for all, once a step."""
        found = self.rank == 0 and self.stop_file.is_file()
        return self.stop_file.read_text() if found else None

    def preemption_notice(self) -> str | None:
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self.noticed if info else set()
        self.noticed |= new
        return f"Ray takes away node {', '.join(sorted(new))}" if new else None

    def report(self, metrics: dict[str, Any]) -> None:
        """The checkpoint is committed on storage already: Ray learns its metrics, and the ranks wait for each other."""
        ray.train.report(metrics)


def open_stream() -> Iterator[tuple[int, Batch]]:
    """This worker's batches, once the first is here: Ray starts the stream's processes while the model is built."""
    shard = ray.train.get_dataset_shard(STREAM)
    assert shard is not None  # the trainer was given the stream
    batches = read_stream(shard)
    first = list(islice(batches, 1))  # none where nothing is left to train
    return chain(first, batches)


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
    the driver's or the cluster's. On SIGTERM and Ctrl-C it saves and raises `RunStopped`. Raises what the loop raised,
    once `max_restarts` are used up; what trying again can't mend is raised at once.
    """
    folder = Path(config.output_dir) / config.name
    check_settings(config, settings)
    task = make_task()  # reads the data's manifests: whatever is wrong with them is said before a worker starts
    inputs = {"settings": settings_identity(to_dict(config)), "task": task.identity()}
    last = checkpoint_folder(folder / "checkpoints", task.reader.num_steps)
    if finished(folder, inputs):
        return last
    require_same_run(folder, **inputs)
    trained = config.model.num_parameters if isinstance(config, RunConfig) else base_parameters(config)
    require_room(folder, settings.keep_checkpoints, trained)
    write_json(folder / "config.json", {**to_dict(config), "kind": task.name})
    write_json(folder / "provenance.json", provenance())
    with session(), (progress or Progress()).follow(folder, task.reader.num_steps, task.name):
        require_capacity(settings)
        with stop_on_signals(folder):
            trainer(make_task, task.reader, folder, optimizer, settings).fit()
    if not (last / MANIFEST).is_file():
        raise_ending(folder)
    # What lies here is told by its inputs: the checkpoints have manifests of hashes of their own.
    write_json(folder / MANIFEST, {"inputs": content_hash(inputs), "files": {}})
    return last


def check_settings(config: RunConfig | FinetuneConfig, settings: LoopConfig) -> None:
    """Raise `ConfigError` for what can't work, as far as a driver can know: its machine may have no GPU."""
    check_zero(settings)
    check_tracker(settings.tracker)
    if isinstance(config, RunConfig):
        for stage in config.stages:
            check_shapes(settings.precision, config.model, stage.sequence_length)
    elif not isinstance(config, EncoderConfig):
        base = load_config(Path(config.base))
        check_shapes(settings.precision, base, config.max_length or base.context_length, "FinetuneConfig.max_length")


@contextmanager
def stop_on_signals(folder: Path) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into a wish that the workers see: they save, and end as if the run were over.

    A second Ctrl-C doesn't wait for that.
    """
    stop = folder / STOP
    stop.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if stop.exists():
                raise KeyboardInterrupt
            print("\nsaving, then ending; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        write_atomically(stop, signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.unlink(missing_ok=True)


def raise_ending(folder: Path) -> NoReturn:
    """Raise why the workers ended in peace before the last step: the newest event says so."""
    newest = Events(folder).read()[-1]
    error = {"stopped": RunStopped, "diverged": TrainingDiverged, "refused": ArtifactError}.get(
        newest["event"], RuntimeError
    )
    raise error(f"{folder} at step {newest['step']}: {newest['detail']}")


def located(config: ConfigT) -> ConfigT:
    """The configuration with absolute paths: a worker runs in a folder of its own."""
    fields = {field.name for field in dataclasses.fields(config)}
    paths = {name: path for name in PATHS & fields if (path := getattr(config, name)) is not None}
    return dataclasses.replace(config, **{name: str(Path(path).resolve()) for name, path in paths.items()})


def require_room(folder: Path, keep_checkpoints: int, parameters: int) -> None:
    """Raise `ArtifactError` where the disk can't hold the checkpoints to come; those that are there make room."""
    there = len(checkpoint_steps(folder / "checkpoints"))
    to_come = max(1, keep_checkpoints + 1 - there)  # the next one is written before the oldest goes
    require_space(folder, to_come * CHECKPOINT_BYTES * parameters, f"keeping {keep_checkpoints} checkpoints")


def base_parameters(config: FinetuneConfig) -> int:
    """How many parameters post-training may change: all of the base's; adapters and encoders are too small to count."""
    return 0 if config.lora or isinstance(config, EncoderConfig) else load_config(Path(config.base)).num_parameters


def settings_identity(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run produces, as JSON has them."""
    identity = {name: value for name, value in json.loads(json.dumps(settings)).items() if name not in FREE}
    identity["loop"] = {name: identity["loop"].get(name) for name in DECISIVE_LOOP}
    for stage in identity.get("stages", ()):
        for name in FREE_IN_STAGE:
            del stage[name]
    return identity


def require_same_run(folder: Path, settings: dict[str, Any], task: dict[str, Any]) -> None:
    """Raise `ArtifactError` where the folder holds checkpoints of a run with other settings or data."""
    newest = newest_committed(folder / "checkpoints")
    if newest is None:
        return
    require_identity(newest, task)
    file = folder / "config.json"  # not there when the loop ran without Ray, on its caller's word
    if file.is_file():
        require_equal(folder, settings_identity(read_json(file)), settings)


def require_capacity(settings: LoopConfig) -> None:
    """Refuse a run that would wait for ever for the CPUs of its workers."""
    total = ray.cluster_resources().get("CPU", 0)
    least = settings.min_workers or settings.num_workers
    require(
        least * settings.cpus_per_worker <= total,
        "LoopConfig.min_workers" if settings.min_workers else "LoopConfig.num_workers",
        least,
        f"at most {int(total // settings.cpus_per_worker)} on this cluster of {total:g} CPUs",
        f"each worker takes cpus_per_worker={settings.cpus_per_worker}",
    )


def trainer(
    make_task: MakeTask, reader: StepReader, folder: Path, optimizer: OptimizerConfig, settings: LoopConfig
) -> TorchTrainer:
    """The trainer of one launch. Ray's bookkeeping gets a new name each time: resuming is the checkpoints' affair."""
    least, most = settings.min_workers or settings.num_workers, settings.num_workers
    on_gpu = ray.cluster_resources().get("GPU", 0) >= least
    # Deaths are noticed at the next poll (2 s by default); Ray carries these variables to its controller.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # After a node is lost, an elastic run first asks for as many workers as before, and waits this long in vain. Only
    # the placement is waited for, and it is asked for again, so a cluster that grows slowly loses nothing by it.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")

    def work() -> None:
        context = RayContext(folder)
        try:
            fit(make_task(), folder, settings, optimizer, context)
        except TrainingDiverged:  # the same on every rank and every time: no restart mends it
            return
        except ConfigError as refused:
            Events(folder, writes=context.rank == 0).write("refused", 0, str(refused))

    def remaining_steps() -> Dataset:
        """What Ray Train evaluates whenever workers (re)start."""
        return steps_dataset(reader, step_of(newest_verified(folder / "checkpoints")))

    made = TorchTrainer(
        work,
        datasets={STREAM: remaining_steps},
        dataset_config=RankStreams(reader),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=on_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=settings.max_restarts),
        ),
    )
    made._register_sigint_handler = lambda controller: None  # Ray's ends the workers before they have saved
    return made
