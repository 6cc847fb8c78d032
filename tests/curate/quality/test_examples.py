"""From documents to passages: nothing is lost in cutting, and no text lies on both sides of a split."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from danube_ray.artifacts import ArtifactError
from danube_ray.curate.quality import examples
from danube_ray.curate.quality.examples import Passages, gather_split, load_passages, passages
from danube_ray.curate.records import Split
from danube_ray.curate.sources import plan_splits
from tests.curate.quality.corpus import TINY, text, write_source

SETTINGS = dataclasses.replace(TINY, languages=())


def gather(folder: Path, labels: dict[str, bool]) -> tuple[list[Split], Path]:
    splits = [split for name in labels for split in plan_splits(name, folder / f"{name}.jsonl", 2**20)]
    for split in splits:
        gather_split(split, SETTINGS, folder / "work")
    return splits, folder / "work"


def load(folder: Path, labels: dict[str, bool], settings=SETTINGS) -> Passages:
    splits, work = gather(folder, labels)
    return load_passages(splits, labels, work, settings)


def test_passages_hold_the_whole_text_in_its_order():
    lines = [f"line {number} of a long text that goes on and on" for number in range(400)]
    cut = passages("\n".join(lines), 1000, most=100)
    assert "\n".join(cut) == "\n".join(lines)
    assert all(1000 <= len(part) <= 1500 for part in cut)
    assert passages("x" * 5000, 1000, most=100) == ["x" * 1000] * 4 + ["x" * 1000]
    assert passages(" \n", 1000, most=100) == []
    assert passages("short\ntext", 1000, most=100) == ["short\ntext"]


def test_of_a_long_text_so_many_passages_are_drawn_from_start_to_end():
    cut = passages("\n".join(f"{number:05} line" for number in range(10_000)), 100, most=5)
    numbers = [int(part[:5]) for part in cut]
    assert len(cut) == 5
    assert numbers[0] == 0
    assert numbers[-1] > 9_900
    assert np.ptp(np.diff(numbers)) <= 20


def test_documents_are_parted_whole_and_every_part_has_each_source(tmp_path):
    generator = np.random.default_rng(0)
    labels = {"books": True, "web": False}
    for name, good in labels.items():
        rows = [{"text": "\n".join(text(generator, good) for _ in range(12)), "url": str(i)} for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load(tmp_path, labels)
    assert len(found) > 40
    for part in ("training", "calibration", "held-out"):
        assert set(found.of(part).source) == {0, 1}
    for document in np.unique(found.document):
        assert len(np.unique(found.part[found.document == document])) == 1
    by_part = {part: len(np.unique(found.of(part).document)) for part in ("training", "calibration", "held-out")}
    assert by_part == {"training": 12, "calibration": 4, "held-out": 4}
    assert (found.good == (found.source == 0)).all()


def test_a_text_and_its_near_duplicates_are_there_once_whatever_source_they_are_of(tmp_path):
    generator = np.random.default_rng(3)
    texts = [text(generator, True) for _ in range(20)]
    near = [f"{original} And one more sentence." for original in texts]
    for name, rows in (("good", texts), ("raw", [*near, *texts[:5], *(text(generator, False) for _ in range(9))])):
        written = [json.dumps({"text": row, "url": str(number)}) for number, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(written))
    found = load(tmp_path, {"good": True, "raw": False})
    begun = [row[:40] for row in found.texts]
    assert len(found) == 29
    assert len(set(begun)) == 29


def test_a_source_is_cut_to_its_share_and_a_class_without_documents_is_refused(tmp_path):
    labels = {"good": True, "raw": False}
    few = dataclasses.replace(SETTINGS, passages_per_source=12)
    for folder, num_raw in ((tmp_path / "two", 2), (tmp_path / "eight", 8)):
        write_source(folder / "good.jsonl", 1, True, 30)
        write_source(folder / "raw.jsonl", 2, False, num_raw)
    with pytest.raises(ArtifactError, match=r"raw sources have 2 documents .* 3 or more"):
        load(tmp_path / "two", labels, few)
    found = load(tmp_path / "eight", labels, few)
    assert np.bincount(found.source).tolist() == [12, 8]


def test_other_languages_are_counted_and_left_out(tmp_path):
    german = "Dies ist ein deutscher Satz, den niemand auf Englisch gesagt hat, und noch einer dazu. " * 5
    english = "This is an English sentence that nobody has said in German, and another one beside it. " * 5
    (tmp_path / "web.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in (german, english)) + "\n{torn")
    [split] = plan_splits("web", tmp_path / "web.jsonl", 2**20)
    counts = gather_split(split, TINY, tmp_path / "work")
    assert counts == {"read": 3, "documents": 1, "passages": 1, "other_language": 1, "unreadable": 1}
    assert pq.read_table(next(tmp_path.rglob("*.parquet")))["text"].to_pylist() == [english.strip()]


def test_a_gathered_split_is_not_read_again(tmp_path, monkeypatch):
    [split] = plan_splits("web", write_source(tmp_path / "web.jsonl", 1, False, 3), 2**20)
    first = gather_split(split, SETTINGS, tmp_path / "work")
    monkeypatch.setattr(examples, "read_split", None)
    assert gather_split(split, SETTINGS, tmp_path / "work") == first
