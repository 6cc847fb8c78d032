"""A finished curation folder: its manifest, the order in which its reasons strike, and a few of its rows.

The folder may hold terabytes, so rows are read from a bounded number of row groups, chosen by the hash of where they
lie: the same folder gives the same rows. Texts are cut to excerpts as they are read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.artifacts import MANIFEST, ArtifactError, read_manifest
from danube_ray.report import units
from danube_ray.report.plot import sample

Row = dict[str, Any]
Place = tuple[Path, int, int]  # file, row group, row of it
Table = Literal["kept", "dropped", "quarantine"]
FOLDERS: dict[Table, str] = {"kept": "documents", "dropped": "dropped", "quarantine": "quarantine"}

BEFORE_RULES = ("blocked_url", "language")
AFTER_RULES = ("blocked_word", "contaminated", "min_quality", "duplicate", "near_duplicate")
# Reasons that are not named after the setting that bounds them, or the column that tells of it.
LIMITS = {"near_duplicate": "min_jaccard"}
COLUMNS = {"language": "signal_language_score", "min_quality": "quality", "near_duplicate": "similarity"}

FILES, GROUPS_PER_FILE, TEXT_GROUPS = 32, 4, 12  # of a source: files opened, row groups of each, and those read whole
ROWS_PER_GROUP, ENOUGH_ROWS = 8, 24  # of each label: rows taken from one row group, and from all of them
ID_GROUPS = 256  # row groups of kept documents whose ids are searched for the other half of a pair
MOST_NAMED = 50_000  # kept documents that are searched for

EXCERPT_CHARS, EXCERPT_LINES = 380, 8
# What a text could use to change how it, or the words around it, are shown: control characters and directions.
UNSHOWN = [code for code in range(0xA0) if (code < 0x20 or code > 0x7E) and chr(code) not in "\n\t"]
VISIBLE = dict.fromkeys([*UNSHOWN, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True)
class Curated:
    """A finished curation folder and its manifest."""

    folder: Path
    manifest: Row

    @property
    def counts(self) -> dict[str, Row]:
        """By source: read, kept, dropped, quarantined and what else was counted."""
        return self.manifest["counts"]

    def files(self, table: Table, source: str | None = None) -> list[Path]:
        """A table's Parquet files, of one source or of all, by path."""
        return sorted((self.folder / FOLDERS[table]).glob(f"{source or '*'}/*.parquet"))

    def total(self, name: str) -> dict[str, int]:
        """The sources' counts by reason, language, bin and the like, added up."""
        added: dict[str, int] = defaultdict(int)
        for row in self.counts.values():
            for key, number in row.get(name, {}).items():
                added[key] += number
        return dict(added)

    @cached_property
    def signals(self) -> list[str]:
        """The signals that judged the documents, in the order in which they did."""
        file = next((path for table in FOLDERS for path in self.files(table)[:1] if table != "quarantine"), None)
        names = pq.read_schema(file).names if file else []
        return [name.removeprefix("signal_") for name in names if name.startswith("signal_")]

    def ordered(self, reasons: Iterable[str]) -> list[str]:
        """Reasons of dropping in the order in which a document meets them."""
        places = {reason: place for place, reason in enumerate(BEFORE_RULES, start=-len(BEFORE_RULES))}
        places |= {reason: 10_000 + place for place, reason in enumerate(AFTER_RULES)}
        places |= {f"{end}_{name}": place for place, name in enumerate(self.signals) for end in ("min", "max")}
        return sorted(reasons, key=lambda reason: (places.get(reason, 9_999), reason.startswith("max_"), reason))

    def limit(self, reason: str, source: str) -> float | None:
        """The bound that the settings gave a reason for documents of `source`, or None where it has none."""
        settings = self.manifest.get("settings") or {}
        rules = settings.get("rules") or {}
        if isinstance(rules.get(source), dict):
            rules = rules[source]
        elif source in (settings.get("rule_sets") or {}):
            rules = {}  # a set by its name: what it holds is not written here
        bound = rules.get(reason, settings.get(LIMITS.get(reason, reason)))
        return bound if isinstance(bound, int | float) and not isinstance(bound, bool) else None

    def limit_in_words(self, reason: str, source: str) -> str:
        if reason == "language":
            return ", ".join((self.manifest.get("settings") or {}).get("languages") or [])
        bound = self.limit(reason, source)
        side = "at most" if reason.startswith("max_") else "from" if reason == "near_duplicate" else "at least"
        return "" if bound is None else f"{side} {number(bound)}"

    def why(self, row: Row) -> tuple[str, str, str]:
        """What a dropped row's reason measured: name, value, and in words what would be kept; empty where unknown."""
        reason, value = row["reason"], measured(row)
        if reason == "language":
            return reason, f"{row.get('language') or 'unknown'} {number(value)}".strip(), ""
        name = COLUMNS.get(reason, signal_of(reason)).removeprefix("signal_").replace("_", " ")
        if value is None:
            return reason.replace("_", " "), "", ""
        return name, number(value), "" if reason == "near_duplicate" else self.limit_in_words(reason, row["source"])

    def distance(self, row: Row) -> float:
        """How far beyond its bound a dropped row lies, as a share of the bound; infinite where there is no telling."""
        value, bound = measured(row), self.limit(row["reason"], row["source"])
        return math.inf if value is None or bound is None else abs(value - bound) / (bound or 1)


def read_curated(folder: Path) -> Curated:
    """Open a finished curation folder, or the one in a run's folder; `ArtifactError` where there is none."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: name what `danube curate` wrote, for example data/documents")
    for place in (folder, folder / "documents"):
        manifest = read_manifest(place) if (place / MANIFEST).is_file() else {}
        if "curation_version" in manifest:
            return Curated(place, manifest)
    raise ArtifactError(f"{folder} holds no finished curation: name what `danube curate` wrote, or a run with one")


def signal_of(reason: str) -> str:
    """The column that a reason judges: rules are named `min_` or `max_` and their signal."""
    return "signal_" + re.sub("^(min|max)_", "", reason)


def measured(row: Row) -> float | None:
    """What a dropped row's reason measured."""
    return row.get(COLUMNS.get(row["reason"], signal_of(row["reason"])))


def number(value: float | None) -> str:
    """A signal's value: whole numbers as they are, shares to three digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) else units.trimmed(units.decimal(value, 3))


def visible(text: str) -> str:
    """A text without characters that a page or a terminal would obey instead of showing."""
    return text.replace("\r\n", "\n").translate(VISIBLE)


def excerpt(text: str, chars: int = EXCERPT_CHARS, lines: int = EXCERPT_LINES) -> str:
    """The start of a text: so many characters and lines at most, cut between paragraphs or words."""
    start = re.sub(r"\n\s*\n\s*", "\n\n", visible(text[: 8 * chars]).strip())
    cut = "\n".join(start.split("\n")[:lines])
    if len(cut) > chars:
        breaks = cut.rfind("\n\n", chars - 80, chars), cut.rfind(" ", chars - 40, chars), chars
        cut = cut[: next(place for place in breaks if place > 0)]
    return cut.rstrip() + (" …" if cut != start or len(text) > 8 * chars else "")


def few(files: Sequence[Path], column: str, label: Callable[[Any], Hashable] = str) -> dict[Any, list[Row]]:
    """Up to `ENOUGH_ROWS` rows for each label of the values in `column`, with excerpts in the place of texts.

    Labels are looked for in more row groups than are read whole, so that rare ones are found too.
    """
    found: dict[Any, list[Row]] = defaultdict(list)
    read_whole = 0
    for _, parquet, group in row_groups(files):
        places: dict[Hashable, list[int]] = defaultdict(list)
        for place, value in enumerate(parquet.read_row_group(group, [column]).column(0).to_pylist()):
            places[label(value)].append(place)
        wanted = [key for key in places if len(found[key]) < ENOUGH_ROWS]
        if not wanted:
            continue
        table = parquet.read_row_group(group)
        for key in wanted:
            step = max(1, len(places[key]) // ROWS_PER_GROUP)
            found[key] += map(shown, table.take(places[key][::step][:ROWS_PER_GROUP]).to_pylist())
        if (read_whole := read_whole + 1) == TEXT_GROUPS:
            break
    return dict(found)


def shown(row: Row) -> Row:
    """A row with its text cut to an excerpt, `chars` its length before, and all its words safe to show."""
    words = {name: visible(value) for name, value in row.items() if isinstance(value, str) and name != "text"}
    text = row.get("text") or ""
    return {**row, **words, "text": excerpt(text), "chars": len(text)}


def row_groups(files: Sequence[Path]) -> Iterator[tuple[Path, pq.ParquetFile, int]]:
    """Some row groups of some files, in the order of hashes: a fair choice, and the same one each time."""
    for path in sorted(files, key=lambda file: by_hash(f"{file.parent.name}/{file.name}"))[:FILES]:
        with pq.ParquetFile(path) as parquet:
            numbers = sorted(range(parquet.num_row_groups), key=lambda group: by_hash(f"{path.name} {group}"))
            yield from ((path, parquet, group) for group in numbers[:GROUPS_PER_FILE])


def by_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def duplicate_pairs(curated: Curated, wanted: dict[str, int]) -> list[tuple[Row, Row]]:
    """Dropped rows with the kept rows that they repeat, both with whole texts: so many for each reason of `wanted`.

    Kept documents are looked for by their ids in a bounded part of the folder; a pair whose half lies elsewhere is
    left out. Of what is found, pairs are taken evenly from the least similar one to the most similar.
    """
    named: dict[str, tuple[tuple[str, float, str], Place]] = {}
    for path, group, table in _parts(curated, "dropped", ["reason", "duplicate_of", "similarity", "id"]):
        for index, row in enumerate(table.to_pylist()):
            if row["reason"] in wanted and row["duplicate_of"] and len(named) < MOST_NAMED:
                key = row["reason"], row.get("similarity") or 1.0, row["id"]
                named.setdefault(row["duplicate_of"], (key, (path, group, index)))
    found: dict[str, list[tuple[tuple[str, float, str], Place, Place]]] = {reason: [] for reason in wanted}
    for path, group, table in islice(_parts(curated, "kept", ["id"]), ID_GROUPS) if named else ():
        for index, name in enumerate(table["id"].to_pylist()):
            if name in named:
                key, dropped = named[name]
                found[key[0]].append((key, dropped, (path, group, index)))
    pairs = []
    for reason, num in wanted.items():
        ranked = sorted(found[reason], key=lambda pair: pair[0])
        pairs += [(_row(dropped), _row(kept)) for _, dropped, kept in (ranked[i] for i in sample(len(ranked), num))]
    return pairs


def _parts(curated: Curated, table: Table, names: list[str]) -> Iterator[tuple[Path, int, pa.Table]]:
    for source in curated.counts:
        for path, parquet, group in row_groups(curated.files(table, source)):
            there = [name for name in names if name in parquet.schema_arrow.names]
            yield path, group, parquet.read_row_group(group, there)


def _row(place: Place) -> Row:
    path, group, index = place
    with pq.ParquetFile(path) as parquet:
        return parquet.read_row_group(group).slice(index, 1).to_pylist()[0]
