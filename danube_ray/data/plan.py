"""The mixture plan: which window of which source stands in a slot of a step, as a pure function of the settings.

Each bucket of a source (its documents of one quality quarter) is cut into chunks of `chunk_tokens`, the longest
sequence of the run; a chunk's last label is the first token of the next. A keyed permutation per source, bucket and
epoch orders the chunks. A stage of shorter sequences splits each chunk into windows, and goes on in each bucket where
the stage before it stopped. So no token is trained twice before its epoch ends, whatever the stages; nothing but a
cursor per bucket and stage is stored, for 1M tokens as for 6T.

    step, slot -> n-th window of the stage            slots of a step are one row of numbers
      -> source and its ordinal                       a balanced period: within one window of the share, always
      -> bucket and its ordinal                       in proportion to the buckets' sizes
      -> position in the bucket's endless stream      cursor of the stage + ordinal * sequence length
      -> epoch, place in the epoch -> chunk           the keyed permutation
      -> window of the chunk
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

from danube_ray.artifacts import content_hash
from danube_ray.config import ConfigError, RunConfig, StageConfig, require
from danube_ray.data.permutation import permutation
from danube_ray.data.shards import UNSCORED, lowest_quality

VERSION = 1  # part of the hash: raise it when the same settings would give another order
MAX_PERIOD = 100_000  # slots in a period of shares, a few bytes each: percentages with three decimals


class Window(NamedTuple):
    """A window of `length` tokens (and one label after them) from `start_token` of a bucket."""

    source: str
    bucket: str
    chunk: int
    window_index: int
    start_token: int
    length: int
    epoch: int


class BalancedPeriod:
    """Deals slots to sources by integer weights, so that every prefix gives each source within one slot of its share.

    Tijdeman's chairman assignment (1980): the j-th slot of a source with weight w in a period P is released at
    floor((j-1) P / w) and due by ceil(j P / w). Sharing every slot in proportion meets all those dates, so whole slots
    can meet them too, and taking the released one that is due first does.
    """

    def __init__(self, weights: tuple[int, ...]) -> None:
        period = sum(weights)
        self.weights = weights
        self._owner = array("H", bytes(2 * period))
        self._rank = array("I", bytes(4 * period))
        released: list[tuple[int, int, int]] = []  # due, source, j
        waiting = [(0, source, 0) for source in range(len(weights))]  # release, source, j
        for slot in range(period):
            while waiting and waiting[0][0] <= slot:
                _, source, j = heapq.heappop(waiting)
                heapq.heappush(released, (-(-(j + 1) * period // weights[source]), source, j))
            _, source, j = heapq.heappop(released)
            self._owner[slot], self._rank[slot] = source, j
            if j + 1 < weights[source]:
                heapq.heappush(waiting, ((j + 1) * period // weights[source], source, j + 1))

    def at(self, slot: int) -> tuple[int, int]:
        """Index of the source that has `slot`, and how many slots it had before."""
        cycle, place = divmod(slot, len(self._owner))
        source = self._owner[place]
        return source, cycle * self.weights[source] + self._rank[place]

    def slot(self, source: int, ordinal: int) -> int:
        """The slot that `at` gives to the source's `ordinal`: between its release and its due date."""
        period, weight = len(self._owner), self.weights[source]
        cycle, j = divmod(ordinal, weight)
        open_places = range(j * period // weight, -(-(j + 1) * period // weight))
        return cycle * period + next(p for p in open_places if (self._owner[p], self._rank[p]) == (source, j))

    def counts(self, slots: int) -> list[int]:
        """How many of the first `slots` each source has."""
        cycle, place = divmod(slots, len(self._owner))
        rest = self._owner[:place]
        return [cycle * weight + rest.count(source) for source, weight in enumerate(self.weights)]


@lru_cache(maxsize=64)
def balanced_period(weights: tuple[int, ...]) -> BalancedPeriod:
    """The period of these weights, built once a process."""
    return BalancedPeriod(weights)


@dataclass(frozen=True)
class Lane:
    """A bucket of a source as one stage finds it: `cursor_tokens` is where in its endless stream the stage begins."""

    bucket: str
    num_chunks: int
    cursor_tokens: int


class Dealer:
    """Deals a source's windows to its lanes in proportion to their chunks, so that their epochs end together.

    Each lane in turn takes its exact share of what the lanes before it left, by rounding down: always within two or
    three windows of its share, with no table and for any sizes.
    """

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        chunks = [lane.num_chunks for lane in lanes]
        self._shares = [(chunks[i], sum(chunks[i:])) for i in range(len(lanes) - 1)]  # the last lane takes the rest

    def at(self, ordinal: int) -> tuple[Lane, int]:
        """The lane that has the source's window `ordinal`, and how many windows it had before."""
        for lane, (chunks, total) in zip(self.lanes, self._shares, strict=False):
            before = ordinal * chunks // total
            if (ordinal + 1) * chunks // total > before:
                return lane, before
            ordinal -= before
        return self.lanes[-1], ordinal

    def ordinal(self, lane: int, count: int, among: int) -> int:
        """Which of the source's first `among` windows `at` gives to the `lane`-th lane once that had `count` before."""
        return bisect_right(range(among + 1), count, key=lambda ordinals: self.counts(ordinals)[lane]) - 1

    def counts(self, ordinals: int) -> list[int]:
        """How many of the source's first `ordinals` windows each lane has."""
        counts = []
        for chunks, total in self._shares:
            counts.append(ordinals * chunks // total)
            ordinals -= counts[-1]
        return [*counts, ordinals]


@dataclass(frozen=True)
class Stage:
    """One stage of the plan, ready to look windows up in."""

    first_step: int
    sequence_length: int
    windows_per_step: int
    sources: tuple[str, ...]
    weights: tuple[int, ...]
    dealers: tuple[Dealer, ...]


class MixturePlan:
    """`(step, slot) -> Window` for a whole run, the same for any number of workers. Pickles small.

    `sizes[source][bucket]` are token counts. Raises `ConfigError` for a source that is unknown or too small, a quality
    that selects nothing, and shares whose period is too long; `check` also caps the epochs.
    """

    def __init__(self, run: RunConfig, sizes: Mapping[str, Mapping[str, int]]) -> None:
        self.chunk_tokens = run.longest_sequence
        self.num_steps = run.num_steps
        self._seed, self._batch_tokens, self._max_epochs = run.loop.seed, run.global_batch_tokens, run.max_epochs
        self._sizes = {source: dict(buckets) for source, buckets in sizes.items()}
        self._ends = run.stage_ends
        self.stage_names = [stage.name for stage in run.stages]
        self._stages: list[Stage] = []
        self.stage_tokens: list[dict[str, int]] = []  # by stage, tokens trained of each source
        self.skipped_tokens: dict[str, int] = {}  # left unread to begin a stage at a multiple of its sequence length
        cursors: dict[tuple[str, str], int] = {}
        for config, begin, end in zip(run.stages, (0, *self._ends), self._ends, strict=False):
            self._add_stage(config, begin, end, cursors)
        self._cursors = cursors
        order = [
            [s.tokens, s.sequence_length, sorted(s.shares.items()), sorted(s.min_quality.items())] for s in run.stages
        ]
        used = {source: self._sizes[source] for stage in run.stages for source in stage.shares}
        self.hash = content_hash([VERSION, self._seed, self._batch_tokens, order, used])

    def _add_stage(self, config: StageConfig, begin: int, end: int, cursors: dict[tuple[str, str], int]) -> None:
        """Append the stage of steps [begin, end), and move `cursors` to where it stops."""
        length = config.sequence_length
        windows_per_step = self._batch_tokens // length
        sources = tuple(sorted(config.shares))
        divisor = gcd(*config.shares.values())
        weights = tuple(config.shares[source] // divisor for source in sources)
        setting = f"StageConfig.shares of stage {config.name!r}"
        remedy = "write the shares as rounder numbers"
        require(
            sum(weights) <= MAX_PERIOD, setting, sum(weights), f"a sum of at most {MAX_PERIOD:,} once reduced", remedy
        )
        dealers = []
        for source in sources:
            lanes = []
            for bucket in self._eligible(config, source):
                cursor = cursors.get((source, bucket), 0)
                aligned = -(-cursor // length) * length
                self.skipped_tokens[source] = self.skipped_tokens.get(source, 0) + aligned - cursor
                lanes.append(Lane(bucket, self._num_chunks(source, bucket), aligned))
            dealers.append(Dealer(lanes))
        stage = Stage(begin, length, windows_per_step, sources, weights, tuple(dealers))
        self._stages.append(stage)
        windows = balanced_period(weights).counts((end - begin) * windows_per_step)
        self.stage_tokens.append({source: count * length for source, count in zip(sources, windows, strict=True)})
        for source, dealer, count in zip(sources, dealers, windows, strict=True):
            for lane, taken in zip(dealer.lanes, dealer.counts(count), strict=True):
                cursors[source, lane.bucket] = lane.cursor_tokens + taken * length

    def _eligible(self, config: StageConfig, source: str) -> list[str]:
        """Buckets of `source` that the stage may read and that hold a chunk; `ConfigError` when there are none."""
        setting = f"source {source!r} of stage {config.name!r}"
        have = f"one of {', '.join(sorted(self._sizes)) or 'none'}"
        require(source in self._sizes, setting, source, have, "tokenize it, or take it out of the stage's shares")
        buckets, quality = self._sizes[source], config.min_quality.get(source, 0.0)
        if quality > 0:
            where = f"min_quality of {setting}"
            need, remedy = "0 for a source with unscored documents", "curate it with a quality model, which scores them"
            require(UNSCORED not in buckets, where, quality, need, remedy)
            buckets = {b: tokens for b, tokens in buckets.items() if (lowest_quality(b) or 0.0) >= quality}
            require(bool(buckets), where, quality, "a quality that some documents reach", "lower it")
        eligible = [bucket for bucket in sorted(buckets) if self._num_chunks(source, bucket)]
        if not eligible:
            remedy = "give it more text, or shorten the run's longest sequence"
            need = f"at least {self.chunk_tokens + 1:,} tokens in a quality bucket"
            raise ConfigError(f"tokens of {setting}", max(buckets.values(), default=0), need, remedy)
        return eligible

    def _num_chunks(self, source: str, bucket: str) -> int:
        return max(0, self._sizes[source][bucket] - 1) // self.chunk_tokens

    def windows_per_step(self, step: int) -> int:
        """Windows of the step's global batch."""
        return self._stage(step).windows_per_step

    def sequence_length(self, step: int) -> int:
        """Tokens of a window at `step`, its label not counted."""
        return self._stage(step).sequence_length

    def tokens_at(self, step: int) -> int:
        """Tokens trained once `step` steps are done."""
        return step * self._batch_tokens

    def window(self, step: int, slot: int) -> Window:
        """The window in `slot` (0 to windows_per_step - 1) of `step` (0-based)."""
        stage = self._stage(step)
        if not 0 <= slot < stage.windows_per_step:
            raise IndexError(f"slot {slot} of {stage.windows_per_step} in step {step}")
        number = (step - stage.first_step) * stage.windows_per_step + slot
        index, ordinal = balanced_period(stage.weights).at(number)
        source, (lane, ordinal) = stage.sources[index], stage.dealers[index].at(ordinal)
        position = lane.cursor_tokens + ordinal * stage.sequence_length
        epoch, place = divmod(position, lane.num_chunks * self.chunk_tokens)
        place, offset = divmod(place, self.chunk_tokens)
        chunk = permutation(lane.num_chunks, self._seed, source, lane.bucket, epoch)(place)
        window_index = offset // stage.sequence_length
        start = chunk * self.chunk_tokens + offset
        return Window(source, lane.bucket, chunk, window_index, start, stage.sequence_length, epoch)

    def slots_of(self, source: str, bucket: str, start_token: int, end_token: int) -> list[tuple[int, int]]:
        """Every (step, slot) whose window, its label included, has some of a bucket's tokens [start, end); in order.

        The way of `window` backwards: its cost is that of the windows found, however long the run.
        """
        slots = []
        for stage, tokens in zip(self._stages, self.stage_tokens, strict=True):
            if source not in stage.sources:
                continue
            index, length = stage.sources.index(source), stage.sequence_length
            dealer, windows = stage.dealers[index], tokens[source] // length
            for number, (lane, taken) in enumerate(zip(dealer.lanes, dealer.counts(windows), strict=True)):
                if lane.bucket != bucket:
                    continue
                for position in self._positions(source, lane, length, taken, start_token, end_token):
                    count = (position - lane.cursor_tokens) // length
                    slot = balanced_period(stage.weights).slot(index, dealer.ordinal(number, count, windows))
                    step, slot = divmod(slot, stage.windows_per_step)
                    slots.append((stage.first_step + step, slot))
        return sorted(slots)

    def _positions(
        self, source: str, lane: Lane, length: int, taken: int, start_token: int, end_token: int
    ) -> Iterator[int]:
        """Where in the lane's endless stream its windows with these tokens begin, among the `taken` of one stage."""
        epoch_tokens = lane.num_chunks * self.chunk_tokens
        begin, end = lane.cursor_tokens, lane.cursor_tokens + taken * length
        first = max(0, -(-start_token // length) - 1) * length  # the window before ends with the first token as label
        for epoch in range(begin // epoch_tokens, -(-end // epoch_tokens)):
            order = permutation(lane.num_chunks, self._seed, source, lane.bucket, epoch)
            for start in range(first, min(end_token, epoch_tokens), length):
                chunk, offset = divmod(start, self.chunk_tokens)
                position = epoch * epoch_tokens + order.inverse(chunk) * self.chunk_tokens + offset
                if begin <= position < end:
                    yield position

    def _stage(self, step: int) -> Stage:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a run of {self.num_steps} steps")
        return self._stages[bisect_right(self._ends, step)]

    def epochs(self) -> dict[str, float]:
        """How often each source has been read when the run ends: that of its most repeated bucket."""
        epochs: dict[str, float] = {}
        for (source, bucket), cursor in self._cursors.items():
            seen = cursor / (self._num_chunks(source, bucket) * self.chunk_tokens)
            epochs[source] = max(seen, epochs.get(source, 0.0))
        return epochs

    def mixture(self) -> dict[str, dict[str, dict[str, float]]]:
        """By stage and source: tokens trained, and how often its text has been read once the stage ends."""
        seen: dict[str, int] = {}
        mixture: dict[str, dict[str, dict[str, float]]] = {}
        for name, tokens_by_source in zip(self.stage_names, self.stage_tokens, strict=True):
            mixture[name] = {}
            for source, tokens in tokens_by_source.items():
                seen[source] = seen.get(source, 0) + tokens
                mixture[name][source] = {"tokens": tokens, "epochs": seen[source] / sum(self._sizes[source].values())}
        return mixture

    def tail_tokens(self) -> dict[str, int]:
        """Tokens of each source that no chunk covers: the ends of its buckets."""
        tails: dict[str, int] = {}
        for source, buckets in self._sizes.items():
            chunks = {bucket: self._num_chunks(source, bucket) for bucket in buckets}
            covered = sum(count * self.chunk_tokens + 1 for count in chunks.values() if count)
            tails[source] = sum(buckets.values()) - covered
        return tails

    def check(self) -> None:
        """Raise `ConfigError` for a source that the run would repeat more often than `RunConfig.max_epochs`."""
        for source, epochs in self.epochs().items():
            wanted = sum(stage.get(source, 0) for stage in self.stage_tokens)
            text = sum(self._sizes[source].values())
            remedy = (
                f"the stages want {wanted:,} tokens of its {text:,}: give it more text, lower its share or "
                f"min_quality, shorten the stages or raise max_epochs"
            )
            allowed = f"at most max_epochs={self._max_epochs:g}"
            require(epochs <= self._max_epochs, f"epochs of source {source!r}", round(epochs, 2), allowed, remedy)
