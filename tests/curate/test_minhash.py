"""MinHash: stable signatures that estimate Jaccard, bands that find near-duplicates and pass by what is different."""

from __future__ import annotations

import random

import numpy as np
import pytest

from danube_ray.curate.dedup import BANDS, band_keys, jaccard, minhash, shingles, signature
from danube_ray.curate.words import ngram_hashes, tokenize
from tests.curate.near_copies import prose, with_replaced_words

TEXT = "The river rises in the Black Forest, and ends after 2,857 km in the Black Sea."


def keys_of(text: str) -> np.ndarray:
    keys = band_keys(tokenize(text))
    assert keys is not None
    return keys


def test_keys_are_the_same_on_every_machine_and_whatever_the_case_and_symbols():
    keys = keys_of(TEXT)
    assert (keys.dtype, keys.shape) == (np.uint64, (BANDS,))
    assert [hex(key) for key in keys[:2].tolist()] == ["0x238ce9438b26dc9a", "0xfd506ca92c5b30b1"]
    assert keys_of("«" + TEXT.upper().replace(",", " ;") + "»").tolist() == keys.tolist()
    assert len(set(keys.tolist())) == BANDS


def test_a_signature_is_the_least_value_of_each_permutation():
    grams = (ngram_hashes(tokenize(TEXT).hashes, 5) >> np.uint64(32)).astype(np.uint32).tolist()
    found = signature(tokenize(TEXT))
    assert found is not None
    for value, multiplier, offset in zip(found, minhash._MULTIPLIERS.ravel(), minhash._OFFSETS.ravel(), strict=True):
        assert multiplier % 2 == 1
        assert value == min((int(multiplier) * gram + int(offset)) % 2**32 for gram in grams)


def test_a_long_text_is_taken_in_chunks(monkeypatch):
    words = tokenize(prose(random.Random(0), 5_000))
    whole = signature(words)
    monkeypatch.setattr(minhash, "CHUNK_SHINGLES", 7)
    assert np.array_equal(signature(words), whole)


@pytest.mark.parametrize("text", ["", "!", "only four words here"])
def test_a_text_without_a_shingle_has_no_keys(text):
    words = tokenize(text)
    assert band_keys(words) is None
    assert shingles(words).tolist() == []
    assert jaccard(shingles(words), shingles(words)) == 0


def test_five_words_are_enough():
    assert len(keys_of("only five words are here")) == BANDS


def test_shingles_are_sets_of_five_words():
    found = shingles(tokenize("a b c d e a b c d e"))
    assert len(found) == 5
    assert np.array_equal(found, np.unique(found))
    assert jaccard(found, shingles(tokenize("a b c d e f"))) == 1 / 6
    assert jaccard(found, found) == 1


def test_the_share_of_equal_hashes_estimates_the_similarity():
    rng = random.Random(1)
    errors, probabilities, shared = [], [], []
    for _ in range(300):
        text = prose(rng, 400)
        words = tokenize(text), tokenize(with_replaced_words(rng, text, rng.randrange(1, 40)))
        true = jaccard(*map(shingles, words))
        a, b = (signature(one) for one in words)
        assert a is not None and b is not None
        errors.append(float((a == b).mean()) - true)
        probabilities.append(1 - (1 - true**8) ** BANDS)
        shared.append(bool(set(band_keys(words[0]).tolist()) & set(band_keys(words[1]).tolist())))
    assert abs(np.mean(errors)) < 0.01  # the standard error is 0.045 / sqrt(300) = 0.003
    assert np.std(errors) < 0.06
    assert abs(np.mean(shared) - np.mean(probabilities)) < 0.06


def test_unlike_texts_share_no_band():
    rng = random.Random(2)
    keys = np.concatenate([keys_of(prose(rng, 100)) for _ in range(500)])
    assert len(np.unique(keys)) == len(keys)
