"""From a batch to its documents, and from a document to the steps that train on it.

A window of the plan is a range of a bucket's tokens, the bucket's index says whose documents they are, and its shards
carry the documents' ids and URLs. Neither way reads tokens; a document is found by its id in the column of the ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from danube_ray.data.plan import MixturePlan, Window
from danube_ray.data.shards import Span, TokenStore

Sources = Mapping[str, Mapping[str, TokenStore]]


@dataclass(frozen=True)
class Passage:
    """A part of one document in a row of a batch. A row's last token, which is only a label, counts as the others do.

    It fills `tokens` tokens of the row in `slot` from `row_token` on; they are those from `document_token` on of the
    document's `document_tokens`, `<s>` and `</s>` included. `epoch` says how often the bucket was read before.
    """

    slot: int
    row_token: int
    tokens: int
    source: str
    bucket: str
    epoch: int
    id: str
    url: str
    document_token: int
    document_tokens: int


def documents_of(plan: MixturePlan, sources: Sources, step: int, slots: Iterable[int] | None = None) -> list[Passage]:
    """The documents in the global batch of `step` (from 0), in order of slot and place: all rows, or those of `slots`.

    `sources` are the plan's stores (`open_sources`); a rank's slots are `windows.rank_rows`. The passages of a row lie
    end to end and cover its S + 1 tokens. Raises `ArtifactError` for shards that don't name their documents.
    """
    slots = range(plan.windows_per_step(step)) if slots is None else slots
    found: list[tuple[int, Window, Span]] = []
    numbers: dict[tuple[str, str], set[int]] = {}
    for slot in slots:
        window = plan.window(step, slot)
        spans = list(sources[window.source][window.bucket].documents(window.start_token, window.length + 1))
        found += [(slot, window, span) for span in spans]
        numbers.setdefault((window.source, window.bucket), set()).update(span.number for span in spans)
    names = {(source, bucket): sources[source][bucket].names(wanted) for (source, bucket), wanted in numbers.items()}
    return [
        _passage(slot, window, span, *names[window.source, window.bucket][span.number]) for slot, window, span in found
    ]


def _passage(slot: int, window: Window, span: Span, document_id: str, url: str) -> Passage:
    """The part of a document that a window has."""
    begin = max(span.start_token, window.start_token)
    end = min(span.end_token, window.start_token + window.length + 1)
    return Passage(
        slot=slot,
        row_token=begin - window.start_token,
        tokens=end - begin,
        source=window.source,
        bucket=window.bucket,
        epoch=window.epoch,
        id=document_id,
        url=url,
        document_token=begin - span.start_token,
        document_tokens=span.end_token - span.start_token,
    )


def find_document(sources: Sources, document_id: str) -> tuple[str, str, Span] | None:
    """Source, bucket and place of a document, for `MixturePlan.slots_of`; None when no store has it.

    Reads the ids of one store after the other until it is found, 16 bytes a document.
    """
    for source, buckets in sources.items():
        for bucket, store in buckets.items():
            if (span := store.find(document_id)) is not None:
                return source, bucket, span
    return None
