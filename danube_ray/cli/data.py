"""Verbs from raw text to token shards."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from danube_ray.cli.console import Positional, console, named_paths
from danube_ray.config import require


def curate(
    sources: Positional[tuple[str, ...]], out: Path = Path("data/documents"), max_quarantine_share: float = 0.05
) -> None:
    """Clean raw text into documents: heuristics with reasons, exact duplicates, a quarantine for what can't be read.

    Args:
        sources: NAME=PATH each, in order of priority among duplicates; text, JSONL and Parquet, files or folders.
        out: where documents, dropped and quarantined text go.
        max_quarantine_share: above this share of unreadable input the run fails.
    """
    from rich.progress import Progress

    from danube_ray.runtime import curation

    with Progress(console=console, transient=True) as bars:
        bar = bars.add_task("curating", total=None)
        counts = curation.curate(
            named_paths(sources),
            out,
            max_quarantine_share=max_quarantine_share,
            on_progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    table = Table("source", "read", "kept", "dropped", "quarantined", "most frequent reasons", box=None)
    for source, facts in counts.items():
        reasons = sorted(facts["dropped_by"].items(), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
        table.add_row(source, *(f"{facts[name]:,}" for name in ("read", "kept", "dropped", "quarantined")), named)
    console.print(table)
    console.print(f"documents in [bold]{out}[/bold]")


def tokenizer(
    out: Path = Path("data/tokenizer"),
    documents: Path | None = None,
    model: Path | None = None,
    vocab_size: int = 32_000,
) -> None:
    """Train a sentencepiece BPE tokenizer with byte fallback on curated documents, or take over a `tokenizer.model`.

    Args:
        out: the tokenizer's folder.
        documents: curated documents to train on.
        model: an existing sentencepiece model to take over instead.
        vocab_size: pieces of a trained tokenizer.
    """
    from danube_ray.data.tokenizer import import_tokenizer
    from danube_ray.runtime.tokenization import train_tokenizer_on

    if model is not None and documents is None:
        made = import_tokenizer(model, out)
    else:
        require(model is None, "--model", model, "given alone", "leave out --documents")
        made = train_tokenizer_on(documents or Path("data/documents"), out, vocab_size)
    console.print(f"{made.vocab_size:,} pieces in [bold]{out}[/bold]")


def tokenize(
    documents: Path = Path("data/documents"),
    tokenizer: Path = Path("data/tokenizer"),
    out: Path = Path("data/tokens"),
) -> None:
    """Write curated documents as token shards, by source and quality bucket, with a held-out part.

    Args:
        documents: curated documents.
        tokenizer: the tokenizer's folder.
        out: where the shards go.
    """
    from danube_ray.runtime import tokenization

    facts = tokenization.tokenize(documents, tokenizer, out)
    for source, buckets in facts["counts"].items():
        for bucket, store in buckets.items():
            console.print(f"{source}/{bucket}: {store['tokens']:,} tokens of {store['documents']:,} documents")
    console.print(f"shards in [bold]{out}[/bold]")
