"""From labelled folders to passages to train on: cut, measured, without duplicates, parted by document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from danube_ray.artifacts import ArtifactError
from danube_ray.config import NO_RULES
from danube_ray.curate.dedup import band_keys, fingerprint, forest, star_pairs
from danube_ray.curate.heuristics import judge
from danube_ray.curate.language import identify
from danube_ray.curate.quality.gbm import FEATURES, as_table
from danube_ray.curate.quality.linear import buckets
from danube_ray.curate.quality.settings import Portion, QualitySettings
from danube_ray.curate.readers import Reading, read_split
from danube_ray.curate.records import Quarantined, Skipped, Split
from danube_ray.curate.splits import commit_files, document_id, verified
from danube_ray.curate.tables import TableWriter

MIN_DOCUMENTS = 3  # of a class, so that each part has one; a source of fewer is trained on alone
PASSAGES = pa.schema(
    [
        ("document", pa.binary(16)),
        ("text", pa.string()),
        ("fingerprint", pa.binary(16)),
        ("bands", pa.list_(pa.uint64())),
        ("passes", pa.bool_()),
        ("signals", pa.list_(pa.float64())),
        ("buckets", pa.list_(pa.int32())),
    ]
)


def gather_split(split: Split, settings: QualitySettings, work: Path) -> dict[str, Any]:
    """Read a split's documents in the wanted languages as measured passages; counts of what was there."""
    if (counts := verified(work, "passages", split)) is not None:
        return counts
    seen: Counter[str] = Counter(read=0, documents=0, passages=0)
    path = _path(work, split)
    with TableWriter(path, PASSAGES) as table:
        for item in read_split(split, Reading(settings.max_document_bytes, settings.extraction)):
            if isinstance(item, Skipped):
                continue
            seen["read"] += 1
            if isinstance(item, Quarantined):
                seen["unreadable"] += 1
                continue
            if not identify(item.text).is_one_of(settings.languages, settings.min_language_score):
                seen["other_language"] += 1
                continue
            seen["documents"] += 1
            key = document_id(split.source, item.url, item.text)
            for text in passages(item.text, settings.passage_chars, settings.passages_per_document):
                table.add({"document": key, "text": text, **_measured(text, settings)}, len(text))
                seen["passages"] += 1
    return commit_files(work, "passages", split, [path], dict(seen))


def passages(text: str, num_chars: int, most: int) -> list[str]:
    """A text cut at line ends into passages of about `num_chars` characters; of more than `most`, as many, spread.

    A text that is hardly longer stays whole, and the first passage is always among them: the encoder reads beginnings.
    """
    cut = list(_cut(text, num_chars))
    if len(cut) > most:
        cut = [cut[index] for index in np.linspace(0, len(cut) - 1, most).round().astype(int)]
    return cut


def _cut(text: str, num_chars: int) -> Iterator[str]:
    start = 0
    while len(text) - start > 1.5 * num_chars:
        for separator in ("\n", " "):
            end = text.find(separator, start + num_chars, start + num_chars * 3 // 2)
            if end >= 0:
                break
        end = end if end >= 0 else start + num_chars
        if passage := text[start:end].strip():
            yield passage
        start = end
    if passage := text[start:].strip():
        yield passage


def _measured(text: str, settings: QualitySettings) -> dict[str, Any]:
    verdict = judge(text, NO_RULES)
    words, signals = verdict.words, verdict.signals
    bands = band_keys(words)
    return {
        "fingerprint": fingerprint(text),
        "bands": [] if bands is None else bands.tolist(),
        "passes": settings.rules.broken(signals) is None,
        "signals": as_table([signals])[0].tolist(),
        "buckets": buckets(words, settings.num_buckets).tolist(),
    }


@dataclass(frozen=True, eq=False)
class Passages:
    """N labelled passages. `sources` names S sources; what is (N, ...) belongs to a passage."""

    sources: tuple[str, ...]
    source: np.ndarray  # (N,) int64 into `sources`
    good: np.ndarray  # (N,) bool
    document: np.ndarray  # (N,) int64
    part: np.ndarray  # (N,) of `Portion`
    passes: np.ndarray  # (N,) bool, whether the rules would let it pass
    signals: np.ndarray  # (N, F) float64
    buckets: list[np.ndarray]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: np.ndarray) -> Passages:
        """The passages of these rows: bool (N,) or indexes."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Passages(
            self.sources,
            source=self.source[rows],
            good=self.good[rows],
            document=self.document[rows],
            part=self.part[rows],
            passes=self.passes[rows],
            signals=self.signals[rows],
            buckets=[self.buckets[row] for row in rows],
            texts=[self.texts[row] for row in rows],
        )

    def of(self, part: Portion) -> Passages:
        return self.select(self.part == part)


def load_passages(splits: Sequence[Split], good: Mapping[str, bool], work: Path, settings: QualitySettings) -> Passages:
    """What `gather_split` left of all splits, each text once, at most `passages_per_source`; sources in `good`'s order.

    Of near-duplicates (texts linked by equal MinHash bands) one stays, so none lies on both sides of a split. Raises
    `ArtifactError` for a class with too few documents.
    """
    schema = PASSAGES.append(pa.field("source", pa.int64()))
    order = {source: number for number, source in enumerate(good)}
    tables = []
    for split in splits:
        if (path := _path(work, split)).is_file():
            table = pq.read_table(path)
            tables.append(table.append_column("source", pa.array([order[split.source]] * len(table), pa.int64())))
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    table = table.take(_each_once(table, settings.passages_per_source))

    source = table["source"].to_numpy()
    _, document = np.unique(np.array(table["document"].to_pylist(), "S16"), return_inverse=True)
    labels = np.array(list(good.values()))[source]
    for label, name in ((True, "good"), (False, "raw")):
        num_documents = len(np.unique(document[labels == label]))
        if num_documents < MIN_DOCUMENTS:
            raise ArtifactError(
                f"the {name} sources have {num_documents} documents without duplicates, in "
                f"{', '.join(settings.languages) or 'any language'}: {MIN_DOCUMENTS} or more are needed to train on"
            )
    return Passages(
        sources=tuple(order),
        source=source,
        good=labels,
        document=document,
        part=_parts(source, document, settings),
        passes=table["passes"].to_numpy(zero_copy_only=False),
        signals=np.array(table["signals"].to_pylist(), np.float64).reshape(-1, len(FEATURES)),
        buckets=[np.array(row, np.int64) for row in table["buckets"].to_pylist()],
        texts=table["text"].to_pylist(),
    )


def _each_once(table: pa.Table, most_of_a_source: int) -> np.ndarray:
    """Rows that stay, in the order of their fingerprints: one of each set of near-duplicates, so many of a source."""
    prints = np.array(table["fingerprint"].to_pylist(), "S16")
    order = np.lexsort((table["source"].to_numpy(), prints))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    bands = table["bands"].to_pylist()
    sizes = [len(row) for row in bands]
    keys = np.array([key for row in bands for key in row], np.uint64)
    first = np.frombuffer(b"".join(table["fingerprint"].to_pylist()), "<u8").reshape(-1, 2)[:, 0]
    # Equal texts share their fingerprint, texts too short for a band too.
    pairs = star_pairs(np.concatenate((keys, first)), np.concatenate((np.repeat(place, sizes), place)))
    stays = np.ones(len(order), bool)
    stays[forest(len(order), [pairs])[:, 0]] = False
    rows = order[stays]
    source = table["source"].to_numpy()[rows]
    kept = [np.flatnonzero(source == number)[:most_of_a_source] for number in np.unique(source)]
    return rows[np.sort(np.concatenate(kept))] if kept else rows


def _parts(source: np.ndarray, document: np.ndarray, settings: QualitySettings) -> np.ndarray:
    """(N,) the part of each passage: shares of each source's documents, in the order of their hashes."""
    part = np.full(len(source), "training", "<U11")
    for number in np.unique(source):
        documents = np.unique(document[source == number])  # numbered in the order of their ids, which are hashes
        if len(documents) < MIN_DOCUMENTS:
            continue
        num_held_out = max(1, round(settings.held_out_share * len(documents)))
        num_calibration = max(1, round(settings.calibration_share * len(documents)))
        of_source = source == number
        part[of_source & np.isin(document, documents[:num_held_out])] = "held-out"
        later = documents[num_held_out : num_held_out + num_calibration]
        part[of_source & np.isin(document, later)] = "calibration"
    return part


def _path(work: Path, split: Split) -> Path:
    return work / "passages" / split.source / f"{split.name}.parquet"
