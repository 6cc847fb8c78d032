"""Verbs that train: pretraining and its search, post-training, export."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.markup import escape
from rich.table import Table

from danube_ray.artifacts import ArtifactError, read_json
from danube_ray.cli.console import Positional, console, print_report, stored_run
from danube_ray.config import DpoConfig, FinetuneConfig, RunConfig, require

Config = TypeVar("Config")
# The fields of a verb's configuration are its options: `--optimizer.learning-rate`, not `--run.optimizer.…`.
Unprefixed = Annotated[Config, tyro.conf.arg(name="")]


def pretrain(run: Unprefixed[RunConfig]) -> None:
    """Pretrain a preset, or go on with the stopped run of that name."""
    from danube_ray.runtime import training
    from danube_ray.train.progress import Progress

    with saved_when_stopped():
        checkpoint = training.pretrain(run, Progress(console))
    console.print(f"checkpoint [bold]{checkpoint}[/bold]")
    print_report(Path(run.output_dir) / run.name)


def search(
    run: Unprefixed[RunConfig], trials: int = 8, max_concurrent: int = 2, out: Path = Path("runs/search")
) -> None:
    """Search learning rate and weight decay on a small preset.

    Optuna proposes, ASHA stops what falls behind.

    Args:
        run: the run that every trial varies.
        trials: runs to try.
        max_concurrent: trials at once, as far as there are CPUs.
        out: where trials.json goes, best first.
    """
    from danube_ray.runtime import tuning
    from danube_ray.search.studies import Study

    found = tuning.search(run, Study(num_trials=trials, max_concurrent=max_concurrent), out)
    table = Table("validation loss", "steps", *found[0].config, box=None)
    for trial in found:
        loss = escape(trial.error or "failed") if trial.loss is None else f"{trial.loss:.4f}"
        table.add_row(loss, f"{trial.steps:,}", *(f"{value:.3g}" for value in trial.config.values()))
    console.print(table)
    print_report(out)


def export(run: Positional[Path], tokenizer: Path, out: Path) -> None:
    """Export a pretraining run's newest checkpoint for Hugging Face.

    The folder has weights, tokenizer and chat template: transformers, vLLM and llama.cpp open it unchanged.

    Args:
        run: the run's folder.
        tokenizer: the folder of the tokenizer its shards were made with.
        out: the Hugging Face folder to write.
    """
    from danube_ray.data.tokenizer import Tokenizer
    from danube_ray.train.checkpoint import newest_verified
    from danube_ray.train.export import export_checkpoint

    model = stored_run(run).final_model
    made_by = Tokenizer.load(tokenizer).sha256
    checkpoint = newest_verified(run / "checkpoints")
    if checkpoint is None:
        raise ArtifactError(f"{run} has no verified checkpoint: has it saved one yet?")
    trained_with = read_json(checkpoint / "state.json")["identity"]["tokenizer"]
    require(made_by == trained_with, "--tokenizer", str(tokenizer), f"the tokenizer of the shards that {run} read")
    folder = export_checkpoint(checkpoint, model, tokenizer, out)
    console.print(f"model of {checkpoint.name} in [bold]{folder}[/bold]")


def sft(config: Unprefixed[FinetuneConfig]) -> None:
    """Fine-tune a model on conversations, and export it to RUN/model.

    Prompts are masked. Under LoRA the model is the merged one, and the adapter alone is exported to RUN/adapter beside
    it.
    """
    from danube_ray.runtime import training

    finetune(config, training.sft)


def dpo(config: Unprefixed[DpoConfig]) -> None:
    """Align a model on preference pairs (DPO), with LoRA.

    The merged model comes to RUN/model, the adapter to RUN/adapter; `danube serve BASE --adapters NAME=RUN/adapter`
    serves the base with it.
    """
    from danube_ray.runtime import training

    finetune(config, training.dpo)


@contextmanager
def saved_when_stopped() -> Iterator[None]:
    """A run that SIGTERM or Ctrl-C ended has saved itself: say so, and exit as a process does that the signal ended."""
    from danube_ray.train.faults import RunStopped

    try:
        yield
    except RunStopped as stopped:
        console.print(f"saved and stopped: {stopped}; the same command goes on", highlight=False, soft_wrap=True)
        raise SystemExit(128 + (signal.SIGINT if str(stopped).endswith("SIGINT") else signal.SIGTERM)) from None


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
