"""From a batch to its documents and back: every token of every step is that of the document named for it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from danube_ray.artifacts import ArtifactError
from danube_ray.config import ConfigError, ModelConfig, RunConfig, StageConfig
from danube_ray.data import shards
from danube_ray.data.documents import commit_splits, document_hash, document_splits, tokenize_split, validation_bounds
from danube_ray.data.provenance import Passage, documents_of, find_document
from danube_ray.data.shards import open_sources, open_validation, quality_bucket
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.data.windows import MixtureReader, rank_rows
from tests.data.documents import document, write_documents

SIZES = {"books": [3], "web": [150, 1, 120], "wiki": [40, 30]}
MODEL = ModelConfig(
    vocab_size=1_000,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    context_length=64,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, trained: Tokenizer) -> RunConfig:
    """Two stages, the second of longer windows and of better web text; wiki is read more than twice."""
    folder = tmp_path_factory.mktemp("provenance")
    splits = document_splits(write_documents(folder / "documents", SIZES))
    bounds, out = validation_bounds(splits), folder / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "NAMES_AT_ONCE", 16)  # several row groups a shard
        commit_splits([tokenize_split(split, trained, bounds[split.source], out) for split in splits], trained, out)
    tokens = shards.store_sizes(open_sources(out))["wiki"]["unscored"]
    stages = (
        StageConfig(name="a", tokens=tokens, sequence_length=16, micro_batch_size=1, shares={"web": 1, "wiki": 3}),
        StageConfig(
            name="b",
            tokens=3 * tokens,
            sequence_length=64,
            micro_batch_size=1,
            shares={"web": 2, "wiki": 3},
            min_quality={"web": 0.5},
        ),
    )
    return RunConfig(name="p", model=MODEL, stages=stages, global_batch_tokens=320, tokens_dir=str(out))


@pytest.fixture(scope="module")
def reader(run: RunConfig) -> MixtureReader:
    return MixtureReader(run)


@pytest.fixture(scope="module")
def passages(run: RunConfig, reader: MixtureReader) -> list[list[Passage]]:
    """Of every step."""
    sources = open_sources(Path(run.tokens_dir))
    return [documents_of(reader.plan, sources, step) for step in range(reader.num_steps)]


def test_every_token_of_every_step_is_that_of_the_document_named(
    reader: MixtureReader, passages: list[list[Passage]], trained: Tokenizer
) -> None:
    encoded = {}
    for source, sizes in SIZES.items():
        for row in (document(source, number) for number in range(sum(sizes))):
            encoded[row["id"]] = row, trained.encode_documents([str(row["text"])])[0]
    for step, found in enumerate(passages):
        rebuilt = np.full_like(reader(step, 0, 1)["tokens"], 65_535)
        for passage in found:
            row, ids = encoded[passage.id]
            assert (passage.url, passage.document_tokens) == (row["url"], len(ids))
            assert passage.source == passage.id.split("-")[0]
            quality = row["quality"]
            assert passage.bucket == quality_bucket(None if quality is None else float(quality))
            end = passage.row_token + passage.tokens
            place = rebuilt[passage.slot, passage.row_token : end]
            assert (place == 65_535).all(), "no token has two documents"
            place[:] = ids[passage.document_token : passage.document_token + passage.tokens]
        assert np.array_equal(rebuilt, reader(step, 0, 1)["tokens"])


def test_the_steps_tried_have_what_is_hard(reader: MixtureReader, passages: list[list[Passage]]) -> None:
    rows = defaultdict[tuple[int, int], list[Passage]](list)
    for step, found in enumerate(passages):
        for passage in found:
            rows[step, passage.slot].append(passage)

    def split_of(passage: Passage) -> int:
        ends = np.cumsum(SIZES[passage.source])
        return int(np.searchsorted(ends, int(passage.id.split("-")[1]), side="right"))

    assert any(len({passage.id for passage in row}) > 3 for row in rows.values())
    assert any(len({split_of(passage) for passage in row}) > 1 for row in rows.values()), "across shards"
    assert {passage.epoch for row in rows.values() for passage in row if passage.source == "wiki"} == {0, 1, 2}
    assert {reader.plan.sequence_length(step) for step, _ in rows} == {16, 64}
    assert all(row[0].slot == slot for (_, slot), row in rows.items())


def test_held_out_documents_are_never_named_but_known(run: RunConfig, passages: list[list[Passage]]) -> None:
    splits = document_splits(Path(run.tokens_dir).parent / "documents")
    bounds, validation = validation_bounds(splits), open_validation(Path(run.tokens_dir))
    trained_on = {passage.id for found in passages for passage in found}
    for source, sizes in SIZES.items():
        ids = [f"{source}-{number}" for number in range(sum(sizes))]
        held_out = [name for name in ids if document_hash(name) < bounds[source]]
        assert not trained_on & set(held_out)
        spans = list(validation[source].documents(0, validation[source].num_tokens))
        assert [validation[source].names([span.number])[span.number][0] for span in spans] == held_out


def test_a_stage_with_a_least_quality_trains_on_no_document_below_it(
    run: RunConfig, passages: list[list[Passage]]
) -> None:
    first, second = passages[: run.stage_ends[0]], passages[run.stage_ends[0] :]

    def qualities(steps: list[list[Passage]]) -> set[float]:
        found = {passage.id for found in steps for passage in found if passage.source == "web"}
        return {float(document("web", int(name.split("-")[1]))["quality"] or 0) for name in found}

    assert min(qualities(first)) == 0.0
    assert qualities(second) == {0.5, 0.6, 0.7, 0.8, 0.9, 1.0}


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_a_ranks_documents_are_those_of_its_rows(
    run: RunConfig, reader: MixtureReader, passages: list[list[Passage]], world_size: int
) -> None:
    sources = open_sources(Path(run.tokens_dir))
    for step in (0, reader.num_steps - 1):
        together = []
        for rank in range(world_size):
            rows, _ = rank_rows(reader.plan.windows_per_step(step), rank, world_size)
            together += documents_of(reader.plan, sources, step, rows)
        assert together == passages[step]
    with pytest.raises(IndexError):
        documents_of(reader.plan, sources, 0, [10_000])


def test_every_document_is_found_with_the_steps_that_have_it(
    run: RunConfig, reader: MixtureReader, passages: list[list[Passage]]
) -> None:
    seen = defaultdict[str, set[tuple[int, int]]](set)
    for step, found in enumerate(passages):
        for passage in found:
            seen[passage.id].add((step, passage.slot))
    sources, validation = open_sources(Path(run.tokens_dir)), open_validation(Path(run.tokens_dir))
    unused = 0
    for source, sizes in SIZES.items():
        for name in (f"{source}-{number}" for number in range(sum(sizes))):
            if (place := find_document(sources, name)) is None:
                assert validation[source].find(name) is not None
                continue
            where, bucket, span = place
            assert where == source
            assert sources[source][bucket].names([span.number])[span.number][0] == name
            assert reader.plan.slots_of(source, bucket, span.start_token, span.end_token) == sorted(
                seen.get(name, set())
            )
            unused += name not in seen
    assert unused, "books are in no stage"
    assert find_document(sources, "nowhere") is None


def test_shards_of_an_older_version_train_but_name_no_documents(run: RunConfig, tmp_path: Path) -> None:
    for path in (old := tmp_path / "tokens", *Path(run.tokens_dir).rglob("*")):
        if path.is_file() and path.suffix != ".parquet":
            copy = old / path.relative_to(run.tokens_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    for path in old.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["files"] = {n: facts for n, facts in manifest["files"].items() if not n.endswith(".parquet")}
        path.write_text(json.dumps(manifest))
    sources, reader = open_sources(old), MixtureReader(run)
    window = reader.plan.window(0, 0)
    assert len(sources[window.source][window.bucket].read(window.start_token, window.length)) == window.length
    for ask in (lambda: documents_of(reader.plan, sources, 0), lambda: find_document(sources, "web-1")):
        with pytest.raises(ArtifactError, match=r"shard-00000\.parquet is missing.* `danube tokenize`"):
            ask()


def test_a_least_quality_for_a_source_without_scores_is_one_clear_error(run: RunConfig) -> None:
    stage = StageConfig(
        name="c", tokens=640, sequence_length=16, micro_batch_size=1, shares={"wiki": 1}, min_quality={"wiki": 0.5}
    )
    unscored = RunConfig(name="p", model=MODEL, stages=(stage,), global_batch_tokens=320, tokens_dir=run.tokens_dir)
    with pytest.raises(
        ConfigError, match=r"min_quality of source 'wiki' of stage 'c' is 0\.5.*curate it with a quality model"
    ):
        MixtureReader(unscored)
