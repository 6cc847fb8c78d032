"""Sources: the same splits wherever the files lie, on a disk, in an object store or on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import fsspec
import fsspec.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from danube_ray.config import ConfigError
from danube_ray.curate.readers import Reading, read_split
from danube_ray.curate.records import Document, Part, Record, Split
from danube_ray.curate.sources import plan_splits
from tests.curate.reading import PACK, json_lines, read, write

FILES = {
    "web/a.jsonl.gz": PACK[".gz"](json_lines({"text": "one"}, {"text": "two"})),
    "web/b/c.txt": b"three",
    "web/.hidden/d.txt": b"not read",
}
TEXTS = ["one", "two", "three"]


def records(splits: list[Split]) -> list[Record]:
    return [record for split in splits for record in read_split(split, Reading(1_000))]


def read_texts(splits: list[Split]) -> list[str]:
    return [record.text for record in records(splits) if isinstance(record, Document)]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on a server of this machine that speaks S3."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}", "key": "key", "secret": "secret"}
    try:
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        for name, data in FILES.items():
            fs.pipe(f"bucket/{name}", data)
        yield "s3://bucket"
    finally:
        del fsspec.config.conf["s3"]
        server.stop()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as it takes to list and read one dataset."""

    files = FILES

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        revision = "/api/datasets/owner/name/revision/"
        if path == "/api/datasets/owner/name" or path.startswith(revision):
            self.answer(json.dumps({"id": "owner/name", "sha": "a" * 40, "siblings": []}).encode())
        elif path.startswith("/api/datasets/owner/name/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.answer(json.dumps(listed).encode())
        elif "/resolve/" in path and (name := path.split("/resolve/")[1].partition("/")[2]) in self.files:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self.answer(self.files[name][int(first) : int(last) + 1], status=206)
        else:
            self.answer(b"{}", status=404)

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fsspec.config.conf["hf"] = {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": False}
    try:
        yield "hf://datasets/owner"
    finally:
        del fsspec.config.conf["hf"]
        server.shutdown()


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    for name, data in FILES.items():
        fs.pipe(f"/store/{name}", data)
    yield "memory://store"
    fs.rm("/store", recursive=True)


def test_small_files_share_a_split_and_names_do_not_depend_on_the_place(tmp_path):
    for root in ("here", "there"):
        for index in range(10):
            write(tmp_path / root / f"{index}.txt", "x" * 100)
    here, there = (plan_splits("web", tmp_path / root, split_bytes=300) for root in ("here", "there"))
    assert [len(split.parts) for split in here] == [3, 3, 3, 1]
    assert [split.name for split in here] == [split.name for split in there]
    assert len({split.name for split in [*here, *plan_splits("wiki", tmp_path / "here", split_bytes=300)]}) == 8


def test_a_part_tells_when_its_file_has_changed(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    [before] = plan_splits("web", tmp_path, 1)
    path.write_text("next")
    [after] = plan_splits("web", tmp_path, 1)
    assert before.name == after.name and before != after
    assert before.parts[0].file == "a.txt" and before.parts[0].bytes == 4


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "empty"])
def test_a_source_without_files_is_refused(tmp_path, make):
    make(tmp_path / "source")
    with pytest.raises(ConfigError, match="path of source 'web'"):
        plan_splits("web", tmp_path / "source", split_bytes=1)


def test_links_are_followed_and_each_folder_is_read_once(tmp_path):
    source = tmp_path / "source"
    write(source / "b" / "c.txt", "here")
    write(tmp_path / "elsewhere" / "d.txt", "linked")
    (source / "a.txt").symlink_to(tmp_path / "elsewhere" / "d.txt")
    (source / "b" / "far").symlink_to(tmp_path / "elsewhere")
    (source / "b" / "round").symlink_to(source)
    (source / "twice").symlink_to(source / "b")
    files = [part.file for split in plan_splits("web", source, 1) for part in split.parts]
    assert files == ["a.txt", "b/c.txt", "b/far/d.txt"]


def test_what_cannot_be_listed_on_a_disk_is_not_passed_over(tmp_path):
    write(tmp_path / "a.txt", "text")
    (tmp_path / ".hidden").symlink_to(tmp_path / "gone")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"path of source 'web' is .*b\.txt"):
        plan_splits("web", tmp_path, 1)


def test_a_single_file_is_a_source(tmp_path):
    [split] = plan_splits("web", write(tmp_path / "x" / "a.txt", "text"), 1)
    assert (split.root, split.parts[0].file) == (str(tmp_path / "x"), "a.txt")
    assert read(tmp_path / "x" / "a.txt") == [Document("text", "a.txt")]


def test_an_object_store_holds_the_same_splits_as_a_disk(s3, tmp_path):
    for name, data in FILES.items():
        write(tmp_path / name, data)
    stored, local = plan_splits("web", f"{s3}/web/", 1), plan_splits("web", tmp_path / "web", 1)
    assert [split.name for split in stored] == [split.name for split in local]
    assert [part.bytes for split in stored for part in split.parts] == [
        part.bytes for split in local for part in split.parts
    ]
    assert records(stored) == records(local)
    assert read_texts(stored) == TEXTS
    assert read_texts(plan_splits("web", f"{s3}/web/b/c.txt", 1)) == ["three"]


def test_objects_are_read_whatever_their_names_and_folders_of_a_console_are_none(s3):
    fs = fsspec.filesystem("s3")
    names = ["+.txt", "a#1.txt", "a%20b.txt", "a::b.txt", "a?x=1.txt", "a[1]*.txt", "\u00fc b.txt"]
    for name in names:
        fs.pipe(f"bucket/odd/{name}", name.encode())
    for folder in ("odd/", "odd/below/"):  # empty objects, which stand for folders
        fs.call_s3("put_object", Bucket="bucket", Key=folder, Body=b"")
    assert read_texts(plan_splits("web", f"{s3}/odd", 1)) == sorted(names)


def test_an_object_has_another_version_when_its_content_changes(s3):
    fs = fsspec.filesystem("s3")
    versions = []
    for text in (b"first", b"other", b"first"):
        fs.pipe("bucket/changing/a.txt", text)
        [split] = plan_splits("web", f"{s3}/changing", 1)
        versions.append(split.parts[0].version)
    assert versions[0] == versions[2] != versions[1] and versions[0]


def test_parquet_in_a_store_is_split_by_row_groups(s3, tmp_path):
    pq.write_table(
        pa.table({"text": [f"text {number}" for number in range(6)]}), tmp_path / "x.parquet", row_group_size=2
    )
    fsspec.filesystem("s3").put(str(tmp_path / "x.parquet"), "bucket/tables/x.parquet")
    splits = plan_splits("web", f"{s3}/tables", 1)
    assert [part.row_group for split in splits for part in split.parts] == [0, 1, 2]
    assert read_texts(splits) == [f"text {number}" for number in range(6)]


def test_a_store_that_loses_a_file_is_no_bad_record(s3):
    lost = Split("web", f"{s3}/web", (Part("lost.jsonl.gz", 1, ""),))
    with pytest.raises(OSError) as error:
        records([lost])
    assert error.value.errno is not None and "lost.jsonl.gz" in str(error.value)


def test_a_connection_that_breaks_off_is_no_damaged_gzip(memory, monkeypatch):
    [split, _] = plan_splits("web", f"{memory}/web", 1)

    def broken(*_: object) -> bytes:
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", broken)
    with pytest.raises(OSError, match="connection reset by peer") as error:
        records([split])
    assert error.value.errno is not None


def test_any_file_system_of_fsspec_is_read(memory):
    assert read_texts(plan_splits("web", f"{memory}/web", 1)) == TEXTS


@pytest.mark.parametrize("revision", ["", "@main", f"@{'b' * 40}"])
def test_a_dataset_of_the_hub_is_read_by_name(hub, revision):
    splits = plan_splits("web", f"{hub}/name{revision}", 1)
    assert read_texts(splits) == TEXTS
    assert all(split.root == f"{hub}/name{revision}" for split in splits)
    assert {part.version for split in splits for part in split.parts} <= {
        hashlib.sha1(data).hexdigest() for data in FILES.values()
    }


@pytest.mark.parametrize(
    "uri", ["memory://none", "strange://x", "s3://nowhere/x", "hf://datasets/owner/missing", "http://127.0.0.1:9/x"]
)
def test_what_cannot_be_listed_is_refused_with_the_reason(s3, hub, uri):
    with pytest.raises(ConfigError, match="'web' is .* allowed is a file or folder that can be listed; "):
        plan_splits("web", uri, 1)


def test_a_hub_that_is_not_reached_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": "http://127.0.0.1:9", "token": False})
    with pytest.raises(ConfigError, match="hf://datasets/owner/name.*Connect"):
        plan_splits("web", "hf://datasets/owner/name", 1)
