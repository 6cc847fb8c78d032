"""Lists that block documents: of hosts and addresses, and of words, in files of an entry a line.

`#` at a line's start or after a space begins a comment; blank lines are left out; a file that ends in .gz is unpacked.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Self
from urllib.parse import SplitResult, urlsplit

import numpy as np
import xxhash

from danube_ray.config import require
from danube_ray.curate.words import WORD, Words

COMMENT = re.compile(r"(?:^|\s)#.*")
PLAIN_HOST = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)+")
WEB_SCHEMES = frozenset({"http", "https", "ftp", ""})
URLS, WORDS = "CurationConfig.blocked_urls", "CurationConfig.blocked_words"
MAX_HOST_CHARS = 253  # of DNS
MAX_PATH_DEPTH = 64
# Between the words of a phrase.
GAP = r"[\s-]+"


def read_entries(paths: Sequence[Path], setting: str) -> Iterator[str]:
    """The entries of all files; `ConfigError` names the `setting` where a file is missing or holds none."""
    for path in paths:
        require(path.is_file(), setting, str(path), "a file of an entry a line")
        number = 0
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                if entry := COMMENT.sub("", line).strip():
                    number += 1
                    yield entry
        require(number > 0, setting, str(path), "a file with an entry", "leave out a list that blocks nothing")


@dataclass(frozen=True, eq=False)
class UrlList:
    """Hosts, which stand for their subdomains too (`example.com`, or `xxx` for a whole top-level domain), and
    addresses, which stand for all below them (`example.com/forum`).

    An entry takes 8 bytes of memory, its hash: with 5 million entries, one address in 10^11 is blocked
    by chance.
    Schemes, ports, user names, `www.` and capitals in hosts make no difference, and `ü` is the same as its `xn--` form.
    """

    hashes: np.ndarray  # (N,) uint64, in order

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Self:
        """`ConfigError` for missing and empty files, and for lines of several columns, as in a hosts file."""
        return cls(np.unique(_hashes(map(_normal, read_entries(paths, URLS)))))

    def blocks(self, url: str) -> bool:
        """Whether the list has this address, one above it, its host or a domain above. Places without a host
        (`data/file.jsonl#12`, `s3://bucket/file`) are never blocked.
        """
        if not (candidates := _candidates(url)):
            return False
        hashes = _hashes(candidates)
        places = np.searchsorted(self.hashes, hashes)
        return bool((self.hashes[np.minimum(places, len(self.hashes) - 1)] == hashes).any())


def _hashes(entries: Iterable[str]) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(entry.encode(errors="replace")) for entry in entries), np.uint64)


def _normal(entry: str) -> str:
    """An entry as `_candidates` writes addresses."""
    if PLAIN_HOST.fullmatch(entry):
        return entry.removeprefix("www.")
    require(len(entry.split()) == 1, URLS, entry, "one host or address a line")
    parts = _split(entry if "//" in entry else f"//{entry.removeprefix('*.')}")
    return (_host(parts) + _path(parts)).rstrip("/") if parts else entry


def _candidates(url: str) -> list[str]:
    """What a list may hold to block an address: its domains, and its host with each beginning of its path."""
    parts = _split(url)
    if parts is None or parts.scheme not in WEB_SCHEMES or not (host := _host(parts)):
        return []
    if len(host) > MAX_HOST_CHARS:
        return []
    domains = [host]
    while "." in domains[-1]:
        domains.append(domains[-1].partition(".")[2])
    path = parts.path.rstrip("/")
    above = [host + path[: slash.start()] for slash in islice(re.finditer("/", path), 1, MAX_PATH_DEPTH)]
    return [*domains, *above, host + path, (host + _path(parts)).rstrip("/")]


def _split(url: str) -> SplitResult | None:
    try:
        return urlsplit(url)
    except ValueError:  # not an address, such as http://[
        return None


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").rstrip(".").removeprefix("www.")
    if host.isascii() or len(host) > MAX_HOST_CHARS:  # longer ones are none, and take long to encode
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def _path(parts: SplitResult) -> str:
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


@dataclass(frozen=True, eq=False)
class Phrase:
    text: str
    words: frozenset[str]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w){GAP.join(map(re.escape, self.text.split()))}(?!\w)")


@dataclass(frozen=True, eq=False)
class WordList:
    """Words and phrases, found whatever their case and only as whole words: for languages that part words by spaces."""

    words: frozenset[str]
    phrases: dict[str, tuple[Phrase, ...]]  # by their longest word

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Self:
        """`ConfigError` for missing and empty files."""
        words: set[str] = set()
        phrases: dict[str, dict[str, Phrase]] = {}
        for entry in read_entries(paths, WORDS):
            folded = " ".join(_fold(entry).split())
            if len(parts := WORD.findall(folded)) == 1:
                words.add(folded)
            else:
                phrases.setdefault(max(parts, key=len), {})[folded] = Phrase(folded, frozenset(parts))
        return cls(frozenset(words), {word: tuple(phrases[word].values()) for word in phrases})

    def found(self, words: Words) -> list[str]:
        """The listed words and phrases that a text holds, in the alphabet's order.

        Looks at the text itself only where it has all words of a phrase.
        """
        distinct = set(_fold("\n".join(words.distinct)).split("\n"))
        distinct.update(*[word.split("'") for word in distinct if "'" in word])
        found = self.words & distinct
        if keys := self.phrases.keys() & distinct:
            likely = [phrase for key in keys for phrase in self.phrases[key] if phrase.words <= distinct]
            text = _fold(words.text) if likely else ""
            found |= {phrase.text for phrase in likely if phrase.pattern.search(text)}
        return sorted(found)


def _fold(text: str) -> str:
    return text.casefold().replace("\u2019", "'")
