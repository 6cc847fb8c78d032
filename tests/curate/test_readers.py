"""Readers: every record comes out as a document or in quarantine, with its place and its reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danube_ray.curate.readers import Reading, read_split
from danube_ray.curate.records import Document, Quarantined
from danube_ray.curate.sources import plan_splits
from tests.curate.reading import LIMIT, PACK, documents, json_lines, page, quarantined, read, write


def test_a_text_file_is_a_document_named_by_its_place(tmp_path):
    write(tmp_path / "b" / "page.txt", "\ufeffZürich\n\n  lines stay\n")
    write(tmp_path / "a.md", "plain")
    write(tmp_path / "README", "no suffix")
    write(tmp_path / ".hidden" / "page.txt", "not read")
    assert read(tmp_path) == [
        Document("no suffix", "README"),
        Document("plain", "a.md"),
        Document("Zürich\n\n  lines stay\n", "b/page.txt"),
    ]


@pytest.mark.parametrize("suffix", PACK)
def test_every_packing_is_unpacked_in_all_its_members(tmp_path, suffix):
    first, second = json_lines({"text": "one"}), json_lines({"text": "two"})
    path = write(tmp_path / f"x.jsonl{suffix}", PACK[suffix](first) + PACK[suffix](second))
    assert read(path) == [Document("one", "x.jsonl" + suffix + "#0"), Document("two", f"x.jsonl{suffix}#{len(first)}")]


@pytest.mark.parametrize(
    ("name", "data", "offset", "reason"),
    [
        ("empty.txt", b"", 0, "empty file"),
        ("blank.txt", b" \n\n", 0, "empty file"),
        ("latin.txt", b"caf\xe9", 3, "invalid UTF-8"),
        ("nul.txt", b"ab\0cd", 2, "NUL byte"),
        ("program.txt", b"\x7fELF\0\xff", 5, "binary data"),
        ("long.txt", b"x" * (LIMIT + 1), 0, "over-long document"),
        ("cut.txt.gz", gzip.compress(os.urandom(500))[:-6], 500, "damaged gzip"),
        ("notgzip.txt.gz", b"hello", 0, "damaged gzip"),
        ("notxz.txt.xz", b"hello", 0, "damaged xz"),
        ("notzstd.txt.zst", b"hello", 0, "damaged zstd"),
        ("picture.png", b"\x89PNG", 0, "unsupported format .png"),
        ("empty.jsonl", b"", 0, "empty file"),
        ("empty.csv", b"", 0, "empty file"),
        ("empty.tar", b"", 0, "empty file"),
        ("empty.warc.gz", gzip.compress(b"", mtime=0), 0, "empty file"),
        ("fake.parquet", b"PAR1 or not", 0, "damaged Parquet"),
        ("fake.tar", b"not a tar" * 200, 0, "damaged tar"),
        ("void.html", b"<html><body></body></html>", 0, "nothing extracted"),
        ("void.htm", b"", 0, "empty file"),
        ("picture.html", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff", 8, "NUL byte in a page"),
    ],
)
def test_a_bad_file_is_one_quarantined_record(tmp_path, name, data, offset, reason):
    assert quarantined(read(write(tmp_path / name, data))) == [(name, offset, reason)]


def test_bad_json_lines_leave_their_neighbours_alone(tmp_path):
    bad = {
        b"{not json": "malformed JSON",
        b"[" * 100_000: "over-long document",
        b'["a list"]': "not a JSON object",
        b'{"url": "u"}': "no text",
        b'{"text": 7}': "text is not a string",
        b'{"text": ["a", 7]}': "text is not a string",
        b'{"text": "a\\u0000b"}': "NUL byte",
        b'{"text": "\\ud800"}': "lone surrogate",
        b'{"text": "\xff"}': "invalid UTF-8",
        b'{"text": "' + b"x" * LIMIT + b'"}': "over-long document",
    }
    good = b'{"text": "good", "url": "u"}'
    lines = [good, b"", *(line for sick in bad for line in (sick, good))]
    path = write(tmp_path / "x.jsonl", b"\n".join(lines) + b"\n")
    items = read(path)
    assert documents(items) == [Document("good", "u")] * (len(bad) + 1)
    assert [reason for _, _, reason in quarantined(items)] == list(bad.values())
    content = path.read_bytes()
    for (_, offset, _), line in zip(quarantined(items), bad, strict=True):
        assert content.rindex(b"\n", 0, offset + 1) + 1 == content.index(b"\n" + line) + 1  # its own line
    assert len(items) == sum(bool(line) for line in lines)


def test_a_document_without_url_takes_its_id_then_its_place(tmp_path):
    rows = [{"text": "a", "url": "u", "id": "i"}, {"text": "b", "url": None, "id": "i"}, {"text": "c", "id": 3}]
    path = write(tmp_path / "x.jsonl", json_lines(*rows))
    place = path.read_bytes().index(b'{"text": "c"')
    assert read(path) == [Document("a", "u"), Document("b", "i"), Document("c", f"x.jsonl#{place}")]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"abstract": "less", "content": "more", "text": "most", "title": "Name"}, "most"),
        ({"abstract": "less", "content": "more", "title": "Name"}, "more"),
        ({"text": None, "raw_content": "crawled"}, "crawled"),
        ({"abstract": "What it is about.", "title": "Name"}, "Name\n\nWhat it is about."),
        ({"source": ["One sentence.", "Another."], "title": "Name"}, "Name\n\nOne sentence. Another."),
        ({"text": ["One sentence.", "Another."]}, "One sentence. Another."),
    ],
)
def test_the_text_of_a_row_is_the_first_of_known_fields(tmp_path, row, text):
    path = write(tmp_path / "x.jsonl", json_lines({"url": "u", **row}))
    assert read(path) == [Document(text, "u")]


def test_a_source_that_is_a_name_is_no_text(tmp_path):
    path = write(tmp_path / "x.jsonl", json_lines({"source": "wikipedia"}))
    assert quarantined(read(path)) == [("x.jsonl", 0, "no text")]


def test_a_truncated_gzip_keeps_the_lines_before_the_cut(tmp_path):
    rows = [{"text": os.urandom(40).hex()} for _ in range(500)]
    packed = gzip.compress(json_lines(*rows))
    items = read(write(tmp_path / "x.jsonl.gz", packed[: len(packed) // 2]))
    texts = [document.text for document in documents(items)]
    assert texts == [row["text"] for row in rows[: len(texts)]]
    assert 100 < len(texts) < 400
    assert quarantined(items) == [("x.jsonl.gz", len(json_lines(*rows[: len(texts)])), "damaged gzip")]


def test_a_truncated_table_tells_where_it_ends(tmp_path):
    table = b"text\n" + b"".join(b"%s\n" % os.urandom(40).hex().encode() for _ in range(500))
    packed = gzip.compress(table)
    items = read(write(tmp_path / "x.csv.gz", packed[: len(packed) // 2]))
    rows_bytes = len(b"text\n") + 81 * len(documents(items))
    assert quarantined(items) == [("x.csv.gz", rows_bytes, "damaged gzip")]
    assert 100 < len(documents(items)) < 400


def test_tables_hold_a_document_a_row(tmp_path):
    csv_text = 'id,text,n\r\n1,"two\nlines, ""quoted""",x\r\n\r\n2,plain,y\r\n'
    write(tmp_path / "a.csv", csv_text)
    write(tmp_path / "b.tsv.gz", gzip.compress(b"\tabstract\ttitle\n0\tIt is, as said.\tA name\n"))
    first, second, third = read(tmp_path)
    assert [first, second] == [Document('two\nlines, "quoted"', "1"), Document("plain", "2")]
    assert third == Document("A name\n\nIt is, as said.", "b.tsv.gz#16")


def test_bad_rows_of_a_table_leave_their_neighbours_alone(tmp_path):
    bad = {
        b"1,2,3": "another number of fields than the header",
        b'"quoted" and not,2': "malformed row",
        b"caf\xe9,2": "invalid UTF-8",
        b"a\0b,2": "NUL byte",
        b"x" * (LIMIT + 1) + b",2": "over-long document",
    }
    good = b"good,u"
    data = b"\n".join([b"text,url", good, *(line for sick in bad for line in (sick, good))]) + b"\n"
    items = read(write(tmp_path / "x.csv", data))
    assert documents(items) == [Document("good", "u")] * (len(bad) + 1)
    assert [reason for _, _, reason in quarantined(items)] == list(bad.values())
    for (_, offset, _), line in zip(quarantined(items), bad, strict=True):
        assert 0 <= offset - data.index(b"\n" + line) - 1 < len(line)


def test_a_quote_that_is_never_closed_costs_no_more_than_a_document(tmp_path):
    rows = [b"good %d,u" % number for number in range(300)]
    rows[3] = b'"open,u'
    items = read(write(tmp_path / "x.csv", b"text,url\n" + b"\n".join(rows) + b"\n"))
    assert quarantined(items) == [("x.csv", len(b"text,url\n" + b"\n".join(rows[:3]) + b"\n"), "over-long document")]
    texts = [document.text for document in documents(items)]
    assert texts[:3] == ["good 0", "good 1", "good 2"]
    assert texts[-1] == "good 299" and len(texts) > 300 - LIMIT // len(b"good 9,u")


@pytest.mark.parametrize("header", ["a,b", "source,title"])
def test_a_table_without_a_text_column_is_one_bad_record(tmp_path, header):
    assert quarantined(read(write(tmp_path / "x.csv", f"{header}\n1,2\n3,4\n"))) == [("x.csv", 0, "no text column")]


def test_fields_longer_than_the_csv_module_takes_by_itself_are_read(tmp_path):
    text = "word " * 100_000
    assert read(write(tmp_path / "x.csv", f"text\n{text}\n"), limit=10**6)[0] == Document(text, "x.csv#5")


def test_pages_are_known_by_name_or_by_how_they_begin(tmp_path):
    body = page("It is a truth universally acknowledged, that pages have text.")
    for name in ("a.html", "b.HTM", "c.xhtml.gz", "d", "e.php", "f.aspx"):
        write(tmp_path / name, gzip.compress(body) if name.endswith(".gz") else b"\n" + body)
    items = read(tmp_path)
    assert sorted(document.url for document in documents(items)) == sorted(p.name for p in tmp_path.iterdir())
    assert all("universally acknowledged" in document.text for document in documents(items))
    assert len({document.text for document in documents(items)}) == 1


def test_parquet_reads_each_row_group_once(tmp_path):
    table = pa.table(
        {"text": [f"text {i}" for i in range(10)], "url": [None, *map(str, range(1, 10))], "extra": range(10)}
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    splits = plan_splits("web", tmp_path, split_bytes=1)
    assert [part.row_group for split in splits for part in split.parts] == [0, 1, 2]
    items = [item for split in splits for item in read_split(split, Reading(LIMIT))]
    assert items == [Document(f"text {i}", str(i) if i else "x.parquet#0") for i in range(10)]


def test_parquet_rows_that_are_no_text_are_quarantined_by_number(tmp_path):
    invalid = pa.array([b"fine", b"\xff", None, b"a\0b", b"x" * (LIMIT + 1)], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "x.parquet", row_group_size=2)
    items = read(tmp_path / "x.parquet")
    assert documents(items) == [Document("fine", "x.parquet#0")]
    assert [(offset, reason) for _, offset, reason in quarantined(items)] == [
        (1, "invalid UTF-8"),
        (2, "no text"),
        (3, "NUL byte"),
        (4, "over-long document"),
    ]


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (pa.table({"content": ["a"], "title": ["t"]}), "a"),
        (pa.table({"abstract": ["a"], "title": ["t"]}), "t\n\na"),
        (pa.table({"source": [["a.", "b."]], "title": pa.array(["t"]).dictionary_encode()}), "t\n\na. b."),
    ],
)
def test_parquet_takes_the_same_columns_for_text(tmp_path, table, text):
    pq.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path) == [Document(text, "x.parquet#0")]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (pa.table({"words": ["a"]}), "no text column"),
        (pa.table({"source": ["wikipedia"]}), "no text column"),
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


def test_names_that_are_not_unicode_are_shown_as_far_as_they_are(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:  # noqa: PTH123 (Path takes no bytes)
        file.write("text")
    assert read(tmp_path) == [Document("text", "caf\ufffd.txt")]


def test_common_crawl_json_lines_are_the_same_packed_and_not(shared_data):
    folder = shared_data / "web" / "warc_dolma" / "tests" / "data" / "multiple_files"
    for path in folder.glob("*.jsonl"):
        items = read(path, limit=10**7)
        assert items == read(path.with_suffix(".jsonl.gz"), limit=10**7)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert items == [Document(row["text"], row["id"]) for row in rows]


def test_abstracts_of_arxiv_and_scitldr_follow_their_titles(shared_data):
    folder = shared_data / "academic"
    arxiv = folder / "arxiv" / "econ.EM.tsv.xz"
    rows = csv.DictReader(io.StringIO(lzma.decompress(arxiv.read_bytes()).decode(), newline=""), delimiter="\t")
    assert [record.text for record in documents(read(arxiv, limit=10**6))] == [
        f"{row['title']}\n\n{row['abstract']}" for row in rows
    ]
    papers = documents(read(folder / "scitldr" / "SciTLDR-A.dev.jsonl.xz", limit=10**6))
    assert len(papers) == 619
    assert papers[0].text.startswith("Adaptive Loss Scaling for Mixed Precision Training\n\nMixed precision")


@pytest.mark.parametrize("folder", ["wiki", "academic", "books"])
def test_nothing_in_the_real_folders_is_bad(shared_data, folder):
    path: Path = shared_data / folder
    items = read(path if folder != "academic" else path / "scitldr", limit=10**7)
    assert quarantined(items) == []
    assert sum(len(document.text) for document in documents(items)) > 10**6


def test_lines_end_alike_whatever_system_wrote_them(tmp_path):
    (tmp_path / "page.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "one\\r\\ntwo"}\r\n')
    [split] = plan_splits("web", tmp_path, 2**20)
    assert [record.text for record in read_split(split, Reading(10**6))] == ["one\ntwo\nthree\n", "one\ntwo"]
