"""Whatever a file holds, reading it ends, raises nothing, and keeps what lies before the damage; in bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danube_ray.curate.readers import Reading, read_split
from danube_ray.curate.records import Document, Quarantined, Record, Skipped
from danube_ray.curate.sources import plan_splits
from tests.curate.reading import PACK, documents, page, quarantined, read, response, tar, warc_record, write

WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "boil", "coffee")


def texts(number: int, seed: int, length: int = 40) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(number)]


def json_file(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def csv_file(rows: list[str]) -> bytes:
    return ("id,text\n" + "".join(f'{number},"{row}"\n' for number, row in enumerate(rows))).encode()


def warc_file(rows: list[str]) -> bytes:
    pages = (warc_record("response", response(page(row))) for row in rows)
    return b"".join(pages)


def wet_file(rows: list[str]) -> bytes:
    return b"".join(warc_record("conversion", row.encode()) for row in rows)


def tar_file(rows: list[str]) -> bytes:
    return tar(**{f"{number}.txt": row.encode() for number, row in enumerate(rows)})


def parquet_file(rows: list[str]) -> bytes:
    packed = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), packed, row_group_size=10 * len(rows) // 100)
    return packed.getvalue()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": json_file,
    "csv": csv_file,
    "warc": warc_file,
    "wet": wet_file,
    "tar": tar_file,
    "txt": lambda rows: "\n".join(rows).encode(),
    "html": lambda rows: page("\n".join(rows)),
}
FILES = [f"x.{kind}{suffix}" for kind in FORMATS for suffix in PACK] + ["x.parquet"]


def made(name: str, rows: list[str]) -> bytes:
    _, kind, *suffix = name.split(".")
    if kind == "parquet":
        return parquet_file(rows)
    return PACK["".join(f".{packing}" for packing in suffix)](FORMATS[kind](rows))


def damages(data: bytes, draw: random.Random) -> Iterator[bytes]:
    """Cut off, bytes changed, NULs put in, a piece lost, a piece twice, and another file in its midst."""
    for _ in range(3):
        place, length = draw.randrange(len(data)), draw.randint(1, 64)
        yield data[:place]
        yield data[:place] + draw.randbytes(length) + data[place + length :]
        yield data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        yield data[:place] + bytes(length) + data[place:]
        yield data[:place] + data[place + length :]
        yield data[:place] + data[: place + length] + data[place:]
    yield data + draw.randbytes(100)
    yield bytes(len(data))


@pytest.mark.parametrize("name", FILES)
def test_no_damage_stops_reading(tmp_path, name):
    data = made(name, texts(30, seed=1))
    for number, bad in enumerate(damages(data, random.Random(name))):
        records = read(write(tmp_path / str(number) / name, bad), limit=50_000)
        assert records, "even an empty file is a record"
        for record in records:
            assert_writable(record)


def assert_writable(record: Record) -> None:
    """A table can hold the record: no half characters, and no NULs in what was read."""
    strings = [value for value in vars(record).values() if isinstance(value, str)]
    assert pa.array(strings).to_pylist() == strings
    assert isinstance(record, Quarantined) or not any("\0" in value for value in strings)
    assert isinstance(record, Document | Quarantined | Skipped)


@pytest.mark.parametrize(
    "name", [name for name in FILES if not name.startswith(("x.txt", "x.html")) and not name.endswith(".bz2")]
)
def test_what_lies_before_the_damage_is_read(tmp_path, name):
    # Many buffers of every packing but bz2, of whose blocks one would hold all this.
    rows = texts(1_000 if "warc" in name else 4_000, seed=2, length=30)
    whole = made(name, rows)
    expected = read(write(tmp_path / name, whole), limit=50_000)
    assert len(documents(expected)) == len(rows) and not quarantined(expected)
    place = len(whole) * 3 // 4
    bad = whole[:place] + b"\xff" * 64 + whole[place + 64 :] if "parquet" in name else whole[:place]
    records = read(write(tmp_path / name, bad), limit=50_000)
    kept = documents(records)
    assert kept[: len(rows) // 2] == documents(expected)[: len(rows) // 2]
    assert set(kept) < set(documents(expected)) and quarantined(records)
    assert len(kept) > 0.6 * len(rows)


@pytest.mark.parametrize("name", [f"x.{kind}.gz" for kind in ("txt", "html", "jsonl", "csv", "warc", "tar")])
def test_memory_does_not_grow_with_a_document(tmp_path, name):
    """A document of 100 MB where 100 kB are allowed takes a buffer or two, and the next one is read."""
    path = write_long(tmp_path / name, 100)
    splits = plan_splits("web", path, 1)
    tracemalloc.start()
    records = [record for split in splits for record in read_split(split, Reading(100_000, "resiliparse"))]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [reason for *_, reason in quarantined(records)] == ["over-long document"]
    assert bool(documents(records)) == (not name.startswith(("x.txt", "x.html")))
    assert peak_bytes < 3 * 2**20


def write_long(path: Path, megabytes: int) -> Path:
    """One document of many megabytes, and a short one behind it where the format holds several."""
    size = megabytes * 10**6
    short = {"jsonl": b'"}\n{"text": "short"}\n', "csv": b"\nshort\n", "tar": tar(short=b"short")}
    kind = path.name.split(".")[1]
    begins = {"jsonl": b'{"text": "', "csv": b"text\n", "html": b"<html>"}.get(kind, b"")
    ends = short.get(kind, b"")
    if kind == "warc":
        begins = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\n"
        head = response(b"")
        begins += b"Content-Length: %d\r\n\r\n%s" % (size + len(head), head)
        ends = b"\r\n\r\n" + warc_record("conversion", b"short")
    if kind == "tar":
        begins, ends = tar_header("long.txt", size), bytes(-size % 512) + ends
    with gzip.open(path, "wb", compresslevel=1) as packed:
        packed.writelines([begins, *[b"x" * 10**6] * megabytes, ends])
    return path


def tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf()


def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    peaks = []
    for number in (500, 5_000, 5_000):
        splits = plan_splits("web", write(tmp_path / f"{number}.tar", tar_file(texts(number, 3, 5))), 1)
        tracemalloc.start()
        assert sum(1 for split in splits for _ in read_split(split, Reading(10_000))) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # In one of many runs Python's own table of interned names grows, by 4 MB at once.
    assert min(peaks[1:]) < peaks[0] + 100 * (5_000 - 500)  # of a file's header alone 512 bytes


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    path = tmp_path / "x.parquet"
    draw = random.Random(5)
    pq.write_table(pa.table({"text": [draw.randbytes(1_000).hex() for _ in range(20_000)]}), path)
    assert pq.read_metadata(path).num_row_groups == 1
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        [split] = plan_splits("web", path, 1)
        assert sum(1 for _ in read_split(split, Reading(10_000))) == 20_000
    finally:
        pa.set_memory_pool(before)
    assert 0 < pool.max_memory() < 8 * 2**20  # of 40 MB


def test_a_disk_that_fails_is_no_bad_record(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(json_file(texts(5, 4))))
    [split] = plan_splits("web", path, 1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(read_split(split, Reading(1_000)))
