"""How documents are lost on their way: what each reason took of those that reached it, by source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from danube_ray.report.curated import BEFORE_RULES, Curated

STAGES = {
    "blocked_url": "Blocked addresses",
    "language": "Language",
    "max_code_share": "Source code",
    "blocked_word": "Blocked words",
    "contaminated": "Evaluation items",
    "min_quality": "Quality score",
    "duplicate": "Exact duplicates",
    "near_duplicate": "Near-duplicates",
}
RULE_SIGNALS = {
    "C4 rules": ("lorem_ipsum", "curly_brackets", "sentences"),
    "FineWeb rules": ("punctuated_lines", "short_lines", "repeated_line_chars", "newlines_per_word"),
}
FAMILIES = ("Gopher: quality", "Gopher: repetition", *RULE_SIGNALS)
UNREADABLE = "Unreadable"
# A source stands out by what a rule takes of it, against the others, where enough of its documents reach the rule.
STANDS_OUT, STANDS_OUT_TIMES, ENOUGH_REACHED, MOST_NAMED = 0.05, 4, 50, 2


@dataclass(frozen=True)
class Loss:
    """What one reason took from the documents that reached it, and its bound in words, by source."""

    reason: str
    stage: str
    limits: dict[str, str]
    reached: dict[str, int]
    dropped: dict[str, int]

    @property
    def count(self) -> int:
        return sum(self.dropped.values())

    @property
    def limit(self) -> str:
        """The bound where it is the same for all sources that lost something to it, or nothing."""
        limits = {limit for source, limit in self.limits.items() if self.dropped.get(source)}
        return limits.pop() if len(limits) == 1 else ""

    @property
    def share(self) -> float:
        """Dropped of those that reached it."""
        return self.count / (sum(self.reached.values()) or 1)

    def share_of(self, source: str) -> float:
        return self.dropped.get(source, 0) / (self.reached.get(source, 0) or 1)


def losses(curated: Curated) -> list[Loss]:
    """What each reason took, in the order in which documents meet them; unreadable ones come first."""
    left = {source: row.get("read", 0) for source, row in curated.counts.items()}
    found = []

    def take(reason: str, stage: str, limits: dict[str, str], dropped: dict[str, int]) -> None:
        if any(dropped.values()):
            found.append(Loss(reason, stage, limits, dict(left), dropped))
        for source, number in dropped.items():
            left[source] -= number

    take("quarantine", UNREADABLE, {}, {source: row.get("quarantined", 0) for source, row in curated.counts.items()})
    for reason in curated.ordered(curated.total("dropped_by")):
        limits = {source: curated.limit_in_words(reason, source) for source in curated.counts}
        dropped = {source: row.get("dropped_by", {}).get(reason, 0) for source, row in curated.counts.items()}
        take(reason, stage_of(reason), limits, dropped)
    return found


def stage_of(reason: str) -> str:
    """The part of the pipeline, and of a rule its family, that a reason belongs to."""
    signal = re.sub("^(min|max)_", "", reason)
    family = next((name for name, signals in RULE_SIGNALS.items() if signal in signals), None)
    repetition = signal.startswith(("duplicate_", "top_"))
    return STAGES.get(reason) or family or ("Gopher: repetition" if repetition else "Gopher: quality")


def group_of(loss: Loss) -> str:
    """Where a loss stands in the table of rules: under its family, or with what comes before or after all rules."""
    if loss.stage in FAMILIES:
        return loss.stage
    return "Before the rules" if loss.reason in ("quarantine", *BEFORE_RULES) else "After the rules"


def funnel(curated: Curated, lost: list[Loss]) -> list[dict[str, Any]]:
    """What is left after each stage, by source, and what the stage took, as shares of everything read."""
    read = sum(row.get("read", 0) for row in curated.counts.values()) or 1
    first = {source: row.get("read", 0) for source, row in curated.counts.items()}
    rows = [{"stage": "Read", "left": first, "dropped": 0, "share": 0.0}]
    for stage, part in groupby(lost, key=lambda loss: loss.stage):
        taken = list(part)
        dropped = {source: sum(loss.dropped.get(source, 0) for loss in taken) for source in first}
        left = {source: number - dropped[source] for source, number in taken[0].reached.items()}
        number, reached = sum(dropped.values()), sum(taken[0].reached.values())
        rows.append({"stage": stage, "left": left, "dropped": number, "share": number / (reached or 1)})
    rows.append({**rows[-1], "stage": "Kept", "dropped": 0})
    return [
        {**row, "parts": [(source, n, n / read) for source, n in row["left"].items() if n],
         "left": sum(row["left"].values()), "dropped_share": row["dropped"] / read}
        for row in rows
    ]  # fmt: skip


def findings(lost: list[Loss]) -> dict[str, Any]:
    """Where to look first: the reason that takes most, and those that take far more of one source than elsewhere."""
    reasons = [loss for loss in lost if loss.stage != UNREADABLE]
    apart = []
    for loss in (loss for loss in reasons if loss.reason.startswith(("min_", "max_"))):
        for source, number in loss.dropped.items():
            reached = sum(loss.reached.values()) - loss.reached[source]
            others = (loss.count - number) / reached if reached else 1.0
            share = loss.share_of(source)
            enough = loss.reached[source] >= ENOUGH_REACHED
            if enough and share >= STANDS_OUT and share >= STANDS_OUT_TIMES * others:
                apart.append({"loss": loss, "source": source, "share": share, "others": others})
    apart.sort(key=lambda row: -row["share"])
    return {"most": max(reasons, key=lambda loss: loss.count, default=None), "apart": apart[:MOST_NAMED]}
