"""From a training step to the documents in its batch, and from a document to its steps."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from danube_ray.artifacts import MANIFEST, ArtifactError, read_json, read_manifest
from danube_ray.cli.console import Positional, console, stored_run
from danube_ray.config import RunConfig, require

if TYPE_CHECKING:
    from danube_ray.data.plan import MixturePlan
    from danube_ray.data.provenance import Passage, Sources
    from danube_ray.data.tokenizer import Tokenizer

WIDTH = 160  # of a table where the terminal has less: URLs are long
TEXT_TOKENS, TEXT_CHARACTERS = 64, 140


def trace(
    run: Positional[Path],
    step: int | None = None,
    slot: int | None = None,
    id: str | None = None,
    text: bool = False,
    tokenizer: Path | None = None,
    rows: int = 40,
    json: bool = False,
) -> None:
    """Name a training step's documents, or the steps of a document.

    Args:
        run: a pretraining run's folder.
        step: the step, counted from 1 as in the metrics.
        slot: one row of the batch, counted from 0; without it all of them.
        id: a document's id: print where it is held, and every step of the run whose batch has some of it.
        text: print how each document's part of the batch begins.
        tokenizer: the folder of the tokenizer that made the shards, where the run names none.
        rows: at most so many documents, those with the most tokens, or steps, the first; 0 prints all.
        json: print each part of a document, or each step, as a line of JSON.
    """
    require(rows >= 0, "--rows", rows, "0 or more")
    require((step is None) != (id is None), "--step and --id", "neither" if step is id else "both", "one of the two")
    traced = open_run(run)
    if id is not None:
        print_steps(traced, id, rows, json)
        return
    assert step is not None
    num_steps = traced.plan.num_steps
    require(1 <= step <= num_steps, "--step", step, f"between 1 and {num_steps}, counted as in the metrics")
    windows = traced.plan.windows_per_step(step - 1)
    require(slot is None or 0 <= slot < windows, "--slot", slot, f"between 0 and {windows - 1}, a row of this step")
    named = traced.tokenizer(tokenizer) if text else None
    print_documents(traced, step - 1, range(windows) if slot is None else [slot], named, rows, json)


@dataclass(frozen=True)
class Traced:
    """A run's batches and the shards that they are read from."""

    config: RunConfig
    plan: MixturePlan
    sources: Sources

    @property
    def tokens_dir(self) -> Path:
        return Path(self.config.tokens_dir)

    def tokenizer(self, folder: Path | None) -> Tokenizer:
        """The tokenizer of the shards; `ConfigError` for another one, and for none."""
        from danube_ray.data.tokenizer import Tokenizer

        named = folder or self.config.tokenizer
        require(named is not None, "--tokenizer", None, "the folder of the tokenizer that made the shards, for --text")
        tokenizer, made_by = Tokenizer.load(str(named)), read_manifest(self.tokens_dir)["tokenizer_sha256"]
        require(
            tokenizer.sha256 == made_by, "--tokenizer", str(named), f"the tokenizer of the shards in {self.tokens_dir}"
        )
        return tokenizer

    def beginning(self, step: int, passage: Passage, tokenizer: Tokenizer) -> str:
        """How the passage begins, in a line."""
        start = self.plan.window(step, passage.slot).start_token + passage.row_token
        ids = self.sources[passage.source][passage.bucket].read(start, min(passage.tokens, TEXT_TOKENS))
        return " ".join(tokenizer.decode(ids.tolist()).split())[:TEXT_CHARACTERS]


def open_run(folder: Path) -> Traced:
    """A pretraining run from the configuration that it stored.

    Raises `ArtifactError` when its shards aren't those that its newest checkpoint was trained on.
    """
    from danube_ray.data.plan import MixturePlan
    from danube_ray.data.shards import open_sources, store_sizes

    config = stored_run(folder)
    sources = open_sources(Path(config.tokens_dir))
    plan = MixturePlan(config, store_sizes(sources))
    committed = sorted((folder / "checkpoints").glob(f"step-*/{MANIFEST}"))
    then = read_json(committed[-1].parent / "state.json").get("identity", {}) if committed else {}
    now = {"data": plan.hash, "tokenizer": read_manifest(Path(config.tokens_dir))["tokenizer_sha256"]}
    if any(then.get(name, value) != value for name, value in now.items()):
        raise ArtifactError(f"{config.tokens_dir} holds other shards by now than {folder} was trained on")
    return Traced(config, plan, sources)


def print_documents(
    traced: Traced, step: int, slots: Iterable[int], tokenizer: Tokenizer | None, rows: int, json: bool
) -> None:
    """The documents of a step (from 0): sums by source, then each with its tokens, its rows of the batch and URL."""
    from danube_ray.data.provenance import documents_of

    passages = documents_of(traced.plan, traced.sources, step, slots)
    if json:
        for passage in passages:
            said = {"text": traced.beginning(step, passage, tokenizer)} if tokenizer else {}
            print_json(step=step + 1, **{**asdict(passage), "epoch": passage.epoch + 1}, **said)
        return
    stage = traced.config.stages[traced.config.stage_at(step)]
    documents = by_document(passages)
    heading = f"step {step + 1:,} of {traced.plan.num_steps:,}, stage {stage.name}: "
    console.print(f"{heading}a row has {stage.sequence_length:,} tokens and a label", highlight=False)
    sums = Table("source", "rows", "documents", "tokens", box=None)
    for source in sorted({passage.source for passage in passages}):
        own = [passage for passage in passages if passage.source == source]
        counts = len({passage.slot for passage in own}), len({p.id for p in own}), sum(p.tokens for p in own)
        sums.add_row(source, *(f"{count:,}" for count in counts))
    console.print(sums, "")
    table = Table("tokens", "of", "source", "epoch", "rows", "id", "url", box=None)
    for parts in documents[: rows or None]:
        first = parts[0]
        place = Text(first.url, overflow="fold")
        if tokenizer:
            place.append(f"\n{traced.beginning(step, first, tokenizer)}", style="dim")
        counts = f"{sum(part.tokens for part in parts):,}", f"{first.document_tokens:,}"
        held = ", ".join(str(number) for number in sorted({part.slot for part in parts}))
        table.add_row(*counts, f"{first.source}/{first.bucket}", str(first.epoch + 1), held, first.id, place)
    wide = Console(width=max(console.width, WIDTH))
    wide.print(table)
    if len(documents) > rows > 0:
        console.print(f"and {len(documents) - rows:,} more with fewer tokens: --rows 0 prints all")


def by_document(passages: Iterable[Passage]) -> list[list[Passage]]:
    """Passages of one document and epoch together; those with the most tokens first."""

    def key(passage: Passage) -> tuple[Any, ...]:
        return passage.source, passage.bucket, passage.id, passage.epoch

    documents = [list(parts) for _, parts in groupby(sorted(passages, key=key), key=key)]
    return sorted(documents, key=lambda parts: -sum(part.tokens for part in parts))


def print_steps(traced: Traced, document_id: str, rows: int, json: bool) -> None:
    """Where a document is held, and every step whose batch has some of it."""
    from danube_ray.data.provenance import find_document
    from danube_ray.data.shards import VALIDATION, open_validation

    stores = {**traced.sources, VALIDATION: open_validation(traced.tokens_dir)}
    place = find_document(stores, document_id)
    remedy = "`danube inspect` says whether curation dropped it"
    require(place is not None, "--id", document_id, f"a document of the shards in {traced.tokens_dir}", remedy)
    assert place is not None
    source, bucket, span = place
    held_out = source == VALIDATION
    slots = [] if held_out else traced.plan.slots_of(source, bucket, span.start_token, span.end_token)
    if json:
        for step, slot in slots:
            print_json(step=step + 1, slot=slot, source=source, bucket=bucket, id=document_id)
        return
    _, url = stores[source][bucket].names([span.number])[span.number]
    tokens = f"{span.end_token - span.start_token:,} tokens in {source}/{bucket}"
    console.print(f"{document_id} {url}: {tokens}", highlight=False, markup=False, soft_wrap=True)
    steps = [(step, [slot for _, slot in group]) for step, group in groupby(slots, key=lambda place: place[0])]
    if not steps:
        console.print("held out for validation: no step trains on it" if held_out else "no step of this run reads it")
        return
    table = Table("step", "stage", "rows", box=None)
    for step, held in steps[: rows or None]:
        stage = traced.config.stages[traced.config.stage_at(step)].name
        table.add_row(f"{step + 1:,}", stage, ", ".join(map(str, held)))
    console.print(table)
    if len(steps) > rows > 0:
        console.print(f"and {len(steps) - rows:,} later steps: --rows 0 prints all")


def print_json(**values: Any) -> None:
    print(json_format.dumps(values, ensure_ascii=False))
