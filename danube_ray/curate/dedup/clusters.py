"""Which documents repeat another one: those linked by a shared key, and the choice among linked ones.

Every document that is dropped names one that is kept, and resembles it by itself: a chain of documents that each
resemble only the next one is no cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WORD_BITS = 64
AT_ONCE = 2**20


def star_pairs(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """(P, 2) int64 pairs (document, least document with the same key), by key and document.

    keys (N,) uint64, documents (N,) int64. A bucket of any size gives one pair for each of its documents but the least.
    """
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    least = documents[first][np.cumsum(first) - 1]
    others = documents != least  # a document can hold a key twice: it is no pair with itself
    return np.stack([documents[others], least[others]], axis=1)


def forest(num_documents: int, found: Iterable[np.ndarray]) -> np.ndarray:
    """(P, 2) int64, sorted: each document that pairs (any, 2) link to an earlier one, and the least it is linked to.

    Takes 4 bytes a document (8 above 2^32) beside its result, however many pairs there are.
    """
    parents = np.arange(num_documents, dtype=np.uint32 if num_documents <= 2**32 else np.int64)
    for pairs in found:
        for start in range(0, len(pairs), AT_ONCE):
            _link(parents, *pairs[start : start + AT_ONCE].T)
    linked = [np.empty((0, 2), np.int64)]
    for start in range(0, num_documents, AT_ONCE):
        documents = np.arange(start, min(start + AT_ONCE, num_documents))
        least = _roots(parents, documents)
        later = least < documents
        linked.append(np.stack([documents[later], least[later]], axis=1))
    return np.concatenate(linked)


def _link(parents: np.ndarray, ones: np.ndarray, others: np.ndarray) -> None:
    """Put documents (P,) and (P,) under one root each. A parent is never greater, so a root is the least of all."""
    while len(ones):
        ones, others = _roots(parents, ones), _roots(parents, others)
        ones, others = np.minimum(ones, others), np.maximum(ones, others)
        apart = ones != others
        ones, others = ones[apart], others[apart]
        np.minimum.at(parents, others, ones.astype(parents.dtype))  # a root under several goes on with the least


def _roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    roots = parents[documents]
    while (higher := parents[roots] != roots).any():
        roots[higher] = parents[roots[higher]]
    parents[documents] = roots  # which makes the next way short
    return roots.astype(np.int64)


def members(pairs: np.ndarray) -> np.ndarray:
    """(K, 2) int64, sorted: every document in a component of a `forest`, and the least document there."""
    least = np.unique(pairs[:, 1])
    both = np.concatenate([pairs, np.stack([least, least], axis=1)])
    return both[np.argsort(both[:, 0])]


def by_preference(qualities: np.ndarray, priorities: np.ndarray, ids: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The order in which N documents are preferred, (N,) int64: best quality, least source priority, id and number.

    A quality of NaN (unscored) comes last.
    """
    return np.lexsort((documents, ids, priorities, np.where(np.isnan(qualities), np.inf, -qualities)))


@dataclass(frozen=True, eq=False)
class Choice:
    """For each of N documents which one is kept in its place (N,), its own index where it is kept itself."""

    kept: np.ndarray  # int64
    similarity: np.ndarray  # float64, to the one that is kept
    exact: np.ndarray  # bool, whether the texts are equal


def choose(fingerprints: Sequence[bytes], shingles: Sequence[np.ndarray], min_jaccard: float) -> Choice:
    """Choose what is kept of N documents, the preferred ones first: one that resembles none that is kept already.

    Of equal fingerprints only one needs its `shingles` (sorted, distinct); the others may leave them empty. A document
    is dropped for the first kept one of an equal text, or of a similarity of at least `min_jaccard`.
    """
    first: dict[bytes, int] = {}
    text_of = np.array([first.setdefault(value, len(first)) for value in fingerprints], np.int64)
    leaders, texts = np.unique(text_of, return_index=True)[1], [np.empty(0, np.uint64)] * len(first)
    for text, found in zip(text_of, shingles, strict=True):
        if len(found):
            texts[text] = found
    kept_text, similarity = _near(texts, min_jaccard)
    exact = kept_text[text_of] == text_of
    return Choice(leaders[kept_text[text_of]], similarity[text_of], exact)


def _near(texts: list[np.ndarray], min_jaccard: float) -> tuple[np.ndarray, np.ndarray]:
    """The kept text in place of each of M different ones, in order of preference, and its similarity: (M,) both.

    Each kept text is compared with the later ones that nothing stands for yet, all at once: of shingles that more than
    a 64th of the texts have, a text is a row of bits; of rarer ones, there are lists of the texts that have them. So
    M copies take one look, and M texts of which none is dropped M^2 / 2 times about shingles / 64 steps: 2 s for
    5,000 pages of one template on one core, and 100 times that for ten times as many.
    """
    sizes = np.array([len(text) for text in texts], np.int64)
    owners = np.repeat(np.arange(len(texts)), sizes)
    _, ids, times = np.unique(np.concatenate([*texts, np.empty(0, np.uint64)]), return_inverse=True, return_counts=True)
    frequent = times * WORD_BITS > len(texts)
    bits = _rows_of_bits(owners, ids, frequent, len(texts))
    rare = ~frequent[ids]
    owners, ids = owners[rare], ids[rare]
    starts = np.searchsorted(owners, np.arange(len(texts) + 1))
    holders = owners[np.argsort(ids, kind="stable")]
    holder_starts = np.concatenate([[0], np.cumsum(np.where(frequent, 0, times))])

    kept, similarity, is_open = np.arange(len(texts)), np.ones(len(texts)), sizes > 0
    for leader in range(len(texts)):
        if not is_open[leader]:
            continue
        is_open[leader] = False
        fits = (sizes >= min_jaccard * sizes[leader]) & (min_jaccard * sizes <= sizes[leader])
        others = np.flatnonzero(is_open & fits)
        if not len(others):
            continue
        common = np.bitwise_count(bits[others] & bits[leader]).sum(axis=1, dtype=np.int64)
        mine = ids[starts[leader] : starts[leader + 1]]
        sharing = holders[_ranges(holder_starts[mine], holder_starts[mine + 1])]
        common += np.bincount(sharing, minlength=len(texts))[others]
        found = common / (sizes[leader] + sizes[others] - common)
        alike = found >= min_jaccard
        kept[others[alike]], similarity[others[alike]] = leader, found[alike]
        is_open[others[alike]] = False
    return kept, similarity


def _rows_of_bits(owners: np.ndarray, ids: np.ndarray, frequent: np.ndarray, num_texts: int) -> np.ndarray:
    """(M, frequent shingles / 64) uint64: which of the frequent shingles each text has."""
    place = np.cumsum(frequent) - 1
    words, bit = np.divmod(place[ids[frequent[ids]]], WORD_BITS)
    bits = np.zeros((num_texts, -(-int(frequent.sum()) // WORD_BITS)), np.uint64)
    np.bitwise_or.at(bits, (owners[frequent[ids]], words), np.uint64(1) << bit.astype(np.uint64))
    return bits


def _ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, ... end - 1 of each of several ranges, one range after the other."""
    totals = np.cumsum(ends - starts)
    return np.arange(totals[-1] if len(totals) else 0) + np.repeat(ends - totals, ends - starts)
