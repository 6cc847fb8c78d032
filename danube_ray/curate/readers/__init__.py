"""Readers: the records of a split, each a document, quarantined with its place and reason, or skipped by its kind.

Whatever the format, a file is streamed: of a file of any size no more is held than a document and a buffer. Damage
costs the record it lies in, and what follows where a format gives no way to find its next record.
"""

from danube_ray.curate.readers.files import read_split
from danube_ray.curate.records import Reading

__all__ = ["Reading", "read_split"]
