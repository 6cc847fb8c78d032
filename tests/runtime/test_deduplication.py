"""Deduplication on Ray Data: who is kept of planted duplicates, and the same bytes however it is carried out."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from ray.data import ExecutionResources

from danube_ray.artifacts import damage
from danube_ray.curate.dedup import band_keys, fingerprint, jaccard, shingles
from danube_ray.curate.records import Part, Split
from danube_ray.curate.splits import decided_path, judged_path
from danube_ray.curate.tables import DOCUMENTS, SIGNATURES, TableWriter
from danube_ray.curate.words import tokenize
from danube_ray.runtime import deduplication
from danube_ray.runtime.deduplication import deduplicate
from tests.conftest import REPOSITORY
from tests.curate.near_copies import prose, with_replaced_words

# What makes even a small job shuffle, several times.
SMALL = {"shuffle_bytes": 30_000, "partition_bytes": 10_000}
NUM_SHUFFLES = 8  # of `planted`
PRIORITIES = {"books": 0, "web": 1}


@dataclass(frozen=True)
class Row:
    id: str
    text: str
    quality: float | None = None


def write_split(work: Path, source: str, name: str, rows: list[Row]) -> Split:
    """A judged split."""
    split = Split(source, "/", (Part(name, 1, 1),))
    with (
        TableWriter(judged_path(work, split, "documents"), DOCUMENTS) as documents,
        TableWriter(judged_path(work, split, "signatures"), SIGNATURES) as signatures,
    ):
        for row in rows:
            documents.add({"id": row.id, "text": row.text, "quality": row.quality})
            bands = band_keys(tokenize(row.text))
            packed = None if bands is None else bands.astype("<u8").tobytes()
            signatures.add({"fingerprint": fingerprint(row.text), "bands": packed})
    return split


def name(number: int) -> str:
    return f"{number:032x}"


def run(splits: list[Split], work: Path, near: bool = True, min_jaccard: float = 0.75, **settings) -> list[list[dict]]:
    """What is dropped of each split."""
    deduplicate(splits, work, priorities=PRIORITIES, near=near, min_jaccard=min_jaccard, **settings)
    paths = [decided_path(work, split, "duplicates") for split in splits]
    return [pq.read_table(path).to_pylist() if path.is_file() else [] for path in paths]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.ray
def test_the_best_of_a_cluster_is_kept_and_named(ray_session, tmp_path):
    rng = random.Random(0)
    a, b, c, d, alone = (prose(rng, 200) for _ in range(5))
    near_b = with_replaced_words(rng, b, 3)
    near_c = [with_replaced_words(rng, c, number) for number in (2, 4)]
    books = [Row(name(9), a), Row(name(2), d, 0.2), Row(name(3), near_b, 0.5)]
    web = [Row(name(1), a.upper()), Row(name(4), "one two"), Row(name(5), "One  two"), Row(name(6), b, 0.6)]
    more = [Row(name(8), near_c[0]), Row(name(7), c), Row(name(10), near_c[1]), Row(name(11), d + "\n", 0.3)]
    splits = [
        write_split(tmp_path, "web", "1", web),
        write_split(tmp_path, "web", "empty", []),
        write_split(tmp_path, "books", "2", books),
        write_split(tmp_path, "web", "3", [Row(name(12), alone), *more]),
    ]
    steps = []
    found = run(splits, tmp_path, on_progress=lambda done, total: steps.append((done, total)))

    def near(row: int, kept: int, one: str, other: str) -> dict:
        similarity = jaccard(shingles(tokenize(one)), shingles(tokenize(other)))
        assert 0.75 <= similarity < 1
        return {"row": row, "duplicate_of": name(kept), "reason": "near_duplicate", "similarity": similarity}

    def equal(row: int, kept: int) -> dict:
        return {"row": row, "duplicate_of": name(kept), "reason": "duplicate", "similarity": 1.0}

    assert found == [
        [equal(0, 9), equal(2, 4)],  # the first source keeps its copy; in one source the least id
        [],
        [equal(1, 11), near(2, 6, near_b, b)],  # the better one is kept whatever its source
        [near(1, 7, near_c[0], c), near(3, 7, near_c[1], c)],
    ]
    assert damage(tmp_path / "duplicates") is None
    summary = json.loads((tmp_path / "duplicates" / "summary.json").read_text())
    assert summary == {"documents": 12, "exact": 3, "near": 3, "clusters": {"2": 4, "3": 1}}
    assert steps == [(done, 5) for done in range(1, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["duplicates", "judged"]  # no work is left behind

    exact = run(splits, tmp_path, near=False)  # other settings: it is done again
    assert exact == [[row for row in rows if row["reason"] == "duplicate"] for rows in found]


@pytest.mark.ray
def test_a_chain_is_no_cluster(ray_session, tmp_path):
    words = prose(random.Random(1), 1_000).split()
    rows = [Row(name(start), " ".join(words[start : start + 700])) for start in range(0, 300, 60)]
    split = write_split(tmp_path, "web", "1", rows)
    [found] = run([split], tmp_path, min_jaccard=0.8)
    # Each shares 640 of 700 words with the next (0.84), 580 with the one after it (0.71).
    assert [(row["row"], row["duplicate_of"]) for row in found] == [(1, name(0)), (3, name(120))]


def planted(work: Path) -> list[Split]:
    """240 documents in 6 splits of 2 sources; a third are copies or near copies of others, wherever these are."""
    rng = random.Random(3)
    texts = [prose(rng, rng.randrange(60, 120)) for _ in range(160)]
    for _ in range(80):
        text = rng.choice(texts)
        texts.append(text if rng.random() < 0.3 else with_replaced_words(rng, text, 1))
    rows = [Row(name(rng.getrandbits(128)), text, rng.choice([None, 0.25, 0.5])) for text in texts]
    rng.shuffle(rows)
    return [write_split(work, "books" if number % 3 else "web", str(number), rows[number::6]) for number in range(6)]


@pytest.fixture(scope="module")
def whole(ray_session, tmp_path_factory) -> dict[str, bytes]:
    """What is left by one process, without any shuffle."""
    work = tmp_path_factory.mktemp("whole")
    found = run(planted(work), work)
    assert 70 < sum(map(len, found)) <= 80
    return contents(work / "duplicates")


@pytest.mark.ray
def test_every_dropped_document_resembles_a_kept_one(ray_session, tmp_path):
    splits = planted(tmp_path)
    found = run(splits, tmp_path)
    tables = [pq.read_table(judged_path(tmp_path, split, "documents")).to_pylist() for split in splits]
    texts = {row["id"]: row["text"] for table in tables for row in table}
    dropped = {tables[number][row["row"]]["id"]: row for number, rows in enumerate(found) for row in rows}
    assert {row["reason"] for row in dropped.values()} == {"duplicate", "near_duplicate"}
    for id, row in dropped.items():
        assert row["duplicate_of"] not in dropped
        similarity = jaccard(*(shingles(tokenize(texts[one])) for one in (id, row["duplicate_of"])))
        assert similarity == row["similarity"] >= 0.75
        assert (row["reason"] == "duplicate") == (fingerprint(texts[id]) == fingerprint(texts[row["duplicate_of"]]))
    for rows in found:
        assert [row["row"] for row in rows] == sorted(row["row"] for row in rows)


@pytest.mark.ray
@pytest.mark.parametrize("num_cpus", [1, 4])
def test_the_bytes_depend_on_no_cpus_and_no_shuffles(ray_session, whole, tmp_path, num_cpus, monkeypatch):
    limits = ExecutionResources(cpu=num_cpus)
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "resource_limits", limits)
    shuffles = counted_shuffles(monkeypatch)
    run(planted(tmp_path), tmp_path, **SMALL)
    assert contents(tmp_path / "duplicates") == whole
    assert len(shuffles) == NUM_SHUFFLES


def counted_shuffles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By what key documents were brought together from now on."""
    done, meet = [], deduplication._Job._meet

    def counting(self, placed, read, reduce, key, num_bytes):
        done.append(key)
        yield from meet(self, placed, read, reduce, key, num_bytes)

    monkeypatch.setattr(deduplication._Job, "_meet", counting)
    return done


DIES_AFTER = """
import os, signal, sys
from pathlib import Path
from danube_ray.runtime import deduplication
from tests.runtime.test_deduplication import SMALL, planted, run

once, files = deduplication._once, []

def dying_once(path, make):
    if not path.is_file():
        files.append(path)
    array = once(path, make)
    if len(files) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return array

deduplication._once = dying_once
work = Path(sys.argv[1])
run(planted(work), work, shuffle_bytes=SMALL["shuffle_bytes"])  # in as many parts, but in this process: that is faster
"""


@pytest.mark.ray
@pytest.mark.parametrize("num_files", [2, 7])
def test_killed_and_started_again_it_leaves_the_same_bytes(ray_session, whole, tmp_path, monkeypatch, num_files):
    address = ray.get_runtime_context().gcs_address
    variables = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(REPOSITORY)}
    died = subprocess.run([sys.executable, "-c", DIES_AFTER, tmp_path, str(num_files)], env=variables, check=False)
    assert died.returncode == -9
    assert not (tmp_path / "duplicates").exists()
    [stages] = tmp_path.glob(".duplicates.*")
    done = len(list(stages.glob("*-of-*.npy")))
    assert done
    shuffles = counted_shuffles(monkeypatch)
    run(planted(tmp_path), tmp_path, **SMALL)
    assert len(shuffles) == NUM_SHUFFLES - done
    assert contents(tmp_path / "duplicates") == whole
    monkeypatch.setattr(deduplication, "session", None)  # no cluster is needed
    run(planted(tmp_path), tmp_path, **SMALL)
    next((tmp_path / "duplicates").rglob("*.parquet")).write_bytes(b"")
    monkeypatch.undo()
    run(planted(tmp_path), tmp_path)
    assert contents(tmp_path / "duplicates") == whole


@pytest.mark.ray
@pytest.mark.parametrize("rows", [None, [], [Row(name(1), "only one")]], ids=["no split", "no document", "one"])
def test_nothing_to_compare_leaves_nothing_to_drop(ray_session, tmp_path, rows):
    splits = [] if rows is None else [write_split(tmp_path, "web", "1", rows)]
    assert not any(run(splits, tmp_path))
    summary = json.loads((tmp_path / "duplicates" / "summary.json").read_text())
    assert summary == {"documents": len(rows or []), "exact": 0, "near": 0, "clusters": {}}
