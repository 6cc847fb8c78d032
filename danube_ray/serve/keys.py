"""API keys: who may call, known by the hash of what they send.

A file of keys, and the environment's `DANUBE_API_KEYS`, which holds the same lines with newlines or commas between:

    # name  sha256 of the key  limits of its own, where the gate's are not meant
    alice   5e1f...64 hex digits
    nightly 90ab...64 hex digits  requests_per_minute=600 concurrent_requests=16

Neither takes a key itself: files and environments end in backups, process lists and bug reports. `danube keys` makes
both halves.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from danube_ray.config import require, require_positive
from danube_ray.config.check import valid_name

logger = logging.getLogger(__name__)

ENVIRONMENT = "DANUBE_API_KEYS"
PREFIX = "sk-danube-"  # tells people and secret scanners what they have found
LIMITS = ("requests_per_minute", "concurrent_requests")
LOOK_S = 1.0  # how often the file is looked at


@dataclass(frozen=True, kw_only=True)
class Key:
    """A caller. A limit of None is the gate's.

    sha256: 64 hex digits. One round of a fast hash is right here: a slow one protects passwords, which can be guessed.
        A key has 256 random bits; whoever holds its hash can guess for ever, and every request would pay for slowness.
    """

    name: str
    sha256: str
    requests_per_minute: int | None = None
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, *(limit for limit in LIMITS if getattr(self, limit) is not None))

    @property
    def line(self) -> str:
        limits = [f"{limit}={value}" for limit in LIMITS if (value := getattr(self, limit)) is not None]
        return " ".join([self.name, self.sha256, *limits])


def make_key(
    name: str, *, requests_per_minute: int | None = None, concurrent_requests: int | None = None
) -> tuple[str, Key]:
    """A new key, which nothing keeps, and what is kept of it."""
    require(valid_name(name), "name", name, "letters, digits, '.', '_' and '-'")
    secret = PREFIX + secrets.token_urlsafe(32)
    hashed = hashlib.sha256(secret.encode()).hexdigest()
    limits = {"requests_per_minute": requests_per_minute, "concurrent_requests": concurrent_requests}
    return secret, Key(name=name, sha256=hashed, **limits)


def append(file: Path, key: Key) -> None:
    """Add a key to a file, which is made for its owner alone. `ConfigError` for a name that is in it."""
    text = file.read_text() if file.exists() else ""
    _check_distinct([*parse(text, str(file)), key])
    line = f"{key.line}\n" if text.endswith("\n") or not text else f"\n{key.line}\n"
    file.touch(0o600)
    with file.open("a") as end:
        end.write(line)


def parse(text: str, origin: str) -> list[Key]:
    """The keys of a file or of the environment. `ConfigError` names the line, and never quotes it: the commonest
    mistake is a key in the place of its hash."""
    keys = []
    for number, line in enumerate(text.split("\n"), 1):
        if fields := line.partition("#")[0].split():
            keys.append(_parse_fields(fields, f"{origin}, line {number}"))
    _check_distinct(keys)
    return keys


def _parse_fields(fields: list[str], place: str) -> Key:
    allowed = "NAME HASH [requests_per_minute=N] [concurrent_requests=N]"
    limits = {}
    for field in fields[2:]:
        name, _, value = field.partition("=")
        whole = name in LIMITS and name not in limits and value.isascii() and value.isdigit() and int(value) > 0
        require(whole, "API keys", place, allowed, "a limit is a name once, '=' and a whole number above 0")
        limits[name] = int(value)
    require(valid_name(fields[0]), "API keys", place, allowed, "a name is letters, digits, '.', '_' and '-'")
    hashed = len(fields) > 1 and re.fullmatch("[0-9a-f]{64}", fields[1])
    remedy = "a hash is 64 hex digits, the key's SHA-256, not the key itself: `danube keys NAME` makes both"
    require(bool(hashed), "API keys", place, allowed, remedy)
    return Key(name=fields[0], sha256=fields[1], **limits)


def _check_distinct(keys: Iterable[Key]) -> None:
    seen: set[str] = set()
    for key in keys:
        require(seen.isdisjoint((key.name, key.sha256)), "API keys", key.name, "each name and each key once")
        seen |= {key.name, key.sha256}


class Keys:
    """The keys that open the gate. The file is read again when it changes: a key made or taken away counts a second
    later. A new file that can't be read leaves the old keys as they are, and an error in the log.

    `ConfigError` when the file or the environment can't be read, or has been given and holds no key.
    """

    def __init__(self, file: Path | None, environment: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self.required = file is not None or environment is not None
        lines = re.sub("#.*", "", environment or "").replace(",", "\n")  # a comment may have a comma of its own
        self._from_environment = parse(lines, ENVIRONMENT)
        made = "make one with `danube keys NAME`"
        require(environment is None or bool(self._from_environment), ENVIRONMENT, environment, "keys, or unset", made)
        require(file is None or file.is_file(), "keys_file", str(file), "an existing file", f"{made} --file {file}")
        self._seen, self._look_at = self._stamp(), clock() + LOOK_S
        self._keys = self._read()
        require(not self.required or bool(self._keys), "keys_file", str(file), "a file with keys", made)

    def find(self, secret: bytes) -> Key | None:
        """Whose key `secret` is. Takes as long for any wrong one: every hash is compared, to its end."""
        self._refresh()
        hashed, found = hashlib.sha256(secret).hexdigest(), None
        for key in self._keys:
            if hmac.compare_digest(hashed, key.sha256):
                found = key
        return found

    def _refresh(self) -> None:
        if self._file is None or (now := self._clock()) < self._look_at:
            return
        self._look_at = now + LOOK_S
        if (stamp := self._stamp()) == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = self._read()
        except (OSError, ValueError) as error:  # ConfigError and broken UTF-8 are ValueErrors
            logger.error("the API keys stay as they were, their new file can't be read: %s", error)

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes when the file does; None when it is gone."""
        try:
            status = self._file.stat() if self._file else None
        except OSError:
            return None
        return status and (status.st_mtime_ns, status.st_size, status.st_ino)

    def _read(self) -> list[Key]:
        from_file = parse(self._file.read_text(), str(self._file)) if self._file else []
        keys = [*from_file, *self._from_environment]
        _check_distinct(keys)
        return keys
