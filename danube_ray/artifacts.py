"""Folders that are either complete or not there: hashes, atomic writes, manifests written last, steps done once.

Every stage of the pipeline leaves a folder whose `manifest.json` is its commit: it names each file with its SHA-256 and
the settings that made it. A folder without one is torn and is made again; one whose inputs changed is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class ArtifactError(RuntimeError):
    """A folder that is missing, torn or not what it says it is."""


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of key order."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def first_difference(before: Any, now: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first field, dotted, in which two JSON-able values differ, with both its values; None when they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:  # in the order written: causes before what follows from them
            difference = first_difference(before.get(name), now.get(name), f"{field}.{name}" if field else str(name))
            if difference is not None:
                return difference
        return None
    if isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(before) == len(now):
        items = ((str(index), was, is_now) for index, (was, is_now) in enumerate(zip(before, now, strict=True)))
        found = (first_difference(was, is_now, f"{field}.{index}") for index, was, is_now in items)
        return next((difference for difference in found if difference is not None), None)
    return None if before == now else (field, before, now)


def leaves(values: Mapping[Any, Any], joint: str = ".") -> Iterator[tuple[str, Any]]:
    """What nested dictionaries and lists hold, by the path there: `model.num_layers`, `stages.0.tokens`."""
    for name, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(inner, dict):
            yield from ((f"{name}{joint}{below}", leaf) for below, leaf in leaves(inner, joint))
        else:
            yield str(name), value


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes files private to their owner; artifacts are shared
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; `ArtifactError` names the file when it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from None


def commit(folder: Path, hashes: Mapping[str, str] | None = None, **facts: Any) -> dict[str, Any]:
    """Write the folder's manifest, last: every file under it with size and hash, and `facts`.

    `hashes` are those that are known already, by path in the folder: where many machines wrote it, one need not read it
    all again.
    """
    files, hashes = {}, hashes or {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder) != Path(MANIFEST) and not path.name.startswith("."):
            path.chmod(path.stat().st_mode | 0o444)  # safetensors writes private files; artifacts are shared
            name = str(path.relative_to(folder))
            files[name] = {"bytes": path.stat().st_size, "sha256": hashes.get(name) or file_hash(path)}
    manifest = {**facts, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder; `ArtifactError` when there is none."""
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is missing or was not finished")
    return read_json(folder / MANIFEST)


def damage(folder: Path, *, touched_only: bool = False) -> str | None:
    """Why a folder can't be trusted (no manifest, a file missing or changed), or None when every hash matches.

    `touched_only`: of files that the file system calls unchanged since the manifest was written, the size is enough.
    It notes each change's time by itself, and a copy is a change; what a disk loses in silence only reading shows.
    """
    try:
        files = read_manifest(folder)["files"]
    except (ArtifactError, KeyError) as error:
        return str(error)
    committed_ns = (folder / MANIFEST).stat().st_mtime_ns
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        facts = path.stat()
        is_trusted = touched_only and facts.st_ctime_ns < committed_ns
        if facts.st_size != expected["bytes"] or not (is_trusted or file_hash(path) == expected["sha256"]):
            return f"{path} is not the file that the manifest names"
    return None


def finished(folder: Path, inputs: Any) -> bool:
    """Whether `folder` was completed from exactly these inputs."""
    manifest = folder / MANIFEST
    return manifest.is_file() and read_json(manifest).get("inputs") == content_hash(inputs)


def intact(folder: Path, inputs: Any) -> bool:
    """Whether `folder` was completed from exactly these inputs, and nothing in it was touched since."""
    return finished(folder, inputs) and damage(folder, touched_only=True) is None


def complete_once(folder: Path, inputs: Any, make: Callable[[Path], dict[str, Any] | None]) -> bool:
    """Run `make(folder)` unless the folder is already complete from the same `inputs`; True when it ran.

    `make` fills the folder and returns facts for its manifest. A folder left torn, or made from other inputs, is
    removed first, so half-written work never counts. `ArtifactError` for a folder that was not made here.
    """
    if finished(folder, inputs):
        return False
    torn = folder.parent / f".{folder.name}.unfinished"  # lies beside it while what is in the folder is nobody's loss
    if not torn.exists():
        require_replaceable(folder, "inputs")
    folder.parent.mkdir(parents=True, exist_ok=True)
    torn.touch()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    facts = make(folder) or {}
    commit(folder, inputs=content_hash(inputs), **facts)
    torn.unlink()
    return True


def work_folder(out: Path, doing: str, inputs: str) -> Path:
    """The hidden folder beside `out` for work in progress from exactly these inputs (their hash).

    A job killed and started again finds its work there; what other inputs left there is removed.
    """
    work = out.parent / f".{out.name}.{doing}-{inputs[:16]}"
    for stale in out.parent.glob(f".{out.name}.{doing}-*"):
        if stale != work:
            shutil.rmtree(stale)
    return work


def publish(made: Path, out: Path) -> None:
    """Put a committed folder in the place of `out`: whoever looks, or dies, in between finds one of them, or none.

    What was there is removed last; until then it stands beside `made`, where the next `work_folder` would remove it.
    """
    replaced = made.with_name(f"{made.name}-replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def require_replaceable(out: Path, mark: str) -> None:
    """Raise `ArtifactError` unless `out` is new, empty, or an earlier result whose manifest carries the fact `mark`.

    Documents, tokens and quality models, which take long to make, carry a version: nothing else takes their place.
    """
    facts = read_manifest(out).keys() if (out / MANIFEST).is_file() else set()
    ours = mark in facts and not any(fact.endswith("_version") and fact != mark for fact in facts)
    if not (ours or not out.exists() or (out.is_dir() and not any(out.iterdir()))):
        raise ArtifactError(f"{out} holds something else, which would be lost: choose another folder, or remove it")


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise `ArtifactError` unless the disk that `folder` is (or will be) on has `needed_bytes` free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ArtifactError(
            f"the disk of {folder} has {free_bytes / 2**30:.1f} GiB free, "
            f"{purpose} takes {needed_bytes / 2**30:.1f} GiB: make room, or choose a folder on another disk"
        )


def append_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSON-lines file, one write for all of them; a line torn by a crash before stays by itself."""
    lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read() == b"\n" else f"\n{lines}"
        file.write(lines.encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a torn line (a crash while writing) is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def provenance() -> dict[str, Any]:
    """What made a result: git revision (when there is one), Python and the versions of the packages that matter."""
    import platform
    from importlib import metadata

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    packages = ("danube-ray", "torch", "ray", "transformers", "peft", "sentencepiece", "gguf", "xllamacpp", "lm_eval")
    return {
        "git_revision": git.strip() or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: version(package) for package in packages},
    }
