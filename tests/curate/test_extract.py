"""Readers: every record comes out as a document or in quarantine, with its place and its reason."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danube_ray.config import ConfigError
from danube_ray.curate.extract import plan_splits, read_split
from danube_ray.curate.records import Document, Quarantined

LIMIT = 1_000


def read(path: Path, limit: int = LIMIT) -> list[Document | Quarantined]:
    return [item for split in plan_splits("web", path, split_bytes=2**20) for item in read_split(split, limit)]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_text_file_is_a_document_named_by_its_place(tmp_path):
    write(tmp_path / "b" / "page.txt", "\ufeffZürich\n")
    write(tmp_path / "a.md", "plain")
    write(tmp_path / "README", "no suffix")
    write(tmp_path / "c.txt.gz", gzip.compress(b"packed"))
    write(tmp_path / ".hidden" / "page.txt", "not read")
    assert read(tmp_path) == [
        Document("no suffix", "README"),
        Document("plain", "a.md"),
        Document("Zürich\n", "b/page.txt"),
        Document("packed", "c.txt.gz"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "offset", "reason"),
    [
        ("empty.txt", b"", 0, "empty file"),
        ("blank.txt", b" \n\n", 0, "empty file"),
        ("latin.txt", b"caf\xe9", 3, "invalid UTF-8"),
        ("nul.txt", b"ab\0cd", 2, "NUL byte"),
        ("program.txt", b"\x7fELF\0\xff", 5, "binary data"),
        ("long.txt", b"x" * (LIMIT + 1), 0, "over-long document"),
        ("cut.txt.gz", gzip.compress(os.urandom(500))[:-20], 0, "damaged gzip"),
        ("notgzip.txt.gz", b"hello", 0, "damaged gzip"),
        ("picture.png", b"\x89PNG", 0, "unsupported format .png"),
        ("empty.jsonl", b"", 0, "empty file"),
        ("fake.parquet", b"PAR1 or not", 0, "damaged Parquet"),
    ],
)
def test_a_bad_file_is_one_quarantined_record(tmp_path, name, data, offset, reason):
    [item] = read(write(tmp_path / name, data))
    assert isinstance(item, Quarantined)
    assert (item.file, item.offset, item.reason) == (name, offset, reason)


def test_bad_json_lines_leave_their_neighbours_alone(tmp_path):
    bad = {
        b"{not json": "malformed JSON",
        b"[" * 100_000: "over-long document",
        b'["a list"]': "not a JSON object",
        b'{"url": "u"}': "no text",
        b'{"text": 7}': "text is not a string",
        b'{"text": "a\\u0000b"}': "NUL byte",
        b'{"text": "\\ud800"}': "lone surrogate",
        b'{"text": "\xff"}': "invalid UTF-8",
        b'{"text": "' + b"x" * LIMIT + b'"}': "over-long document",
    }
    good = b'{"text": "good", "url": "u"}'
    lines = [good, b"", *(line for sick in bad for line in (sick, good))]
    path = write(tmp_path / "x.jsonl", b"\n".join(lines) + b"\n")
    items = read(path)
    assert [item for item in items if isinstance(item, Document)] == [Document("good", "u")] * (len(bad) + 1)
    quarantined = [item for item in items if isinstance(item, Quarantined)]
    assert [item.reason for item in quarantined] == list(bad.values())
    content = path.read_bytes()
    for item, line in zip(quarantined, bad, strict=True):
        assert content.rindex(b"\n", 0, item.offset + 1) + 1 == content.index(b"\n" + line) + 1  # its own line
    assert len(items) == sum(bool(line) for line in lines)


def test_a_document_without_url_takes_its_id_then_its_place(tmp_path):
    rows = [{"text": "a", "url": "u", "id": "i"}, {"text": "b", "url": None, "id": "i"}, {"text": "c", "id": 3}]
    path = write(tmp_path / "x.jsonl", json_lines(*rows))
    place = path.read_bytes().index(b'{"text": "c"')
    assert read(path) == [Document("a", "u"), Document("b", "i"), Document("c", f"x.jsonl#{place}")]


def test_a_truncated_gzip_keeps_the_lines_before_the_cut(tmp_path):
    rows = [{"text": os.urandom(40).hex()} for _ in range(500)]
    packed = gzip.compress(json_lines(*rows).encode())
    items = read(write(tmp_path / "x.jsonl.gz", packed[: len(packed) // 2]))
    documents, last = items[:-1], items[-1]
    assert [item.text for item in documents if isinstance(item, Document)] == [
        r["text"] for r in rows[: len(documents)]
    ]
    assert 100 < len(documents) < 400
    assert isinstance(last, Quarantined)
    assert (last.reason, last.offset) == ("damaged gzip", len(json_lines(*rows[: len(documents)])))


def test_parquet_reads_each_row_group_once(tmp_path):
    table = pa.table(
        {"text": [f"text {i}" for i in range(10)], "url": [None, *map(str, range(1, 10))], "extra": range(10)}
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    splits = plan_splits("web", tmp_path, split_bytes=1)
    assert [part.row_group for split in splits for part in split.parts] == [0, 1, 2]
    items = [item for split in splits for item in read_split(split, LIMIT)]
    assert items == [Document(f"text {i}", str(i) if i else "x.parquet#0") for i in range(10)]


def test_parquet_rows_that_are_no_text_are_quarantined_by_number(tmp_path):
    invalid = pa.array([b"fine", b"\xff", None, b"a\0b", b"x" * (LIMIT + 1)], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "x.parquet", row_group_size=2)
    document, *bad = read(tmp_path / "x.parquet")
    assert document == Document("fine", "x.parquet#0")
    assert [(item.offset, item.reason) for item in bad if isinstance(item, Quarantined)] == [
        (1, "invalid UTF-8"),
        (2, "no text"),
        (3, "NUL byte"),
        (4, "over-long document"),
    ]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (pa.table({"content": ["a"]}), "no text column"),
        (pa.table({"text": [1]}), "text column is not a string"),
        (pa.table({"text": pa.array([], pa.string())}), "empty file"),
    ],
)
def test_parquet_of_another_schema_is_quarantined(tmp_path, table, reason):
    pq.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path) == [Quarantined("x.parquet", 0, reason)]


def test_parquet_with_damaged_pages_keeps_the_row_groups_before(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [os.urandom(100).hex() for _ in range(20)]}), path, row_group_size=10)
    place = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 200] = bytes(200)
    path.write_bytes(data)
    items = read(path)
    assert [type(item) for item in items] == [Document] * 10 + [Quarantined]
    assert items[-1] == Quarantined("x.parquet", 10, "damaged Parquet")


def test_small_files_share_a_split_and_names_do_not_depend_on_the_place(tmp_path):
    for root in ("here", "there"):
        for index in range(10):
            write(tmp_path / root / f"{index}.txt", "x" * 100)
    here, there = (plan_splits("web", tmp_path / root, split_bytes=300) for root in ("here", "there"))
    assert [len(split.parts) for split in here] == [3, 3, 3, 1]
    assert [split.name for split in here] == [split.name for split in there]
    assert len({split.name for split in [*here, *plan_splits("wiki", tmp_path / "here", split_bytes=300)]}) == 8


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "empty"])
def test_a_source_without_files_is_refused(tmp_path, make):
    make(tmp_path / "source")
    with pytest.raises(ConfigError, match="path of source 'web'"):
        plan_splits("web", tmp_path / "source", split_bytes=1)


def test_common_crawl_json_lines_are_the_same_packed_and_not(shared_data):
    folder = shared_data / "web" / "warc_dolma" / "tests" / "data" / "multiple_files"
    for path in folder.glob("*.jsonl"):
        items = read(path, limit=10**7)
        assert items == read(path.with_suffix(".jsonl.gz"), limit=10**7)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert items == [Document(row["text"], row["id"]) for row in rows]
