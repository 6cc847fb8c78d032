"""Verbs that train: pretraining and its search, post-training, export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from danube_ray.artifacts import ArtifactError
from danube_ray.cli.console import Positional, console, print_report
from danube_ray.config import DpoConfig, FinetuneConfig, RunConfig

Config = TypeVar("Config")
STOPPED = 128 + 15  # what a shell reports of a process that SIGTERM ended
# The fields of a verb's configuration are its options: `--optimizer.learning-rate`, not `--run.optimizer.…`.
Unprefixed = Annotated[Config, tyro.conf.arg(name="")]


def pretrain(run: Unprefixed[RunConfig]) -> None:
    """Pretrain a preset, or go on with a stopped run: `danube pretrain nano --optimizer.learning-rate 1e-3`."""
    from danube_ray.runtime import training
    from danube_ray.train.progress import Progress

    with saved_when_stopped():
        checkpoint = training.pretrain(run, Progress(console))
    console.print(f"checkpoint [bold]{checkpoint}[/bold]")
    print_report(Path(run.output_dir) / run.name)


def search(
    run: Unprefixed[RunConfig], trials: int = 8, max_concurrent: int = 2, out: Path = Path("runs/search")
) -> None:
    """Search learning rate and weight decay on a proxy preset: Optuna proposes, ASHA stops what falls behind."""
    from danube_ray.runtime import tuning
    from danube_ray.search.studies import Study

    for trial in tuning.search(run, Study(num_trials=trials, max_concurrent=max_concurrent), out):
        loss = "failed" if trial.loss is None else f"{trial.loss:.4f}"
        console.print(loss, *(f"{name} {value:.3g}" for name, value in trial.config.items()))
    console.print(f"trials in [bold]{out}[/bold]")


def export(run: Positional[Path], tokenizer: Path, out: Path) -> None:
    """Export a pretraining run's newest checkpoint as a Hugging Face folder with its tokenizer and chat template.

    Args:
        run: the run's folder.
        tokenizer: the folder of the tokenizer its shards were made with.
        out: the Hugging Face folder to write.
    """
    from danube_ray.train.checkpoint import newest_verified
    from danube_ray.train.export import export_checkpoint, model_of_run

    checkpoint = newest_verified(run / "checkpoints")
    if checkpoint is None:
        raise ArtifactError(f"{run} has no verified checkpoint: is it a run's folder, and has it saved one yet?")
    console.print(f"model in [bold]{export_checkpoint(checkpoint, model_of_run(run), tokenizer, out)}[/bold]")


def sft(config: Unprefixed[FinetuneConfig]) -> None:
    """Fine-tune a Hugging Face folder on conversations, prompts masked, and export the result to RUN/model.

    Under LoRA the model is the merged one, and the adapter alone is exported to RUN/adapter beside it.
    """
    from danube_ray.runtime import training

    finetune(config, training.sft)


def dpo(config: Unprefixed[DpoConfig]) -> None:
    """Tune a Hugging Face folder on preference pairs with LoRA; export the merged model and the adapter.

    They come to RUN/model and RUN/adapter; `danube serve BASE --adapters NAME=RUN/adapter` serves the base with it.
    """
    from danube_ray.runtime import training

    finetune(config, training.dpo)


@contextmanager
def saved_when_stopped() -> Iterator[None]:
    """A run that SIGTERM ended has saved itself: say so, and exit as a process does that the signal ended."""
    from danube_ray.train.faults import RunStopped

    try:
        yield
    except RunStopped as stopped:
        console.print(f"saved and stopped: {stopped}; the same command goes on", highlight=False, soft_wrap=True)
        raise SystemExit(STOPPED) from None


def finetune(config: Any, train: Callable[..., Path]) -> None:
    """Train, export beside the run, and say where everything lies."""
    from danube_ray.posttrain.finetune import export, export_adapter
    from danube_ray.train.progress import Progress

    with saved_when_stopped():
        checkpoint = train(config, Progress(console))
    run = Path(config.output_dir) / config.name
    console.print(f"model  [bold]{export(checkpoint, config, run / 'model')}[/bold]")
    if config.lora:
        console.print(f"adapter  [bold]{export_adapter(checkpoint, config, run / 'adapter')}[/bold]")
    print_report(run)
