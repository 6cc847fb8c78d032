"""Duplicates: what counts as the same text, what keys link, and which document is kept of those that are linked."""

from __future__ import annotations

import hashlib
import random
from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from danube_ray.curate.dedup import by_preference, choose, clusters, fingerprint, forest, jaccard, members, star_pairs
from danube_ray.curate.duplicates import MEMBERS, decide


def test_case_spacing_and_unicode_form_make_no_difference_but_words_do():
    text = "Caf\u00e9 STRASSE\n\nopens at 8."
    assert fingerprint(text) == fingerprint("  cafe\u0301 stra\u00dfe opens\tat 8. ")
    assert fingerprint(text) != fingerprint("Caf\u00e9 Strasse opens at 9.")
    assert fingerprint("ab c") != fingerprint("a bc")


def test_a_fingerprint_is_blake2b_of_the_normal_form():
    assert fingerprint("Hello  World") == hashlib.blake2b(b"hello world", digest_size=16).digest()


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_a_bucket_is_a_star_around_its_least_document():
    keys = numbers(7, 2**64 - 1, 7, 3, 7, 2**64 - 1, 7)
    documents = np.array([5, 9, 2, 1, 8, 4, 5])
    assert star_pairs(keys, documents).tolist() == [[5, 2], [5, 2], [8, 2], [9, 4]]
    assert star_pairs(keys[:0], documents[:0]).shape == (0, 2)


def test_a_forest_links_documents_to_the_least_of_their_component():
    pairs = np.array([[10, 7], [30, 20], [7, 3], [40, 30], [3, 10], [5, 5]])
    expected = [[7, 3], [10, 3], [30, 20], [40, 20]]
    assert forest(50, [pairs]).tolist() == expected
    assert forest(50, [pairs[::-1, ::-1], pairs[:0], pairs[:3]]).tolist() == expected
    assert members(np.array(expected)).tolist() == [[3, 3], [7, 3], [10, 3], [20, 20], [30, 20], [40, 20]]
    assert forest(0, []).shape == members(forest(9, [])).shape == (0, 2)


@pytest.mark.parametrize("at_once", [7, 2**20])
def test_a_forest_is_that_of_scipy_however_the_pairs_come(monkeypatch, at_once):
    monkeypatch.setattr(clusters, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 1_000, (500, 2))
    _, labels = connected_components(coo_array((np.ones(500), tuple(pairs.T)), (1_000, 1_000)), directed=False)
    least = np.array([np.flatnonzero(labels == label)[0] for label in labels])
    [later] = np.nonzero(least < np.arange(1_000))
    found = forest(1_000, np.array_split(pairs, 40))
    assert found.tolist() == np.stack([later, least[later]], axis=1).tolist()


def test_links_in_a_row_are_one_component():
    row = np.stack([np.arange(1, 10_000), np.arange(9_999)], axis=1)
    assert forest(10_000, [row])[:, 1].tolist() == [0] * 9_999


def test_quality_comes_before_source_and_source_before_id():
    rows = [(0.5, 0, "a"), (0.9, 2, "b"), (0.9, 1, "d"), (0.9, 1, "c"), (np.nan, 0, "a"), (np.nan, 0, "A")]
    qualities, priorities, ids = (np.array(column) for column in zip(*rows, strict=True))
    assert by_preference(qualities, priorities, ids, np.arange(6)).tolist() == [3, 2, 1, 0, 5, 4]


def test_of_a_record_that_was_read_twice_the_first_is_kept_in_whatever_order_they_come():
    """The same address and text give the same id: then only the documents' numbers tell one from the other."""
    row = {"cluster": 0, "id": "a", "fingerprint": bytes(16), "quality": 0.5, "priority": 0}
    rows = [{**row, "document": number, "shingles": [] if number else [1, 2, 3]} for number in range(4)]
    for order in permutations(rows):
        verdicts = decide(pa.Table.from_pylist(list(order), MEMBERS), 0.75)
        assert sorted(verdicts["document"].to_pylist()) == [1, 2, 3]


def test_in_a_chain_the_end_that_resembles_no_kept_document_is_kept():
    a, b, c = (numbers(*range(start, start + 10)) for start in (0, 2, 4))
    assert (jaccard(a, b), jaccard(b, c), jaccard(a, c)) == (8 / 12, 8 / 12, 6 / 14)
    choice = choose([b"a", b"b", b"c"], [a, b, c], 0.6)
    assert choice.kept.tolist() == [0, 0, 2]
    assert choice.similarity.tolist() == [1, 8 / 12, 1]
    assert choose([b"b", b"a", b"c"], [b, a, c], 0.6).kept.tolist() == [0, 0, 0]


def test_a_copy_needs_no_shingles_and_goes_where_its_text_goes():
    a, b, none = numbers(*range(10)), numbers(*range(9)), numbers()
    choice = choose([b"a", b"b", b"a", b"b", b"c", b"c"], [none, b, a, none, none, none], 0.8)
    assert choice.kept.tolist() == [0, 0, 0, 0, 4, 4]
    assert choice.exact.tolist() == [True, False, True, False, True, True]
    assert choice.similarity.tolist() == [1, 0.9, 1, 0.9, 1, 1]


@pytest.mark.parametrize("min_jaccard", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("num_documents", [2, 12, 200])
def test_the_choice_is_that_of_comparing_each_with_every_kept_one(min_jaccard, num_documents):
    rng = np.random.default_rng(num_documents)
    template = rng.integers(0, 80, 40)
    prints, sets = [], []
    for _ in range(num_documents):
        changed = np.where(rng.random(40) < rng.random() * 0.6, rng.integers(0, 800, 40), template)
        sets.append(np.unique(changed[: rng.integers(0, 41)]).astype(np.uint64))
        prints.append(sets[-1].tobytes())
    choice = choose(prints, sets, min_jaccard)
    kept: list[int] = []
    for index, (print_, words) in enumerate(zip(prints, sets, strict=True)):
        likeness = {leader: jaccard(words, sets[leader]) for leader in kept}
        alike = [leader for leader in kept if prints[leader] == print_ or likeness[leader] >= min_jaccard]
        if not alike:
            kept.append(index)
        # An equal text that is kept goes before one that is only alike.
        leader = next((one for one in alike if prints[one] == print_), alike[0] if alike else index)
        assert choice.kept[index] == leader
        assert choice.exact[index] == (prints[leader] == print_)
        assert choice.similarity[index] == (1 if prints[leader] == print_ else likeness[leader])


def test_a_choice_among_thousands_of_pages_of_one_template():
    rng = random.Random(0)
    template = range(500)
    pages = [np.unique(numbers(*template, *(rng.randrange(10**6, 10**9) for _ in range(250)))) for _ in range(1_500)]
    pages += [np.unique(numbers(*page[:-9].tolist())) for page in pages]
    choice = choose([str(index).encode() for index in range(3_000)], pages, 0.75)
    assert choice.kept.tolist() == [*range(1_500), *range(1_500)]
