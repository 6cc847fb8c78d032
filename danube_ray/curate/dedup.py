"""Exact duplicates: the same text up to case, spacing and Unicode form, within and across sources."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np

FINGERPRINT_BYTES = 16


def fingerprint(text: str) -> bytes:
    """128 bits of a text's normal form (NFC, case folded, runs of white space as one space); equal ones are duplicates.

    BLAKE2b is stable over processes and machines; at 10 billion documents two different texts meet with odds of 1e-19.
    """
    normal = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return hashlib.blake2b(normal.encode(), digest_size=FINGERPRINT_BYTES).digest()


def keepers(fingerprints: np.ndarray, priorities: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """For each of N documents the index of the one that is kept in its place: (N,) int64, its own where it is kept.

    Of equal fingerprints, the lowest priority number is kept, then the lowest id, then the first in order.
    fingerprints, ids: (N, 2) uint64, 16 bytes as two big-endian numbers; priorities: (N,) integers. Takes about 64
    bytes of memory a document.
    """
    order = np.lexsort((ids[:, 1], ids[:, 0], priorities, fingerprints[:, 1], fingerprints[:, 0]))  # last key first
    ordered = fingerprints[order]
    starts_group = np.ones(len(order), bool)
    starts_group[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    kept = np.empty(len(order), np.int64)
    kept[order] = order[starts_group][np.cumsum(starts_group) - 1]
    return kept


def as_numbers(values: Iterable[bytes]) -> np.ndarray:
    """(N, 2) uint64 of N values of 16 bytes, in the same order of size."""
    return np.frombuffer(b"".join(values), ">u8").astype(np.uint64).reshape(-1, 2)


def as_bytes(numbers: np.ndarray) -> bytes:
    """The 16 bytes of one row of `as_numbers`."""
    return numbers.astype(">u8").tobytes()
