"""Rows follow their piece from one vocabulary to another."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from danube_ray.data.remap import remap_rows
from danube_ray.data.tokenizer import Tokenizer


def test_llama_to_mistral_copies_the_published_number_of_rows(shared_data: Path) -> None:
    old, new = (Tokenizer.load(shared_data / "tokenizers" / f"{n}_tokenizer.model") for n in ("llama2", "mistral_v1"))
    rows = remap_rows(old, new)
    assert rows.shape == (32_000,)
    assert (rows >= 0).sum() == 24_184
    assert (rows == np.arange(32_000)).sum() == 270
    for index in np.flatnonzero(rows >= 0)[::97]:
        assert old.pieces[rows[index]] == new.pieces[index]
    assert not set(np.array(new.pieces)[rows < 0]) & set(old.pieces)


def test_a_vocabulary_maps_onto_itself(trained: Tokenizer) -> None:
    assert remap_rows(trained, trained).tolist() == list(range(trained.vocab_size))
