"""Files as streams of unpacked bytes, wherever they lie: damage in a packed one is told as `Damaged`."""

from __future__ import annotations

import errno
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

import pyarrow as pa

from danube_ray.curate.records import Damaged

Packing = Literal["gzip", "xz", "zstd", "bz2"]
PACKINGS: dict[str, Packing] = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}

BUFFER_BYTES = 2**16  # also what is lost of a damaged stream before the damage, at most
SKIP_BYTES = 2**18
GZIP_MAGIC = b"\x1f\x8b\x08"


class Source(Protocol):
    """What bytes are read from: at most `size` of them, none at the end."""

    def read(self, size: int, /) -> bytes: ...


def open_file(root: str, file: str) -> BinaryIO:
    """A file of a source as it lies there. Raises OSError with an `errno` where the disk or the network fails."""
    if "://" not in root:
        return (Path(root) / file).open("rb")
    return cast(BinaryIO, _Remote(root.rstrip("/"), file))


def unpacked(file: Source, packing: Packing | None) -> io.BufferedReader:
    """The bytes in a file. `tell()` counts them, and where they are damaged, reading raises Damaged.

    gzip takes up reading at its next member, as WARC files have one for each record; the others have ended.
    """
    source: Source = file
    if packing == "gzip":
        source = _Gzip(file)
    elif packing == "xz":
        source = lzma.LZMAFile(cast(BinaryIO, file))  # noqa: SIM115 (it lives as long as what it reads)
    elif packing is not None:
        source = cast(Source, pa.input_stream(file, compression=packing))
    return io.BufferedReader(_Unpacked(source, packing), BUFFER_BYTES)


def lines(stream: io.BufferedReader, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Each line with its offset; of one longer than `max_bytes` only the first `max_bytes + 1` bytes."""
    end = 0
    try:
        while line := stream.readline(max_bytes + 1):
            start, end = end, end + len(line)
            rest = line
            while len(line) > max_bytes and not rest.endswith(b"\n") and (rest := stream.readline(SKIP_BYTES)):
                end += len(rest)
            yield start, line
    except Damaged as error:
        error.offset = end
        raise


class _Remote(io.RawIOBase):
    """A file of a store. Its client's errors get a number, as a disk's have, or they would pass for damaged data."""

    def __init__(self, root: str, file: str) -> None:
        from fsspec.core import url_to_fs

        self._uri = f"{root}/{file}"
        with self._numbered():
            fs, path = url_to_fs(root)  # of the folder alone: a file's name may hold what means something in an address
            self._file = fs.open(f"{path}/{file}", "rb")

    @contextmanager
    def _numbered(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            number = error.errno if isinstance(error, OSError) and error.errno is not None else errno.EIO
            raise OSError(number, f"{type(error).__name__}: {error}", self._uri) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._numbered():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._numbered():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """Bytes of a source, counted. Whatever a library calls damage is Damaged here, and a disk's own errors pass."""

    def __init__(self, source: Source, packing: Packing | None) -> None:
        self._source, self._packing = source, packing
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise_if_disk(error)
            if self._packing != "gzip":
                self._source = io.BytesIO()
            raise Damaged(f"damaged {self._packing or 'file'}", self._position) from error
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _Gzip:
    """Members of a gzip file, one after the other. After a damaged one reading goes on at what begins the next."""

    def __init__(self, file: Source) -> None:
        self._file = file
        self._packed = b""
        self._member: Any = None

    def read(self, size: int) -> bytes:
        while True:
            self._packed = self._packed or self._file.read(BUFFER_BYTES)
            if self._member is None:
                self._packed = self._packed.lstrip(b"\0")  # as a member may be padded
                if not self._packed:
                    if not (more := self._file.read(BUFFER_BYTES)):
                        return b""
                    self._packed = more
                    continue
            if not self._packed:
                self._member = None
                raise EOFError
            if data := self._unpack(size):
                return data

    def _unpack(self, size: int) -> bytes:
        begins = self._member is None
        self._member = self._member or zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)
        try:
            data = self._member.decompress(self._packed, size)
        except zlib.error:
            self._member = None
            self._find_next(self._packed[1:] if begins else self._packed)
            raise
        if self._member.eof:
            self._packed, self._member = self._member.unused_data, None
        else:
            self._packed = self._member.unconsumed_tail
        return data

    def _find_next(self, packed: bytes) -> None:
        while (place := packed.find(GZIP_MAGIC)) < 0:
            if not (more := self._file.read(BUFFER_BYTES)):
                self._packed = b""
                return
            packed = packed[1 - len(GZIP_MAGIC) :] + more
        self._packed = packed[place:]


def raise_if_disk(error: Exception) -> None:
    """Libraries raise OSError for bad bytes too; one with an errno is the disk's, and no fault of the data."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
