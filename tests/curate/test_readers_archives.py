"""Readers of archives: WARC with its relatives, and tar."""

from __future__ import annotations

import gzip
import re
import zlib
from itertools import islice
from pathlib import Path

import pytest

from danube_ray.curate.readers import Reading, read_split
from danube_ray.curate.records import Document, Skipped
from danube_ray.curate.sources import plan_splits
from tests.curate.reading import (
    LIMIT,
    PACK,
    documents,
    json_lines,
    page,
    quarantined,
    read,
    response,
    skipped,
    tar,
    warc_record,
    write,
)

SENTENCE = "Call me Ishmael, said the page, and it went on for a while about the sea."
GOOD = warc_record("response", response(page(SENTENCE)), "http://example.org/good")


def warc(path: Path, *records: bytes, limit: int = 10**5) -> list:
    return read(write(path, b"".join(records)), limit)


@pytest.mark.parametrize("suffix", PACK)
def test_pages_and_plain_text_of_a_warc_are_documents(tmp_path, suffix):
    plain = warc_record("response", response("Grüße".encode("cp1252"), "text/plain; charset=iso-8859-1"), "<http://b>")
    pages = read(write(tmp_path / f"x.warc{suffix}", PACK[suffix](GOOD + plain)), 10**5)
    assert [document.url for document in documents(pages)] == ["http://example.org/good", "http://b"]
    assert SENTENCE in documents(pages)[0].text and documents(pages)[1].text == "Grüße"


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (lambda html: html, ""),
        (lambda html: gzip.compress(html), "Content-Encoding: gzip\r\n"),
        (lambda html: zlib.compress(html), "Content-Encoding: deflate\r\n"),
        (lambda html: b"%x\r\n%s\r\n0\r\n\r\n" % (len(html), html), "Transfer-Encoding: chunked\r\n"),
    ],
    ids=["plain", "gzip", "deflate", "chunked"],
)
def test_payloads_are_unpacked_as_http_says(tmp_path, body, encoding):
    record = warc_record("response", response(body(page(SENTENCE)), extra=encoding))
    [document] = documents(warc(tmp_path / "x.warc", record))
    assert SENTENCE in document.text


def test_a_payload_of_many_chunks_is_whole(tmp_path):
    text = "".join(f"sentence {number} of a long page. " for number in range(20_000))
    packed = gzip.compress(text.encode())
    chunks = (packed[start : start + 1_000] for start in range(0, len(packed), 1_000))
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    coded = response(body, "text/plain", extra="Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n")
    items = warc(tmp_path / "x.warc", warc_record("response", coded), limit=10**6)
    assert items == [Document(text, "http://example.org/")]


def test_what_is_no_page_is_skipped_by_its_kind(tmp_path):
    records = [
        *(warc_record(kind, b"x: y\r\n") for kind in ("warcinfo", "request", "metadata", "revisit", "resource")),
        warc_record("response", response(b"", status="301 Moved")),
        warc_record("response", response(b"gone", status="404 Not Found")),
        warc_record("response", response(b"\x89PNG", "image/png")),
        warc_record("response", response(b"x" * LIMIT, "video/mp4")),
        warc_record("response", response(b"x", "strange")),
        warc_record("response", b"1.2.3.4", media="text/dns"),
    ]
    items = warc(tmp_path / "x.warc", *records, limit=LIMIT)
    kinds = ["warcinfo", "request", "metadata", "revisit", "resource", "status 3xx", "status 4xx", "image", "video"]
    assert skipped(items) == [*kinds, "payload of an unknown type", "response without HTTP"]
    assert items[1] == Skipped("x.warc", len(records[0]), "request")
    assert len(items) == len(records)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"this is no record\r\n" * 50, "damaged record"),
        (GOOD.replace(b"WARC/1.0", b"WURC/1.0"), "damaged record"),
        (GOOD.replace(b"Content-Length: ", b"Content-Length: 9"), "damaged record"),
        (GOOD.replace(b"Content-Length: ", b"Content-Length: 99999999"), "over-long document"),
        (GOOD.replace(b"Content-Length: ", b"Content-Length: x"), "damaged record"),
        (GOOD.replace(b"Content-Length: ", b"Length: "), "damaged record"),
        (re.sub(rb"Content-Length: \d+", b"Content-Length: 100", GOOD), "damaged record"),
        (GOOD[: len(GOOD) // 2], "damaged record"),
        (warc_record("response", response(b"no gzip", extra="Content-Encoding: gzip\r\n")), "damaged HTTP payload"),
        (
            warc_record("response", response(b"no chunk", extra="Transfer-Encoding: chunked\r\n")),
            "damaged HTTP payload",
        ),
        (warc_record("response", response(b"x", extra="Content-Encoding: rot13\r\n")), "damaged HTTP payload"),
        (warc_record("response", response(b"<html></html>")), "nothing extracted"),
        (warc_record("response", response(b"")), "empty record"),
        (warc_record("response", response(page("word " * 20_000))), "over-long document"),
        (
            warc_record("response", response(gzip.compress(bytes(10**7)), extra="Content-Encoding: gzip\r\n")),
            "over-long document",
        ),
        (warc_record("conversion", b"caf\xe9"), "invalid UTF-8"),
        (warc_record("conversion", b""), "empty record"),
    ],
)
def test_a_bad_record_leaves_its_neighbours_alone(tmp_path, bad, reason):
    items = warc(tmp_path / "x.warc", GOOD, bad, GOOD, GOOD)
    assert quarantined(items) == [("x.warc", len(GOOD), reason)]
    assert [SENTENCE in document.text for document in documents(items)] == [True] * 3


@pytest.mark.parametrize("place", [12, 40, -12, -5])
def test_a_damaged_gzip_member_costs_its_own_record(tmp_path, place):
    members = [gzip.compress(warc_record("conversion", b"text %d" % number, f"http://{number}")) for number in range(9)]
    bad = bytearray(members[4])
    bad[place : place + 4] = b"\xff\x00\xff\x00"
    items = warc(tmp_path / "x.warc.wet.gz", *members[:4], bytes(bad), *members[5:])
    assert [document.text for document in documents(items)] == [f"text {number}" for number in range(9) if number != 4]
    start = len(b"".join(gzip.decompress(member) for member in members[:4]))
    assert quarantined(items) == [("x.warc.wet.gz", start, "damaged gzip")]


def test_a_truncated_warc_keeps_the_records_before(tmp_path):
    items = warc(tmp_path / "x.warc", GOOD, GOOD[:-50])
    assert len(documents(items)) == 1
    assert quarantined(items) == [("x.warc", len(GOOD), "damaged record")]
    items = warc(tmp_path / "x.warc.gz", gzip.compress(GOOD), gzip.compress(GOOD)[:-20])
    assert len(documents(items)) == 1
    assert quarantined(items) == [("x.warc.gz", len(GOOD), "damaged gzip")]


def test_files_in_a_tar_are_read_as_they_would_be_outside(tmp_path):
    files = {
        "a.txt": b"text",
        "./b/c.html": page(SENTENCE),
        "d.jsonl.gz": gzip.compress(json_lines({"text": "line"}, {"nothing": 1})),
        ".hidden": b"no",
        "e/._f.txt": b"no",
        "g.txt": b"\xff",
        "h.tar": tar(x=b"inner"),
        "i.txt": b"",
        "j.txt": b"last",
    }
    for suffix in PACK:
        items = read(write(tmp_path / suffix / f"x.tar{suffix}", PACK[suffix](tar(**files))), 10**5)
        place = f"x.tar{suffix}!"
        assert [document.url for document in documents(items)] == [
            place + name for name in ("a.txt", "b/c.html", "d.jsonl.gz#0", "j.txt")
        ]
        assert quarantined(items) == [
            (place + "d.jsonl.gz", 17, "no text"),
            (place + "g.txt", 0, "invalid UTF-8"),
            (place + "h.tar", 0, "unsupported format .tar"),
            (place + "i.txt", 0, "empty file"),
        ]
    short = write(tmp_path / "y.tgz", gzip.compress(tar(**{"a.txt": b"text"})))
    assert read(short) == [Document("text", "y.tgz!a.txt")]


def test_damage_in_a_tar_is_told_where_it_begins(tmp_path):
    whole = tar(**{f"{number}.txt": b"x" * 700 for number in range(5)})
    member = 512 + 1024
    broken = whole[: 2 * member] + b"\xff" * 512 + whole[2 * member + 512 :]
    for data in (broken, whole[: 2 * member + 100]):
        items = read(write(tmp_path / "x.tar", data))
        assert len(documents(items)) == 2
        assert quarantined(items) == [("x.tar", 2 * member, "damaged tar")]
    items = read(write(tmp_path / "x.tar", whole[: 2 * member + 900]))
    assert len(documents(items)) == 2
    assert [reason for *_, reason in quarantined(items)] == ["damaged tar"]


def test_common_crawl_archives(shared_data):
    folder = shared_data / "web" / "warc_whirlwind"
    plain, packed = (read(folder / name, 10**6, "trafilatura") for name in ("whirlwind.warc", "whirlwind.warc.gz"))
    assert documents(plain) == documents(packed) and skipped(plain) == skipped(packed)
    assert skipped(plain) == ["warcinfo", "request", "metadata"] and quarantined(plain) == []
    [document] = documents(plain)
    assert document.url == "https://an.wikipedia.org/wiki/Escopete" and "Escopete" in document.text
    wet, packed_wet = (read(folder / name, 10**6) for name in ("whirlwind.warc.wet", "whirlwind.warc.wet.gz"))
    assert documents(wet) == documents(packed_wet) and documents(wet)[0].url == document.url
    assert skipped(read(folder / "whirlwind.warc.wat.gz", 10**6)) == ["warcinfo", "metadata"]


def test_archives_of_a_crawler_that_packs_what_it_got(shared_data):
    folder = shared_data / "web" / "warc_dolma" / "tests" / "data" / "warc"
    items = read(folder, 10**6)
    responses = sum(gzip.decompress(path.read_bytes()).count(b"\nWARC-Type: response") for path in folder.iterdir())
    assert len(documents(items)) == responses > 30 and quarantined(items) == []
    assert {"warcinfo", "request", "resource", "metadata"} == set(skipped(items))
    assert sum("Creative Commons" in document.text for document in documents(items)) >= 4


def test_pages_in_a_packed_tar(shared_data):
    [split] = plan_splits("web", shared_data / "web" / "html_trafilatura" / "html.tar.xz", 1)
    items = list(islice(read_split(split, Reading(10**7, "resiliparse")), 200))
    assert len(documents(items)) > 190
    assert all(document.url.startswith("html.tar.xz!tests/") for document in documents(items))
    assert {reason for *_, reason in quarantined(items)} <= {"nothing extracted", "NUL byte in a page"}
