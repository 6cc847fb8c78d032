"""Documents become shards split by split, the same bytes whatever was done before; some are held out, never all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from danube_ray.artifacts import ArtifactError, commit
from danube_ray.config import ConfigError
from danube_ray.data.documents import (
    commit_splits,
    document_hash,
    document_splits,
    read_documents,
    sample_texts,
    tokenize_split,
    validation_bounds,
)
from danube_ray.data.shards import TokenStore, open_sources, open_validation
from danube_ray.data.tokenizer import Tokenizer
from tests.data.documents import document, write_documents

SIZES = {"books": [3], "web": [300, 1, 400], "wiki": [90, 60]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents", SIZES)


def tokenize_all(folder: Path, tokenizer: Tokenizer, out: Path) -> Path:
    splits = document_splits(folder)
    bounds = validation_bounds(splits)
    commit_splits([tokenize_split(split, tokenizer, bounds[split.source], out) for split in splits], tokenizer, out)
    return out


def texts(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    ends = store.document_ends().tolist()
    documents = [store.read(start, end - start).tolist() for start, end in zip([0, *ends], ends, strict=False)]
    assert all((ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) for ids in documents)
    return [tokenizer.decode(ids) for ids in documents]


def test_every_document_is_in_one_store_of_its_source_and_quality(folder: Path, trained: Tokenizer) -> None:
    out = tokenize_all(folder, trained, folder.parent / "tokens")
    sources, validation = open_sources(out), open_validation(out)
    bounds = validation_bounds(document_splits(folder))
    for source, sizes in SIZES.items():
        documents = [document(source, number) for number in range(sum(sizes))]
        held_out = [d["text"] for d in documents if document_hash(str(d["id"])) < bounds[source]]
        assert texts(validation[source], trained) == held_out
        assert 1 <= len(held_out) < 0.05 * len(documents) + 2
        for bucket, store in sources[source].items():
            quarter = None if bucket == "unscored" else int(bucket[1])
            expected = [
                d["text"]
                for d in documents
                if d["text"] not in held_out
                and (d["quality"] if d["quality"] is None else min(int(float(d["quality"]) * 4), 3)) == quarter
            ]
            assert texts(store, trained) == expected
            assert store.damage() is None
    assert sorted(sources["web"]) == ["q0", "q1", "q2", "q3"]
    assert {s: list(b) for s, b in sources.items() if s != "web"} == {"books": ["unscored"], "wiki": ["unscored"]}


def test_what_was_done_before_changes_no_byte(folder: Path, trained: Tokenizer, tmp_path: Path) -> None:
    whole = tokenize_all(folder, trained, tmp_path / "whole")
    again = tmp_path / "again"
    splits, bounds = document_splits(folder), validation_bounds(document_splits(folder))
    for split in reversed(splits[1:]):
        tokenize_split(split, trained, bounds[split.source], again)
    torn = again / "wiki" / "unscored" / "shard-00001.bin"
    torn.write_bytes(torn.read_bytes()[:-2])
    (again / ".records" / "web" / f"{2:016x}.json").unlink()
    (again / "web" / "q1" / ".shard-00000.left").write_bytes(b"by a crash")
    kept = again / "web" / "q0" / "shard-00000.bin"
    before = kept.stat().st_ino
    tokenize_all(folder, trained, again)
    assert kept.stat().st_ino == before, "a finished split is not done again"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in files:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("size", [2, 3, 10, 49, 500, 1_999, 2_000])
def test_a_source_of_any_size_keeps_documents_on_both_sides(tmp_path: Path, size: int) -> None:
    splits = document_splits(write_documents(tmp_path, {"web": [size]}))
    bound = validation_bounds(splits)["web"]
    held_out = sum(document_hash(f"web-{number}") < bound for number in range(size))
    assert 1 <= held_out <= size - 1
    assert held_out == max(1, round(size / 50)) if size < 2_000 else 25 < held_out < 55


def test_a_documents_folder_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="danube curate"):
        document_splits(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    commit(tmp_path / "empty", counts={})
    with pytest.raises(ConfigError, match="curation dropped all"):
        document_splits(tmp_path / "empty")
    with pytest.raises(ConfigError, match="source is 'validation'"):
        document_splits(write_documents(tmp_path / "named", {"validation": [5]}))
    with pytest.raises(ConfigError, match="documents of source 'book' is 1, allowed is at least 2"):
        validation_bounds(document_splits(write_documents(tmp_path / "single", {"book": [1], "web": [5]})))


def test_documents_are_those_that_the_manifest_names(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, {"web": [3, 2]})
    splits = document_splits(folder)
    (folder / "documents" / "web" / "stray.parquet").write_bytes(b"not of this curation")
    assert document_splits(folder) == splits and len(splits) == 2
    content = splits[0].path.read_bytes()
    splits[0].path.write_bytes(content[::-1])  # edited, as long as before
    with pytest.raises(ArtifactError, match="is not the file that the manifest names: run `danube curate` again"):
        document_splits(folder)


def test_no_more_is_read_at_once_than_a_row_group(tmp_path: Path) -> None:
    [split] = document_splits(write_documents(tmp_path, {"web": [600]}))
    batches = list(read_documents(split))
    assert [len(rows) for rows in batches] == [64] * 9 + [24]
    assert [row["id"] for rows in batches for row in rows] == [f"web-{number}" for number in range(600)]


def test_a_sample_is_the_same_each_time_balanced_and_never_held_out(folder: Path, tmp_path: Path) -> None:
    sample = list(sample_texts(folder, 20_000))
    assert sample == list(sample_texts(folder, 20_000))
    shutil.copytree(folder, tmp_path / "copy")
    assert sample == list(sample_texts(tmp_path / "copy", 20_000))
    size = sum(len(text) for text in sample)
    assert 20_000 <= size < 20_000 + 3 * 500
    bounds = validation_bounds(document_splits(folder))
    held_out = {
        document(source, number)["text"]
        for source, sizes in SIZES.items()
        for number in range(sum(sizes))
        if document_hash(f"{source}-{number}") < bounds[source]
    }
    assert not held_out & set(sample)
    everything = list(sample_texts(folder, 10**9))
    assert len(everything) == sum(map(sum, SIZES.values())) - len(held_out)
    share = sum(len(text) for text in everything if text.startswith("wiki")) / sum(map(len, everything))
    assert abs(sum(len(text) for text in sample if text.startswith("wiki")) / size - share) < 0.03
