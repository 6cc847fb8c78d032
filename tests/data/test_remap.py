"""Rows follow their piece from one vocabulary to another."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from danube_ray.data.remap import remap_rows, spellings
from danube_ray.data.tokenizer import SPACE, Tokenizer


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


def test_a_new_piece_is_spelled_in_old_ones(shared_data: Path) -> None:
    old, new = (Tokenizer.load(shared_data / "tokenizers" / f"{n}_tokenizer.model") for n in ("llama2", "mistral_v1"))
    missing = [new.pieces[index] for index in np.flatnonzero(remap_rows(old, new) < 0)]
    spelled = spellings(old, missing)
    assert len(spelled) == 7_816 and all(spelled)
    for piece, ids in zip(missing, spelled, strict=True):
        pieces = [old.pieces[index] for index in ids]
        text = b"".join(bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.encode() for p in pieces)
        assert text.decode() == piece.replace(" ", SPACE)
    by_piece = dict(zip(missing, spelled, strict=True))
    assert [old.pieces[index] for index in by_piece["\u2581themes"]] == ["\u2581them", "es"]


def test_a_shared_piece_is_spelled_by_itself(trained: Tokenizer) -> None:
    """Where a vocabulary is its own old one, every ordinary piece is one piece."""
    ordinary = [index for index, piece in enumerate(trained.pieces) if index > 2 and not piece.startswith("<0x")]
    assert spellings(trained, [trained.pieces[index] for index in ordinary]) == [[index] for index in ordinary]
