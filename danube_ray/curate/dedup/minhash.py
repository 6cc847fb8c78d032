"""MinHash over word 5-grams, in 14 bands of 8 hashes: documents that share a band may be near-duplicates.

Two documents of similarity s share a band with probability 1 - (1 - s^8)^14: 0.35 at 0.65, 0.77 at 0.75, 0.92 at 0.8,
0.99 at 0.85 (the figures of FineWeb). What shares one is then compared shingle by shingle.
"""

from __future__ import annotations

import hashlib

import numpy as np

from danube_ray.curate.words import MULTIPLIER, Words, ngram_hashes

BANDS, HASHES_PER_BAND, SHINGLE_WORDS = 14, 8, 5
CHUNK_SHINGLES = 2048  # 112 hashes of as many stay in a core's cache, and a long document takes no more memory

# A permutation of 32 bits is an odd multiplier and an offset, both drawn once and for all machines.
_DRAWN = np.frombuffer(hashlib.shake_128(b"danube_ray").digest(2 * 4 * BANDS * HASHES_PER_BAND), "<u4").reshape(2, -1)
_MULTIPLIERS = (_DRAWN[0] | 1).astype(np.uint32)[:, None]
_OFFSETS = _DRAWN[1].astype(np.uint32)[:, None]


def signature(words: Words) -> np.ndarray | None:
    """The least value of each of 112 permutations over the text's shingles, (112,) uint32; None under 5 words.

    The permuted value is the upper half of a shingle's 64-bit hash. 32 bits do: that two texts which share nothing
    agree in a whole band has odds of about (shingles / 2^32)^8.
    """
    high = (ngram_hashes(words.hashes, SHINGLE_WORDS) >> np.uint64(32)).astype(np.uint32)
    if not len(high):
        return None
    least = np.full(len(_MULTIPLIERS), np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(high), CHUNK_SHINGLES):
        permuted = _MULTIPLIERS * high[start : start + CHUNK_SHINGLES]
        permuted += _OFFSETS
        np.minimum(least, permuted.min(axis=1), out=least)
    return least


def band_keys(words: Words) -> np.ndarray | None:
    """(14,) uint64: equal keys mean an equal band, the same one in both; None for a text of fewer than 5 words."""
    least = signature(words)
    if least is None:
        return None
    keys = np.arange(1, BANDS + 1, dtype=np.uint64)
    for column in least.reshape(BANDS, HASHES_PER_BAND).T.astype(np.uint64):
        keys = (keys ^ column) * MULTIPLIER
        keys ^= keys >> np.uint64(29)
    return keys


def shingles(words: Words) -> np.ndarray:
    """(S,) uint64, the distinct 5-grams of a text's words, sorted; empty under 5 words."""
    return np.unique(ngram_hashes(words.hashes, SHINGLE_WORDS))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The share of two texts' `shingles` that is common to both; 0 where there are none."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)
