"""Where documents come from: the files of a source, cut into the splits that one task reads each."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from danube_ray.config import ConfigError, require, valid_name
from danube_ray.curate.readers.files import format_of
from danube_ray.curate.readers.parquet import row_groups
from danube_ray.curate.readers.streams import open_file
from danube_ray.curate.records import Part, Split

# What file systems call the value that changes with a file's content, the surest first.
VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "content_hash", "mtime", "LastModified", "last_modified", "updated")
FILES_AT_ONCE = 16  # of Parquet, whose row groups are listed: a store answers after some ten milliseconds


def plan_splits(source: str, path: str | Path, split_bytes: int) -> list[Split]:
    """Cut a source into splits of at least `split_bytes` where files and row groups are smaller, in name order.

    `path` is a file or a folder, of a disk or of anything fsspec opens (`s3://`, `gs://`, ...). The files of a
    Hugging Face dataset are `hf://datasets/OWNER/NAME`, with `@revision` behind it to stay with one. Hidden files are
    left out.

    Raises ConfigError for a path that does not exist, can't be reached or holds no file.
    """
    require(valid_name(source), "source", source, "letters, digits, '.', '_' and '-'")
    setting = f"path of source {source!r}"
    root, files = _remote_files(setting, str(path)) if "://" in str(path) else _local_files(setting, Path(path))
    require(bool(files), setting, str(path), "a folder with at least one file")

    splits, parts, total_bytes = [], [], 0
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        found = list(pool.map(partial(_parts, root), sorted(files, key=lambda file: file.file)))
    for part in chain.from_iterable(found):
        parts.append(part)
        total_bytes += part.bytes
        if total_bytes >= split_bytes:
            splits.append(Split(source, root, tuple(parts)))
            parts, total_bytes = [], 0
    if parts:
        splits.append(Split(source, root, tuple(parts)))
    return splits


def _local_files(setting: str, path: Path) -> tuple[str, list[Part]]:
    require(path.exists(), setting, str(path), "an existing file or folder")
    root = path if path.is_dir() else path.parent
    try:
        found = [(file.relative_to(root).as_posix(), file.stat()) for file in (_walk(path) if root == path else [path])]
    except OSError as error:
        remedy = f"{error.strerror}: mend or remove it"
        raise ConfigError(setting, str(error.filename), "a folder whose files can be read", remedy) from error
    files = [(name, facts) for name, facts in found if stat.S_ISREG(facts.st_mode)]
    return str(root.resolve()), [Part(name, facts.st_size, str(facts.st_mtime_ns)) for name, facts in files]


def _walk(folder: Path) -> Iterator[Path]:
    """What is in a folder but hidden, through links too; a folder that several lead to, or round in, comes once."""

    def fail(error: OSError) -> None:
        raise error

    seen: set[Path] = set()
    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        is_new = (place := Path(here).resolve()) not in seen
        seen.add(place)
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        yield from (Path(here, name) for name in files if is_new and not name.startswith("."))


def _remote_files(setting: str, uri: str) -> tuple[str, list[Part]]:
    """Raises ConfigError for whatever keeps a store from being listed: its package, the network, a key, the name."""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(uri)
        fs.invalidate_cache()
        path = path.rstrip("/")
        facts: dict[str, Any] = fs.info(path)
        single = facts["type"] == "file"
        found: dict[str, dict[str, Any]] = {path: facts} if single else fs.find(path, detail=True)
    except Exception as error:
        remedy = f"{type(error).__name__}: {error}"
        raise ConfigError(setting, uri, "a file or folder that can be listed", remedy) from error
    root = path.rpartition("/")[0] if single else path
    files = [
        Part(name.removeprefix(f"{root}/"), info["size"], _version(info))
        for name, info in found.items()
        if info["type"] == "file" and not name.endswith("/")  # what stands for a folder in a store's console
    ]
    shown = [file for file in files if not any(name.startswith(".") for name in PurePosixPath(file.file).parts)]
    return fs.unstrip_protocol(root), shown


def _version(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in VERSIONS if info.get(name)), "")


def _parts(root: str, file: Part) -> list[Part]:
    """A file, or the row groups of a Parquet file: one that can't be read is a part too, and reading says why."""
    groups: list[tuple[int, int]] = []
    if format_of(file.file) == ("parquet", None):
        with open_file(root, file.file) as opened:
            groups = row_groups(opened)
    return [Part(file.file, group_bytes, file.version, index) for index, group_bytes in groups] or [file]
