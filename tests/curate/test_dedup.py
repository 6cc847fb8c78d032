"""Exact duplicates: what counts as the same text, and which copy is kept."""

from __future__ import annotations

import hashlib
import random

import numpy as np

from danube_ray.curate.dedup import as_bytes, as_numbers, fingerprint, keepers


def test_case_spacing_and_unicode_form_make_no_difference_but_words_do():
    text = "Caf\u00e9 STRASSE\n\nopens at 8."
    assert fingerprint(text) == fingerprint("  cafe\u0301 stra\u00dfe opens\tat 8. ")
    assert fingerprint(text) != fingerprint("Caf\u00e9 Strasse opens at 9.")
    assert fingerprint("ab c") != fingerprint("a bc")


def test_a_fingerprint_is_blake2b_of_the_normal_form():
    assert fingerprint("Hello  World") == hashlib.blake2b(b"hello world", digest_size=16).digest()


def test_the_kept_copy_is_of_the_first_source_then_the_least_id_then_the_first():
    prints = as_numbers([b"A" * 16] * 4 + [b"B" * 16] * 2 + [b"C" * 16])
    ids = as_numbers([bytes([value] * 16) for value in (1, 9, 5, 5, 7, 7, 3)])
    priorities = np.array([1, 0, 0, 0, 1, 1, 2])
    assert keepers(prints, priorities, ids).tolist() == [2, 2, 2, 2, 4, 4, 6]


def test_the_choice_does_not_depend_on_the_order():
    rng = random.Random(0)
    documents = [(rng.randbytes(1) * 16, rng.randrange(3), rng.randbytes(16)) for _ in range(2_000)]
    kept_ids = []
    for _ in range(2):
        prints, priorities, ids = zip(*documents, strict=True)
        kept = keepers(as_numbers(prints), np.array(priorities), as_numbers(ids))
        expected = {p: min((q, i) for r, q, i in documents if r == p)[1] for p in set(prints)}
        assert [ids[index] for index in kept] == [expected[p] for p in prints]
        kept_ids.append({ids[index] for index in kept})
        rng.shuffle(documents)
    assert kept_ids[0] == kept_ids[1]


def test_no_documents_have_no_keepers():
    assert keepers(as_numbers([]), np.array([], int), as_numbers([])).tolist() == []


def test_numbers_give_their_bytes_back():
    values = [bytes(range(16)), b"\0" * 16]
    joined = np.concatenate([as_numbers(values[:1]), as_numbers(values[1:])])  # which makes its bytes native
    assert [as_bytes(row) for row in joined] == values
