"""What readers give: the parts of a source that one task reads, and the records in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from danube_ray.artifacts import content_hash
from danube_ray.config import Extraction


@dataclass(frozen=True)
class Part:
    """A file of a source, or one row group of a Parquet file. `file` is relative to the source's root.

    `version` changes with the file's content: its time of change on a disk, an object store's entity tag.
    """

    file: str
    bytes: int
    version: str
    row_group: int | None = None


@dataclass(frozen=True)
class Split:
    """What one task reads: consecutive small files, one large one, or row groups of Parquet.

    `root` is the source's folder, a path or a URI that fsspec opens.
    """

    source: str
    root: str
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The stem of this split's output files: 16 hex digits that depend on the source and its file names alone."""
        return content_hash([self.source, [(part.file, part.row_group) for part in self.parts]])[:16]

    @classmethod
    def unpack(cls, fields: Mapping[str, Any]) -> Self:
        """The split that `dataclasses.asdict` made plain values of."""
        return cls(fields["source"], fields["root"], tuple(Part(**part) for part in fields["parts"]))


@dataclass(frozen=True)
class Reading:
    """How a split's records are read: longer documents are quarantined unread, and `extraction` takes text from HTML.

    A page counts by the bytes of its HTML.
    """

    max_document_bytes: int
    extraction: Extraction = "trafilatura"


@dataclass(frozen=True)
class Document:
    """A readable record. Without a `url` or `id` of its own, `url` is where it lies: `file` or `file#offset`."""

    text: str
    url: str


@dataclass(frozen=True)
class Quarantined:
    """A record that can't be read. `offset` counts (unpacked) bytes of its file, or rows of a Parquet file.

    `file` is relative to the source's root; a file in an archive is `archive!file`.
    """

    file: str
    offset: int
    reason: str
    sample: str = ""


@dataclass(frozen=True)
class Skipped:
    """What a file holds beside records, by its nature: a WARC's requests and images. Counted, and kept nowhere."""

    file: str
    offset: int
    kind: str


class Unusable(ValueError):
    """Why a record has no usable text, and how many bytes into it that shows."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.offset = reason, offset


class Damaged(Unusable):
    """From `offset` on a file can't be read, whatever it holds there."""


Record = Document | Quarantined | Skipped
