"""`danube VERB`: one function a verb, its parameters the options, its docstring the help (tyro).

A verb imports its rooms when it runs, so `danube --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from danube_ray.artifacts import ArtifactError
from danube_ray.config import ConfigError, DpoConfig, FinetuneConfig, RunConfig
from danube_ray.presets import PRESETS

console = Console()
Positional = tyro.conf.Positional
USAGE_ERROR = 2


def presets() -> None:
    """Print every preset: parameters, tokens, and the stages with their sequence lengths and mixtures."""
    table = Table("preset", "parameters", "tokens", "stages: sequence length, tokens, shares in %", box=None)
    for name, preset in PRESETS.items():
        run = preset()
        for index, stage in enumerate(run.stages):
            total = sum(stage.shares.values())
            shares = " ".join(f"{source} {100 * share / total:.1f}" for source, share in stage.shares.items())
            head = (name, f"{run.model.num_parameters:,}", f"{run.total_tokens:,}") if index == 0 else ("", "", "")
            table.add_row(*head, f"{stage.name}: {stage.sequence_length:,}, {stage.tokens:,}, {shares}")
    console.print(table)


def curate(
    sources: Positional[tuple[str, ...]],
    out: Path = Path("data/documents"),
    max_quarantine_share: float = 0.05,
) -> None:
    """Clean raw text into documents: heuristics with reasons, exact duplicates, a quarantine for what can't be read.

    Args:
        sources: NAME=PATH, one a source in order of priority; text, JSONL and Parquet, files or folders.
        out: where documents, dropped and quarantined text go.
        max_quarantine_share: above this share of unreadable input the run fails.
    """
    from danube_ray.runtime import curation

    counts = curation.curate(named_paths(sources), out, max_quarantine_share=max_quarantine_share)
    console.print(counts_table(counts))
    console.print(f"documents in [bold]{out}[/bold]")


def tokenizer(out: Positional[Path], documents: Path | None = None, model: Path | None = None,
              vocab_size: int = 32_000) -> None:
    """Train a sentencepiece BPE tokenizer with byte fallback on curated documents, or take over a `tokenizer.model`.

    Args:
        out: the tokenizer's folder.
        documents: curated documents to train on.
        model: an existing sentencepiece model to take over instead.
        vocab_size: pieces of a trained tokenizer.
    """
    from danube_ray.data.tokenizer import import_tokenizer
    from danube_ray.runtime.tokenization import train_tokenizer_on

    if (documents is None) == (model is None):
        raise ConfigError("--documents and --model", (documents, model), "exactly one of the two")
    made = import_tokenizer(model, out) if model else train_tokenizer_on(documents, out, vocab_size)  # type: ignore[arg-type]
    console.print(f"{made.vocab_size:,} pieces in [bold]{out}[/bold]")


def tokenize(documents: Path = Path("data/documents"), tokenizer: Path = Path("data/tokenizer"),
             out: Path = Path("data/tokens")) -> None:
    """Write curated documents as token shards, by source and quality bucket, with a held-out part.

    Args:
        documents: curated documents.
        tokenizer: the tokenizer's folder.
        out: where the shards go.
    """
    from danube_ray.runtime import tokenization

    facts = tokenization.tokenize(documents, tokenizer, out)
    console.print(facts)


def pretrain(argv: list[str]) -> None:
    """Pretrain a preset, or go on with a stopped run: `danube pretrain nano --optimizer.learning-rate 1e-3`."""
    from danube_ray.runtime import training
    from danube_ray.train.progress import Progress

    run = preset_with_overrides(argv, "danube pretrain")
    checkpoint = training.pretrain(run, Progress(console))
    console.print(f"checkpoint [bold]{checkpoint}[/bold]")
    console.print(f"report     [bold]{report_of(Path(run.output_dir) / run.name)}[/bold]")


def export(run: Positional[Path], tokenizer: Path, out: Path) -> None:
    """Export a pretraining run's newest checkpoint as a Hugging Face folder with its tokenizer and chat template.

    Args:
        run: the run's folder.
        tokenizer: the folder of the tokenizer its shards were made with.
        out: the Hugging Face folder to write.
    """
    from danube_ray.train.checkpoint import newest_verified
    from danube_ray.train.export import export_checkpoint, run_model

    checkpoint = newest_verified(run / "checkpoints")
    if checkpoint is None:
        raise ArtifactError(f"{run} has no verified checkpoint: is it a run's folder, and has it saved one yet?")
    console.print(f"model in [bold]{export_checkpoint(checkpoint, run_model(run), tokenizer, out)}[/bold]")


def sft(config: tyro.conf.OmitArgPrefixes[FinetuneConfig]) -> None:
    """Fine-tune a Hugging Face folder on conversations, prompts masked, and export the result to RUN/model."""
    from danube_ray.runtime import training

    finetune(config, training.sft)


def dpo(config: tyro.conf.OmitArgPrefixes[DpoConfig]) -> None:
    """Tune a Hugging Face folder on preference pairs with LoRA, and export the merged result to RUN/model."""
    from danube_ray.runtime import training

    finetune(config, training.dpo)


def finetune(config: FinetuneConfig, train: Callable[..., Path]) -> None:
    from danube_ray.posttrain.sft import export
    from danube_ray.train.progress import Progress

    checkpoint = train(config, Progress(console))
    run = Path(config.output_dir) / config.name
    console.print(f"model  [bold]{export(checkpoint, config, run / 'model')}[/bold]")
    console.print(f"report [bold]{report_of(run)}[/bold]")


@dataclass(frozen=True)
class Verb:
    run: Callable[..., None]
    takes_preset: bool = False


VERBS: dict[str, Verb] = {
    "presets": Verb(presets),
    "curate": Verb(curate),
    "tokenizer": Verb(tokenizer),
    "tokenize": Verb(tokenize),
    "pretrain": Verb(pretrain, takes_preset=True),
    "export": Verb(export),
    "sft": Verb(sft),
    "dpo": Verb(dpo),
}


def main(argv: list[str] | None = None) -> None:
    """Run a verb; a mistake in the settings or the data is one line and exit status 2."""
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name not in VERBS:
        known = name in ("-h", "--help")
        console.print(overview() if known else f"danube: no verb {name!r}; danube --help lists them", style=None)
        raise SystemExit(0 if known else USAGE_ERROR)
    try:
        run_verb(VERBS[name], name, arguments[1:])
    except (ConfigError, ArtifactError) as error:
        Console(stderr=True).print(f"[bold red]danube {name}:[/bold red] {error}", highlight=False)
        raise SystemExit(USAGE_ERROR) from None
