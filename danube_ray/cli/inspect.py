"""The verb that looks into a finished curation: documents by reason, score or words, and what became of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from danube_ray.artifacts import ArtifactError
from danube_ray.cli.console import Positional, console
from danube_ray.config import require

if TYPE_CHECKING:
    from danube_ray.report.curated import Curated
    from danube_ray.report.lookup import Wanted

Where = Literal["kept", "dropped", "quarantine"]
SHOWN_CHARS, SHOWN_LINES = 600, 12
STYLES = {"kept": "bold green", "dropped": "bold yellow", "quarantine": "bold red"}


def inspect(
    folder: Positional[Path],
    table: Where | None = None,
    reason: str | None = None,
    source: str | None = None,
    language: str | None = None,
    min_quality: float | None = None,
    max_quality: float | None = None,
    contains: str | None = None,
    id: str | None = None,
    count: int = 5,
    full: bool = False,
) -> None:
    """Show what a curation kept and dropped, document by document.

    Without options, an overview.

    Args:
        folder: what `danube curate` wrote, or a run's folder.
        table: kept, dropped or quarantine; a reason names its own.
        reason: why documents were dropped or unreadable.
        source: only this source.
        language: only this language.
        min_quality: only documents that score so much at least.
        max_quality: only documents that score so much at most.
        contains: only documents whose text holds this, whatever its case.
        id: a document's id, or how it begins: where it is, why, and what it repeats.
        count: at most so many documents.
        full: whole texts, and every signal.
    """
    from danube_ray.report.curated import read_curated
    from danube_ray.report.lookup import Wanted, find

    curated = read_curated(folder)
    require(count > 0, "--count", count, "greater than 0")
    require_known("--source", source, list(curated.counts))
    wanted = Wanted(reason=reason, language=language, min_quality=min_quality, max_quality=max_quality,
                    contains=contains)  # fmt: skip
    if id is not None:
        require(wanted == Wanted() and table is None, "--id", id, "alone, or with --source, --count and --full")
        print_history(curated, id, source, count, full)
        return
    if wanted == Wanted() and table is None and source is None:
        print_overview(curated)
        return
    where = table_of(curated, table, wanted)
    rows = find(curated, where, wanted, source, count + 1)
    for row in rows[:count]:
        print_row(curated, where, row, full)
    if not rows:
        console.print(f"no such document in [bold]{where}[/bold]")
    elif len(rows) > count:
        console.print(f"there are more: --count shows more than {count}", style="dim")


def require_known(option: str, value: str | None, known: list[str]) -> None:
    require(value is None or value in known, option, value, f"one of {', '.join(known)}" if known else "left out: none")


def table_of(curated: Curated, table: Where | None, wanted: Wanted) -> Where:
    """The table to look in; `ConfigError` for what that table cannot hold."""
    reasons: dict[Where, list[str]] = {
        "dropped": curated.ordered(curated.total("dropped_by")),
        "quarantine": sorted(curated.total("quarantined_by")),
    }
    if wanted.reason is not None:
        known = reasons.get(table, []) if table else [reason for names in reasons.values() for reason in names]
        require(table != "kept", "--reason", wanted.reason, "left out: kept documents have none")
        require_known("--reason", wanted.reason, known)
        table = table or next(name for name, names in reasons.items() if wanted.reason in names)
    of_documents = {"--language": wanted.language, "--min-quality": wanted.min_quality,
                    "--max-quality": wanted.max_quality}  # fmt: skip
    for option, value in of_documents.items():
        require(value is None or table != "quarantine", option, value, "left out: what is unreadable has none")
    languages = curated.total("languages")
    require_known("--language", wanted.language, sorted(languages, key=lambda code: -languages[code]))
    scored = bool(curated.total("qualities")) or wanted.min_quality is wanted.max_quality is None
    score = wanted.max_quality if wanted.min_quality is None else wanted.min_quality
    require(scored, "--min-quality and --max-quality", score, "left out: these documents were not scored")
    return table or "kept"


def print_overview(curated: Curated) -> None:
    """Counts by source, and the reasons in the order in which documents meet them."""
    from danube_ray.report.funnel import losses
    from danube_ray.report.units import percent, size

    wide = Console(width=max(console.width, 60 + 11 * len(curated.counts)))  # no reason is cut
    sources = Table("source", box=None)
    for name in ("read", "kept", "", "dropped", "quarantined", "text kept"):
        sources.add_column(name, justify="right")
    for name, row in curated.counts.items():
        share = percent(row["kept"] / row["read"]) if row["read"] else ""
        numbers = (f"{row['read']:,}", f"{row['kept']:,}", share, f"{row['dropped']:,}", f"{row['quarantined']:,}")
        sources.add_row(Text(name), *numbers, size(row["kept_bytes"]))
    wide.print(sources, "")

    reasons = Table("reason", "bound", box=None)
    for name in ("dropped", "share", *curated.counts):
        reasons.add_column(Text(name), justify="right")
    for loss in losses(curated):
        shares = [percent(loss.share_of(source)) if loss.dropped.get(source) else "" for source in curated.counts]
        reasons.add_row(Text(loss.reason), loss.limit, f"{loss.count:,}", percent(loss.share), *shares)
    wide.print(reasons, "")
    console.print("a share is of the documents that reach the rule", style="dim")
    console.print(f"see documents: danube inspect {curated.folder} --reason REASON, --table kept, --id ID, …",
                  style="dim", soft_wrap=True, markup=False)  # fmt: skip
    if (curated.folder / "report.html").is_file():
        console.print(f"as a page: {curated.folder / 'report.html'}", style="dim", soft_wrap=True, markup=False)


def print_history(curated: Curated, start: str, source: str | None, count: int, full: bool) -> None:
    """What became of the documents whose id begins so: kept, or dropped for what, and their duplicates."""
    from danube_ray.report.lookup import Wanted, contamination_of, find, find_id

    found = find_id(curated, start, source, count)
    if not found:
        of_source = f" of source {source!r}" if source else ""
        raise ArtifactError(f"no document{of_source} in {curated.folder} has an id that begins with {start!r}")
    for where, row in found:
        print_row(curated, where, row, full)
        for item in contamination_of(curated, row["id"]):
            print_dim(f"holds item {item['item']} of {item['benchmark']}:", item["question"])
        if row.get("duplicate_of"):
            console.print("kept in its place:", style="dim")
            for kept in find(curated, "kept", Wanted(id_start=row["duplicate_of"]), None, 1):
                print_row(curated, "kept", kept, full)
        elif where == "kept":
            repeats = find(curated, "dropped", Wanted(duplicate_of=row["id"]), None, count)
            if repeats:
                console.print("dropped as duplicates of it:", style="dim")
            for repeat in repeats:
                print_row(curated, "dropped", repeat, full=False)


def print_row(curated: Curated, where: Where, row: dict[str, Any], full: bool) -> None:
    """One record: what became of it and why, where it is from, and how it begins, or all of it."""
    from danube_ray.report.curated import excerpt, visible

    text = row["sample" if where == "quarantine" else "text"] or ""
    if where == "quarantine":
        said, origin = row["reason"], f"{row['source']}  at {row['offset']:,}"
    else:
        said = why(curated, row) if where == "dropped" else measures(row, ("quality", "words", "language_score"))
        origin = f"{row['id']}  {row['source']}  {row['language'] or ''}  {len(text):,} characters"
    console.print(Text.assemble((where, STYLES[where]), "  ", visible(said)), soft_wrap=True)
    print_dim(origin, row["url"])
    if full and where != "quarantine":
        print_dim(measures(row, curated.signals))
    console.print(Text(visible(text) if full else excerpt(text, SHOWN_CHARS, SHOWN_LINES)))
    console.print()


def print_dim(*lines: str | None) -> None:
    from danube_ray.report.curated import visible

    for line in lines:
        console.print(Text(visible(line or ""), style="dim"), soft_wrap=True)


def why(curated: Curated, row: dict[str, Any]) -> str:
    """The reason of a drop with what it measured and the bound, and the document that was kept instead."""
    name, value, bound = curated.why(row)
    measured = f": {name} {value}" if value else ""
    kept = f", {bound} is kept" if bound else ""
    original = f" of {row['duplicate_of']}" if row.get("duplicate_of") else ""
    return f"{row['reason']}{original}{measured}{kept}"


def measures(row: dict[str, Any], names: tuple[str, ...] | list[str]) -> str:
    """Named signals of a row, those that were measured."""
    from danube_ray.report.curated import number

    values = {name: row.get(name if name == "quality" else f"signal_{name}") for name in names}
    return "  ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in values.items() if value is not None)
