"""Tokenization on Ray Data: complete or not there, resumed split by split, and the bytes of a run in one process."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import logging
import random
import statistics
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from danube_ray.artifacts import ArtifactError
from danube_ray.config import ConfigError, CurationConfig
from danube_ray.data.documents import commit_splits, document_splits, tokenize_split, validation_bounds
from danube_ray.data.provenance import documents_of
from danube_ray.data.shards import open_sources, open_validation
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.data.windows import MixtureReader
from danube_ray.demo.docstrings import read_module
from danube_ray.runtime.curation import curate
from danube_ray.runtime.tokenization import tokenize, train_tokenizer_on
from tests.data.documents import write_documents
from tests.runtime.text import MODEL, small_run

SIZES = {"books": [4], "web": [300, 200, 1], "wiki": [90, 60]}


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents", SIZES)


@pytest.fixture
def tokenizer(documents: Path, tmp_path: Path) -> Tokenizer:
    return train_tokenizer_on(documents, tmp_path / "tokenizer", 500)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_tokenizer_is_trained_on_the_documents(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.vocab_size == 500
    assert "▁wiki" in tokenizer.pieces
    assert train_tokenizer_on(documents, tmp_path / "again", 500).sha256 == tokenizer.sha256


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_run_resumes_split_by_split_and_leaves_the_bytes_of_one_process(
    documents: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out, folder = tmp_path / "tokens", tokenizer.model_file.parent
    splits, progress = document_splits(documents), list[tuple[int, int]]()
    bounds = validation_bounds(splits)
    alone = tmp_path / "alone"
    shards = [tokenize_split(split, tokenizer, bounds[split.source], alone) for split in splits]
    commit_splits(shards, tokenizer, alone)

    def crash(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(documents, folder, out, on_progress=crash)
    assert not out.exists()
    manifest = tokenize(documents, folder, out, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(done, 6) for done in range(1, 7)]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    made, expected = content(out), content(alone)
    assert made.pop("manifest.json") != expected.pop("manifest.json"), "the root's names the inputs too"
    assert made == expected
    stores = {**open_sources(out), "validation": open_validation(out)}
    counted = {group: {name: store.num_documents for name, store in part.items()} for group, part in stores.items()}
    told = {**manifest["counts"], "validation": manifest["validation"]}
    assert counted == {
        group: {name: facts["documents"] for name, facts in part.items()} for group, part in told.items()
    }
    assert sum(sum(part.values()) for part in counted.values()) == sum(map(sum, SIZES.values()))

    # Complete: nothing is done. Torn, or edited: its split is done again, and no other.
    progress.clear()
    assert tokenize(documents, folder, out, on_progress=lambda done, total: progress.append((done, total))) == manifest
    assert progress == []
    torn, kept = out / "wiki" / "unscored" / "shard-00001.bin", out / "wiki" / "unscored" / "shard-00000.bin"
    torn.write_bytes(torn.read_bytes()[:-2])
    with pytest.raises(ArtifactError, match=r"shard-00001\.bin is missing or torn"):
        open_sources(out)
    edited = out / "books" / "unscored" / "shard-00000.bin"
    edited.write_bytes(edited.read_bytes()[::-1])
    before = kept.stat().st_ino
    assert tokenize(documents, folder, out) == manifest
    assert content(out) == {**expected, "manifest.json": (out / "manifest.json").read_bytes()}
    assert kept.stat().st_ino == before


def pages(*modules: ModuleType) -> dict[str, str]:
    """Pages of the modules' documentation, by name."""
    return {name: text for m in modules for name, text in read_module(Path(str(m.__file__)), m.__name__).pages}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_every_token_of_a_batch_leads_back_to_the_record_it_was_read_from(tmp_path: Path) -> None:
    """Raw records, curation, shards, plan, batch; and from the batch by provenance to the records again."""
    records = {"web": pages(argparse, logging), "docs": pages(inspect, statistics), "stdlib": pages(ast, random)}
    for source, texts in records.items():
        for part in range(2):
            lines = [json.dumps({"text": text, "url": url}) + "\n" for url, text in sorted(texts.items())[part::2]]
            (tmp_path / source).mkdir(exist_ok=True)
            (tmp_path / source / f"{part}.jsonl").write_text("".join(lines))
    settings = CurationConfig(
        rule_sets=dict.fromkeys(records, "none"), languages=(), mask=(), max_code_share=1.0, split_bytes=1
    )
    curate({source: tmp_path / source for source in records}, tmp_path / "documents", settings)
    tokenizer = train_tokenizer_on(tmp_path / "documents", tmp_path / "tokenizer", 500)
    tokenize(tmp_path / "documents", tmp_path / "tokenizer", tmp_path / "tokens")
    run = replace(small_run(tmp_path / "tokens", tmp_path, "run"), model=replace(MODEL, vocab_size=500))
    reader, sources = MixtureReader(run), open_sources(tmp_path / "tokens")
    for step in range(reader.num_steps):
        rows: list[list[int]] = [[] for _ in range(reader.plan.windows_per_step(step))]
        for passage in documents_of(reader.plan, sources, step):
            ids = tokenizer.encode_documents([records[passage.source][passage.url]])[0].tolist()
            rows[passage.slot] += ids[passage.document_token :][: passage.tokens]
        assert rows == reader(step, 0, 1)["tokens"].tolist()


def test_what_cannot_be_tokenized_fails_before_any_work(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tokenizer.model_file.parent
    with pytest.raises(ConfigError, match="danube curate"):
        tokenize(tmp_path / "absent", folder, tmp_path / "tokens")
    with pytest.raises(ConfigError, match="tokenizer"):
        tokenize(documents, tmp_path / "absent", tmp_path / "tokens")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="mine holds something else, which would be lost"):
        tokenize(documents, folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
