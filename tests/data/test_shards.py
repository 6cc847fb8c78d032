"""Shards hold what was written, know when they are torn, and read across their borders."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from danube_ray.artifacts import ArtifactError
from danube_ray.config import ConfigError
from danube_ray.data.shards import (
    ShardWriter,
    TokenStore,
    commit_store,
    held_out_tokens,
    lowest_quality,
    open_sources,
    open_validation,
    quality_bucket,
    token_dtype,
    write_tokens,
)


def make_store(folder: Path, shards: list[list[list[int]]], vocab_size: int = 100) -> TokenStore:
    dtype, written = token_dtype(vocab_size), []
    for index, documents in enumerate(shards):
        writer = ShardWriter(folder, 3 * index, dtype)  # numbers may have gaps: a split without such documents
        for ids in documents:
            writer.add(np.array(ids))
        written.append(writer.finish())
    commit_store(folder, written, dtype, "hash")
    return TokenStore(folder)


def test_every_range_reads_as_one_array_across_shards(tmp_path: Path) -> None:
    store = make_store(tmp_path, [[[1, 2, 3], [4]], [[5, 6]], [[7, 8, 9, 10], [11, 12]]])
    whole = np.arange(1, 13)
    for start in range(13):
        for count in range(13 - start):
            assert store.read(start, count).tolist() == whole[start : start + count].tolist()
    assert store.document_ends().tolist() == [3, 4, 6, 10, 12]
    assert (store.num_tokens, store.num_documents, store.dtype) == (12, 5, np.dtype("<u2"))
    for start, count in ((-1, 2), (12, 1), (0, 13)):
        with pytest.raises(IndexError):
            store.read(start, count)


def test_a_wide_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    assert token_dtype(65_536) == np.dtype("<u2")
    store = make_store(tmp_path, [[[65_536, 99_999]]], vocab_size=100_000)
    assert store.dtype == np.dtype("<u4")
    assert store.read(0, 2).tolist() == [65_536, 99_999]


def test_a_torn_or_missing_shard_is_an_error_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    store = make_store(tmp_path, [[[1, 2, 3]], [[4, 5]]])
    assert store.damage() is None
    first, second = tmp_path / "shard-00000.bin", tmp_path / "shard-00003.bin"
    first.write_bytes(np.array([1, 9, 3], "<u2").tobytes())
    assert "shard-00000.bin" in (store.damage() or "")
    second.write_bytes(second.read_bytes()[:2])
    with pytest.raises(ArtifactError, match=r"shard-00003\.bin"):
        TokenStore(tmp_path)
    second.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00003\.bin"):
        TokenStore(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="not finished"):
        TokenStore(tmp_path)


def test_an_unfinished_shard_leaves_no_final_name_and_is_cleaned_up(tmp_path: Path) -> None:
    ShardWriter(tmp_path, 0, np.dtype("<u2")).add([1, 2])
    assert not list(tmp_path.glob("shard-*"))
    store = make_store(tmp_path, [[[3]]])
    assert store.read(0, 1).tolist() == [3]
    made = ["manifest.json", "shard-00000.bin", "shard-00000.idx", "shard-00000.parquet"]
    assert sorted(p.name for p in tmp_path.iterdir()) == made


def test_a_tokens_folder_opens_by_source_and_bucket(tmp_path: Path) -> None:
    manifest = write_tokens(
        tmp_path, {"web": {"q0": [[1, 2]], "q3": [[3]]}, "wiki": {"unscored": [[4]]}}, {"web": [[5]]}, 9
    )
    sources = open_sources(tmp_path)
    assert {s: list(b) for s, b in sources.items()} == {"web": ["q0", "q3"], "wiki": ["unscored"]}
    assert sources["web"]["q3"].read(0, 1).tolist() == [3]
    assert list(open_validation(tmp_path)) == ["web"]
    assert manifest["counts"]["web"]["q0"] == {"documents": 1, "tokens": 2}
    with pytest.raises(ConfigError, match="danube tokenize"):
        open_sources(tmp_path / "absent")


def test_a_pickled_store_is_small_and_reads_the_same(tmp_path: Path) -> None:
    store = make_store(tmp_path, [[list(range(100)) * 500]])
    store.read(0, 10)
    data = pickle.dumps(store)
    assert len(data) < 2_000
    assert pickle.loads(data).read(7, 5).tolist() == [7, 8, 9, 10, 11]


def test_held_out_tokens_come_from_every_source_alike(tmp_path: Path) -> None:
    held_out = {"web": [range(100), range(100, 150)], "wiki": [range(1_000, 1_030)]}
    write_tokens(tmp_path, {source: {"q0": [[1]]} for source in held_out}, held_out, 32_000)
    assert held_out_tokens(tmp_path).tolist() == [*range(150), *range(1_000, 1_030)]
    assert held_out_tokens(tmp_path, at_most=50).tolist() == [*range(25), *range(1_000, 1_025)]
    assert held_out_tokens(tmp_path, at_most=120).tolist() == [*range(60), *range(1_000, 1_030)]


def test_quality_quarters_cover_the_scale() -> None:
    qualities = [None, 0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1.0]
    assert [quality_bucket(q) for q in qualities] == ["unscored", "q0", "q0", "q1", "q2", "q2", "q3", "q3"]
    assert [lowest_quality(b) for b in ("unscored", "q0", "q3")] == [None, 0.0, 0.75]
    with pytest.raises(ValueError, match="between 0 and 1"):
        quality_bucket(1.01)
