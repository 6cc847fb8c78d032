"""A keyed shuffle of 0..size-1 in constant memory: where row i goes is computed, never stored."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from math import isqrt

# Luby and Rackoff (1988) need four Feistel rounds of a random function; six cover a cheap mixer's weaknesses.
ROUNDS = 6
MASK = 2**64 - 1
ODD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: multiplying by it spreads every bit upwards


class Permutation:
    """A bijection of 0..size-1, drawn by a key of `ROUNDS` 64-bit numbers.

    A Feistel network over a grid of about sqrt(size) x sqrt(size): each round shifts one coordinate by a keyed hash of
    the other, which can always be undone. The grid exceeds `size` by less than one side; an index that lands there
    walks on until it is back inside, so the map stays a bijection and walks more than once with chance 1/sqrt(size).
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, not {size}")
        self.size = size
        self.key = key
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)

    def __call__(self, index: int) -> int:
        """Where `index` goes, both in 0..size-1."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside a permutation of {self.size}")
        while True:
            moving, still = divmod(index, self._columns)
            modulus, other = self._rows, self._columns
            for key in self.key:
                mixed = (still + key) * ODD & MASK
                mixed = (mixed ^ mixed >> 32) * ODD & MASK
                moving, still = still, (moving + (mixed >> 32)) % modulus
                modulus, other = other, modulus
            index = moving * self._columns + still  # after an even number of rounds both stand where they began
            if index < self.size:
                return index

    def inverse(self, index: int) -> int:
        """What goes to `index`: the rounds undone from the last to the first."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside a permutation of {self.size}")
        while True:
            moving, still = divmod(index, self._columns)
            modulus, other = self._columns, self._rows
            for key in reversed(self.key):
                mixed = (moving + key) * ODD & MASK
                mixed = (mixed ^ mixed >> 32) * ODD & MASK
                moving, still = (still - (mixed >> 32)) % modulus, moving
                modulus, other = other, modulus
            index = moving * self._columns + still
            if index < self.size:
                return index


@lru_cache(maxsize=1024)
def permutation(size: int, *names: str | int) -> Permutation:
    """The permutation that belongs to `names` (a seed, a source, an epoch, ...): the same in every process."""
    digest = blake2b("\0".join(map(str, names)).encode(), digest_size=8 * ROUNDS).digest()
    return Permutation(size, tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)))
