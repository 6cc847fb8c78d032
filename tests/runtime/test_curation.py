"""Curation on Ray Data: counts, duplicates across sources, refusals, and a run that is killed and started again."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from danube_ray.artifacts import ArtifactError, damage, read_manifest
from danube_ray.config import ConfigError, CurationConfig
from danube_ray.runtime import curation
from danube_ray.runtime.curation import curate
from tests.curate.test_heuristics import PROSE

NUM_FILES = 12
# A split a file, and pages that resemble each other.
SMALL = {"split_bytes": 1, "near_duplicates": False}
DIES_AFTER = """
import os, signal, sys
from pathlib import Path
from danube_ray.config import CurationConfig
from danube_ray.runtime.curation import curate

def die(step, done, total):
    if (step, done) == (sys.argv[3], int(sys.argv[4])):
        os.kill(os.getpid(), signal.SIGKILL)

settings = CurationConfig(split_bytes=1, near_duplicates=False)
curate({"web": sys.argv[1]}, Path(sys.argv[2]), settings, die)
"""


def page(number: int) -> str:
    return f"{PROSE}\nThis is the page of number {number}."


def write_rows(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def texts_of(folder: Path) -> set[str]:
    return {row["text"] for row in rows_of(folder)}


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of what the manifest names, and of the manifest."""
    return {name: (folder / name).read_bytes() for name in ("manifest.json", *read_manifest(folder)["files"])}


@pytest.mark.ray
def test_counts_add_up_and_the_first_source_keeps_a_duplicate(ray_session, tmp_path):
    write_rows(tmp_path / "web" / "a.jsonl", page(1), page(2).replace("The", "THE"), "short")
    write_rows(tmp_path / "web" / "b.jsonl", page(1), page(3))
    (tmp_path / "web" / "c.jsonl").write_text("{torn\n")
    docs = write_rows(tmp_path / "docs.jsonl", page(2), page(4), "12345 67890")
    steps = []
    manifest = curate(
        {"docs": docs, "web": tmp_path / "web"},
        tmp_path / "out",
        CurationConfig(rule_sets={"docs": "none"}, max_quarantine_share=0.2, **SMALL),
        lambda *step: steps.append(step),
    )
    counts = manifest["counts"]
    per_split = [(step, done, 4) for step in ("judge", "finish") for done in range(1, 5)]
    assert [step for step in steps if step[0] != "deduplicate"] == per_split
    kept = {"docs": [page(2), page(4)], "web": [page(1), page(3)]}
    for source, texts in kept.items():
        assert sorted(row["text"] for row in rows_of(tmp_path / "out" / "documents" / source)) == texts
        assert counts[source]["kept_bytes"] == sum(map(len, texts))
        found = counts[source]
        assert found["read"] == found["kept"] + found["dropped"] + found["quarantined"]
    assert counts["docs"]["dropped_by"] == {"language": 1}
    assert counts["web"]["dropped_by"] == {"duplicate": 2, "min_words": 1}
    assert counts["web"]["quarantined_by"] == {"malformed JSON": 1}

    by_id = {row["id"]: row for row in rows_of(tmp_path / "out" / "documents")}
    duplicates = [row for row in rows_of(tmp_path / "out" / "dropped") if row["reason"] == "duplicate"]
    pairs = {(row["source"], row["text"], by_id[row["duplicate_of"]]["source"]) for row in duplicates}
    assert pairs == {("web", page(1), "web"), ("web", page(2).replace("The", "THE"), "docs")}

    assert read_manifest(tmp_path / "out") == manifest
    assert damage(tmp_path / "out") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs.jsonl", "out", "web"]  # no work is left behind


@pytest.fixture
def web(tmp_path) -> Path:
    """Files of three pages each, two of them the next files' too."""
    for number in range(NUM_FILES):
        write_rows(tmp_path / "web" / f"{number:02}.jsonl", *(page(number + step) for step in range(3)))
    return tmp_path / "web"


@pytest.mark.ray
@pytest.mark.parametrize("step", [pytest.param("judge", marks=pytest.mark.slow), "finish"])
def test_killed_and_started_again_it_leaves_the_same_bytes(ray_session, web, tmp_path, step):
    settings, kill_after = CurationConfig(**SMALL), 3
    curate({"web": web}, tmp_path / "whole", settings)
    out = tmp_path / "killed"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DIES_AFTER, str(web), str(out), step, str(kill_after)]
    died = subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}, check=False)
    assert died.returncode == -9
    assert not out.exists()

    [work] = tmp_path.glob(".killed.*")
    records = sorted((work / "records" / "judged" / "web").glob("*.json"))
    assert len(records) >= (kill_after if step == "judge" else NUM_FILES)
    (work / "final" / "documents").mkdir(exist_ok=True, parents=True)
    (work / "final" / "documents" / ".torn.parquet").write_bytes(b"half")
    # Garbage of the same size and time in a file that was finished: reading it again would show.
    splits = curation.plan_splits("web", str(web), 1)
    [finished] = [split for split in splits if split.name == records[0].stem]
    spoil(web / finished.parts[0].file)
    curate({"web": web}, out, settings)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(rows_of(out / "documents")) == NUM_FILES + 2
    assert not list(tmp_path.glob(".killed.*"))


def spoil(path: Path) -> None:
    facts = path.stat()
    path.write_bytes(b"x" * facts.st_size)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.ray
def test_too_much_quarantine_fails_and_a_larger_share_goes_on(ray_session, web, tmp_path):
    (web / "bad.jsonl").write_text("{torn\n" * 5)
    with pytest.raises(ArtifactError, match=r"5 of 41 records of source 'web' can't be read \(5 malformed JSON\)"):
        curate({"web": web}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    generous = CurationConfig(max_quarantine_share=0.5)
    assert curate({"web": web}, tmp_path / "out", generous)["counts"]["web"]["quarantined"] == 5


@pytest.mark.ray
def test_a_finished_folder_is_left_alone_until_its_input_changes(ray_session, web, tmp_path, monkeypatch):
    out, settings = tmp_path / "out", CurationConfig(**SMALL)
    manifest = curate({"web": web}, out, settings)
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(curation, "session", None)  # no cluster is needed
        assert curate({"web": web}, out, settings) == manifest
    next(out.rglob("*.parquet")).write_bytes(b"")
    assert curate({"web": web}, out, settings) == manifest
    assert contents(out) == before
    write_rows(web / "new.jsonl", page(99))
    assert curate({"web": web}, out, settings)["counts"]["web"]["kept"] == manifest["counts"]["web"]["kept"] + 1


@pytest.mark.ray
def test_a_file_that_vanishes_is_named_in_plain_words(ray_session, web, tmp_path, monkeypatch):
    splits = curation.plan_splits("web", str(web), 1)
    monkeypatch.setattr(curation, "plan_splits", lambda *_: splits)
    (web / "05.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"05\.jsonl"):
        curate({"web": web}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_setting_is_refused_before_any_work(web, tmp_path, monkeypatch):
    monkeypatch.setattr(curation, "session", None)
    full = tmp_path / "full"
    write_rows(full / "mine.jsonl", "precious")
    for arguments, words in (
        (({}, tmp_path / "out"), "sources"),
        (({"web": tmp_path / "none"}, tmp_path / "out"), "path of source 'web'"),
        (({"a/b": web}, tmp_path / "out"), "source"),
        (({"web": web}, web / "out"), "apart from source 'web'"),
        (({"web": web}, web.parent), "apart from source 'web'"),
        (({"web": web}, full), "holds something else, which would be lost"),
        (({"web": web}, full / "mine.jsonl"), "holds something else, which would be lost"),
    ):
        with pytest.raises((ConfigError, ArtifactError), match=words):
            curate(*arguments)
    for settings in ({"max_quarantine_share": 2}, {"split_bytes": 0}, {"max_document_bytes": 0}, {"min_quality": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            CurationConfig(**settings)
    with pytest.raises(ConfigError, match="rule_sets is 'books', allowed is one of the sources web"):
        curate({"web": web}, tmp_path / "out", CurationConfig(rule_sets={"books": "prose"}))
    assert not (tmp_path / "out").exists()
    assert (full / "mine.jsonl").is_file()


@pytest.mark.ray
def test_real_pages_and_their_packed_copies(ray_session, shared_data, tmp_path):
    places = {
        "web": shared_data / "web" / "warc_dolma" / "tests" / "data" / "multiple_files",
        "wiki": shared_data / "wiki" / "wikitext2",
    }
    counts = curate(places, tmp_path / "out")["counts"]
    assert counts["web"]["read"] == 40
    assert counts["web"]["kept"] == counts["web"]["dropped_by"]["duplicate"] > 0
    assert counts["wiki"]["read"] == 5


@pytest.mark.ray
def test_planted_evaluation_items_go_and_nothing_else_does(ray_session, shared_data, tmp_path):
    gsm8k = shared_data / "eval" / "gsm8k" / "test.jsonl"
    questions = [json.loads(line)["question"] for line in gsm8k.read_text().splitlines()[:20]]
    with lzma.open(shared_data / "academic" / "scitldr" / "SciTLDR-A.dev.jsonl.xz", "rt") as file:
        abstracts = [" ".join(json.loads(line)["source"]) for line in file][:300]
    planted = [f"{abstract}\n{question}" for abstract, question in zip(abstracts, questions, strict=False)]
    write_rows(tmp_path / "papers.jsonl", *abstracts, *planted)

    settings = CurationConfig(rule_sets={"papers": "none"}, near_duplicates=False, max_code_share=1)
    plain = curate({"papers": tmp_path / "papers.jsonl"}, tmp_path / "plain", settings)
    assert plain["counts"]["papers"]["kept"] > 300
    clean = curate(
        {"papers": tmp_path / "papers.jsonl"}, tmp_path / "clean", replace(settings, benchmarks={"gsm8k": gsm8k})
    )
    removed = texts_of(tmp_path / "plain" / "documents") - texts_of(tmp_path / "clean" / "documents")
    assert removed == set(planted) & texts_of(tmp_path / "plain" / "documents") and len(removed) >= 19
    assert clean["contaminated"]["gsm8k"]["items"] == len(removed)
    pairs = pq.read_table(tmp_path / "clean" / "contamination.parquet").to_pylist()
    assert {row["question"] for row in pairs} <= set(questions)
    assert all(row["evidence"].split()[0] in row["question"] for row in pairs)


@pytest.mark.ray
def test_rerun_after_a_report_was_lost_writes_it_again(ray_session, web, tmp_path):
    curate({"web": web}, tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    curate({"web": web}, tmp_path / "out")
    assert "web" in (tmp_path / "out" / "report.html").read_text()
