"""Tar archives: each file in one is read as it would be outside, as it comes by."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from tarfile import InvalidHeaderError, ReadError, TarError, TarFile, TarInfo, TruncatedHeaderError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Self, cast

from danube_ray.curate.readers.streams import Source
from danube_ray.curate.records import Damaged, Record

ReadMember = Callable[[Source, str], Iterator[Record]]


class _Header(TarInfo):
    """tarfile takes a damaged header for the archive's end unless it is the first; nothing may be lost unsaid."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except (InvalidHeaderError, TruncatedHeaderError, ValueError, OverflowError) as error:
            raise ReadError("damaged header") from error


def read_tar(stream: io.BufferedReader, read_member: ReadMember) -> Iterator[Record]:
    """What `read_member(file, name)` finds in each file; folders, links and hidden files are no records.

    Raises Damaged where the archive is cut off, or broken between two files.
    """
    offset = 0
    try:
        with TarFile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                offset = tar.offset
                hidden = any(name.startswith(".") and name != "." for name in member.name.split("/"))
                if member.isreg() and not hidden:
                    yield from read_member(cast(Source, tar.extractfile(member)), member.name.removeprefix("./"))
                # Or it would remember every file.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
    except TarError as error:
        if str(error) != "empty file":
            raise Damaged("damaged tar", min(offset, stream.tell())) from error
