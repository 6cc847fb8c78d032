"""Verbs from raw text to token shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table

from danube_ray.cli.console import Positional, console, named_places
from danube_ray.config import CurationConfig, require

if TYPE_CHECKING:
    from rich.progress import TaskID


def curate(
    sources: Positional[tuple[str, ...]],
    settings: Annotated[CurationConfig, tyro.conf.arg(name="")],
    out: Path = Path("data/documents"),
) -> None:
    """Clean raw text into documents, with a reason for every drop.

    Args:
        sources: NAME=PATH each, in order of priority among duplicates: files or folders, here or under s3://, gs:// or
            hf://datasets/OWNER/NAME; WARC, WET, HTML, text, JSONL, TSV, Parquet and tar, packed or not.
        settings: how documents are read and judged.
        out: where documents, dropped and quarantined text and the report go.
    """
    places = named_places(sources)  # before the imports: what is mistyped is said at once
    from rich.progress import Progress

    from danube_ray.runtime import curation

    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step)
            bars.update(tasks[step], completed=done, total=total)

        manifest = curation.curate(places, out, settings, on_progress)
    table = Table("source", "read", "kept", "dropped", "quarantined", "most frequent reasons", box=None)
    for source, facts in manifest["counts"].items():
        reasons = sorted(facts["dropped_by"].items(), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
        table.add_row(source, *(f"{facts[name]:,}" for name in ("read", "kept", "dropped", "quarantined")), named)
    console.print(table)
    for benchmark, found in manifest["contaminated"].items():
        held = f"{found['items']:,} items in {found['documents']:,} documents, which are dropped"
        left_out = f" ({found['left_out']:,} are too short or common to look for)" if found["left_out"] else ""
        console.print(f"{benchmark}: {held if found['items'] else 'no item found'}{left_out}")
    console.print(f"documents in [bold]{out}[/bold], report [bold]{out / 'report.html'}[/bold]")


def tokenizer(
    out: Path = Path("data/tokenizer"),
    documents: Path | None = None,
    model: Path | None = None,
    vocab_size: int = 32_000,
) -> None:
    """Train a tokenizer on curated documents, or take one over.

    It is a sentencepiece BPE with byte fallback.

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
        require(model is None, "--model", str(model), "given alone", "leave out --documents")
        made = train_tokenizer_on(documents or Path("data/documents"), out, vocab_size)
    console.print(f"{made.vocab_size:,} pieces in [bold]{out}[/bold]")


def tokenize(
    documents: Path = Path("data/documents"),
    tokenizer: Path = Path("data/tokenizer"),
    out: Path = Path("data/tokens"),
) -> None:
    """Write curated documents as token shards.

    They lie by source and by quality, each with a part that is held out.

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
