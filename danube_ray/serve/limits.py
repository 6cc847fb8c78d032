"""How many requests a minute one caller may make."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MINUTE_S = 60.0
MAX_CALLERS = 65_536  # remembered at most: about 10 MB, however many addresses somebody calls from
SLACK = 1e-3  # of a request: sixty times a sixtieth is not quite one, least of all on a clock that has run for months


@dataclass(frozen=True)
class Allowance:
    """What a caller has left. `retry_after_s` is 0 for a request that may pass, else whole seconds until one may."""

    limit: int
    remaining: int
    reset_s: float  # until all of it is there again
    retry_after_s: int

    @property
    def headers(self) -> dict[str, str]:
        """As OpenAI spells them; the duration is one that Go would parse, like theirs."""
        told = {"limit": self.limit, "remaining": self.remaining, "reset": f"{self.reset_s:.3f}s"}
        return {f"x-ratelimit-{name}-requests": str(value) for name, value in told.items()}


class RateLimit:
    """A token bucket for each caller, as large as what a minute fills: after a pause a minute's requests may come at
    once, then they come evenly.

    All that a bucket needs is the time at which it will be full (the generic cell rate algorithm). A full one is
    as good as none, so callers who have been silent for a minute take no memory.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()  # in the order of their last request

    def take(self, caller: str, per_minute: int) -> Allowance:
        """Take one request out of the caller's bucket, if it holds one."""
        now, spacing_s = self._clock(), MINUTE_S / per_minute
        full_at = max(now, self._full_at.pop(caller, now))
        tokens = per_minute - (full_at - now) / spacing_s + SLACK
        passes = tokens >= 1
        if passes:
            full_at, tokens = full_at + spacing_s, tokens - 1
        self._full_at[caller] = full_at
        self._forget(now)
        wait_s = 0 if passes else math.ceil((1 - tokens) * spacing_s)
        return Allowance(per_minute, math.floor(tokens), full_at - now, wait_s)

    def _forget(self, now: float) -> None:
        """Drop full buckets, and the caller silent for longest where there are too many."""
        while self._full_at[oldest := next(iter(self._full_at))] <= now or len(self._full_at) > MAX_CALLERS:
            del self._full_at[oldest]

    def __len__(self) -> int:
        return len(self._full_at)
