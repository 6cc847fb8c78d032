"""All rules on a core against datatrove's filters as shipped, in turn over slices of the same documents.

Theirs are GopherRepetitionFilter, GopherQualityFilter, C4QualityFilter (its rule for terminal punctuation off) and
FineWebQualityFilter with their defaults, FineWeb's order, called document by document without an executor. Speed is
MB of UTF-8 by processor time, which a busy machine lengthens less than time by the clock. Then both split with spaCy,
and must decide alike on every document, for the same reasons, and leave the same text.

    python -m tests.benchmarks.rules_vs_datatrove [--documents FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)

from danube_ray.config import WEB_RULES
from danube_ray.curate.heuristics import judge, measure
from danube_ray.curate.reference import DATATROVE_REASONS, REFERENCE_RULES, SpacySplitter
from tests.benchmarks import texts
from tests.benchmarks.pairs import compare, record, share_interval

MIN_DOCUMENTS = 5_000
Decision = tuple[str | None, str]


class Datatrove:
    """Why datatrove drops a text (None: it keeps it), and what it leaves of it."""

    def __init__(self) -> None:
        c4 = C4QualityFilter(filter_no_terminal_punct=False)
        self.filters = (GopherRepetitionFilter(), GopherQualityFilter(), c4, FineWebQualityFilter())

    def __call__(self, text: str) -> Decision:
        document = Document(text=text, id="")
        for step in self.filters:
            if isinstance(result := step.filter(document), tuple):
                return result[1], text
        return None, document.text


class Timed:
    """Decides slice after slice, and returns each one's MB/s; keeps the decisions."""

    def __init__(self, decide: Callable[[str], Decision], slices: Iterable[list[str]]) -> None:
        self.decide, self.slices = decide, iter(slices)
        self.decisions: list[Decision] = []

    def __call__(self) -> float:
        slice_ = next(self.slices)
        num_bytes = sum(len(text.encode(errors="replace")) for text in slice_)
        began = time.process_time()
        self.decisions += [self.decide(text) for text in slice_]
        return num_bytes / 1e6 / (time.process_time() - began)


def with_patterns(text: str) -> Decision:
    verdict = judge(text, WEB_RULES)
    return verdict.reason, verdict.text


def with_spacy(text: str, splitter: SpacySplitter) -> Decision:
    verdict = judge(text, REFERENCE_RULES, splitter)
    return verdict.reason and DATATROVE_REASONS[verdict.reason], verdict.text


def main(pairs: int = 40, documents: Path | None = None) -> None:
    found = texts.load(documents)
    size = -(-len(found) // (pairs + 1))  # the first slice warms both up
    slices = [found[start : start + size] for start in range(0, len(found), size)]
    ours, theirs = Timed(with_patterns, slices), Timed(Datatrove(), slices)
    ours()
    theirs()
    ratio, figures = compare(ours, theirs, len(slices) - 1)
    speeds = [statistics.median(column) for column in zip(*figures, strict=True)]
    measured = Timed(lambda text: (None, str(measure(text))), slices)
    measured_speed = statistics.median(measured() for _ in slices)
    print(f"our rules / datatrove's: {ratio}  (aim: at least 10)")
    print(f"{speeds[0]:.2f} and {speeds[1]:.2f} MB/s; every signal of every document: {measured_speed:.2f} MB/s")

    kept = [
        (mine is None, other is None) for (mine, _), (other, _) in zip(ours.decisions, theirs.decisions, strict=True)
    ]
    agreeing = sum(mine == other for mine, other in kept)
    low, high = share_interval(agreeing, len(found))
    print(f"keep or drop alike: {agreeing / len(found):.4f} [{low:.4f}, {high:.4f}]  (aim: at least 0.96)")
    apart = Counter(
        f"ours {mine}, theirs {other}"
        for (mine, _), (other, _) in zip(ours.decisions, theirs.decisions, strict=True)
        if (mine is None) != (other is None)
    )

    splitter = SpacySplitter()
    same = [with_spacy(text, splitter) == other for text, other in zip(found, theirs.decisions, strict=True)]
    print(f"with the same splitters: {sum(same):,} of {len(same):,} decisions, reasons and texts alike  (aim: all)")
    record(
        "rules_vs_datatrove",
        {
            "ratio": ratio,
            "mb_per_s": figures,
            "mb_per_s_every_signal": measured_speed,
            "documents": len(found),
            "mb": sum(len(text.encode(errors="replace")) for text in found) / 1e6,
            "kept": sum(mine for mine, _ in kept),
            "kept_by_datatrove": sum(other for _, other in kept),
            "agreement": {"share": agreeing / len(found), "low": low, "high": high},
            "disagreements": dict(apart.most_common()),
            "same_with_spacy": sum(same),
            "versions": {name: version(name) for name in ("datatrove", "spacy", "numpy")},
            "timed": "processor time, one core each",
        },
    )
    assert all(same), "the reference mode decides otherwise than datatrove"
    assert documents or len(found) >= MIN_DOCUMENTS, f"only {len(found)} documents"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=Path, help="a folder of text or JSON lines, in place of the test data")
    main(documents=parser.parse_args().documents)
