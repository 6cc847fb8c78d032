"""Folders are complete or not there: torn work is redone, changed inputs are redone, damage is found."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from danube_ray import artifacts
from danube_ray.artifacts import ArtifactError


class Maker:
    """Counts how often it ran; fills a folder with one file in a subfolder."""

    def __init__(self, text: str = "content") -> None:
        self.text, self.runs = text, 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.runs += 1
        assert list(folder.iterdir()) == []  # nothing of an earlier attempt is left
        (folder / "part").mkdir()
        (folder / "part" / "data.txt").write_text(self.text)
        return {"count": self.runs}


def test_a_finished_step_is_skipped_and_a_changed_one_redone(tmp_path: Path):
    folder, make = tmp_path / "step", Maker()
    assert artifacts.complete_once(folder, {"size": 1}, make)
    assert not artifacts.complete_once(folder, {"size": 1}, make)
    assert artifacts.complete_once(folder, {"size": 2}, make)
    assert make.runs == 2
    assert artifacts.read_manifest(folder)["count"] == 2
    assert not artifacts.finished(folder, {"size": 1})


def test_a_torn_folder_is_redone(tmp_path: Path):
    folder = tmp_path / "step"

    def die(target: Path) -> dict[str, Any]:
        (target / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.complete_once(folder, "inputs", die)
    assert (folder / "half.txt").exists()
    assert artifacts.damage(folder) == f"{folder} has no manifest.json: it is missing or was not finished"
    make = Maker()
    assert artifacts.complete_once(folder, "inputs", make)
    assert not (folder / "half.txt").exists()
    assert artifacts.damage(folder) is None


@pytest.mark.parametrize("manifest", [None, "{}", '{"inputs": "x", "tokens_version": 1}'])
def test_what_was_made_elsewhere_is_not_removed(tmp_path: Path, manifest: str | None):
    (tmp_path / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    make = Maker()
    with pytest.raises(artifacts.ArtifactError, match="holds something else, which would be lost"):
        artifacts.complete_once(tmp_path, "inputs", make)
    assert (tmp_path / "thesis.tex").exists() and not make.runs


def test_damage_names_the_file(tmp_path: Path):
    folder = tmp_path / "step"
    artifacts.complete_once(folder, "inputs", Maker("abc"))
    path = folder / "part" / "data.txt"
    path.write_text("abd")  # as long as before: only the hash tells
    assert artifacts.damage(folder) == f"{path} is not the file that the manifest names"
    path.unlink()
    assert artifacts.damage(folder) == f"{path} is missing"
    (folder / "manifest.json").write_text('{"count": 1')
    assert "is not valid JSON" in str(artifacts.damage(folder))
    (folder / "manifest.json").write_text("{}")
    assert artifacts.damage(folder) is not None


def test_a_result_that_is_replaced_is_whole_until_another_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, seen = tmp_path / "out", list[bool]()

    def make(inputs: int) -> Path:
        work = artifacts.work_folder(out, "making", artifacts.content_hash(inputs))
        artifacts.complete_once(work, inputs, Maker(f"made of {inputs}"))
        return work

    def die(folder: Path, ignore_errors: bool) -> None:
        if folder.exists():
            (folder / "manifest.json").unlink()  # what a removal may begin with
            seen.append(not out.exists() or artifacts.intact(out, 1) or artifacts.intact(out, 2))
            raise KeyboardInterrupt

    artifacts.publish(make(1), out)
    work = make(2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifacts.shutil, "rmtree", die)
        artifacts.publish(work, out)
    assert seen == [True]
    artifacts.publish(make(3), out)
    assert artifacts.intact(out, 3) and list(tmp_path.iterdir()) == [out]


def test_only_what_was_touched_since_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "step"
    artifacts.complete_once(folder, "inputs", Maker("abc"))
    path, manifest = folder / "part" / "data.txt", folder / "manifest.json"
    facts = path.stat()
    os.utime(
        manifest, ns=(facts.st_ctime_ns, facts.st_ctime_ns + 1)
    )  # a file system's clock may be as coarse as a test
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "file_hash", None)
        assert artifacts.intact(folder, "inputs") and not artifacts.intact(folder, "others")
    path.write_text("abd")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # whoever edits can't set the time of the change itself
    assert artifacts.damage(folder, touched_only=True) == f"{path} is not the file that the manifest names"
    path.write_text("abc")
    assert artifacts.intact(folder, "inputs")
    path.write_text("abcd")
    assert not artifacts.intact(folder, "inputs")


def test_a_commit_takes_hashes_that_are_known(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for name in ("a/one", "two"):
        (tmp_path / name).write_text(name)
    files = artifacts.commit(tmp_path, {"a/one": "known", "absent": "unused"})["files"]
    assert files["a/one"]["sha256"] == "known"
    assert files["two"]["sha256"] == artifacts.file_hash(tmp_path / "two") and len(files) == 2


def test_a_commit_lists_every_file_but_hidden_ones_and_itself(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "manifest.json").write_text("a manifest of a part is a file like any other")
    (tmp_path / "a.bin").write_bytes(b"12345")
    (tmp_path / "a.bin").chmod(0o600)
    (tmp_path / ".a.bin.tmp").write_bytes(b"a temporary that a crash left")
    artifacts.commit(tmp_path)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o644, "others may read it"
    manifest = artifacts.commit(tmp_path, tokens=7)
    assert manifest["files"].keys() == {"a.bin", "deep/manifest.json"}
    assert manifest["files"]["a.bin"]["bytes"] == 5
    assert manifest["tokens"] == 7


def test_work_of_other_inputs_is_removed_and_its_own_is_found_again(tmp_path: Path):
    work = artifacts.work_folder(tmp_path / "out", "curating", "a" * 64)
    work.mkdir()
    (tmp_path / ".out.judging-aaaa").mkdir()
    assert artifacts.work_folder(tmp_path / "out", "curating", "a" * 64) == work and work.is_dir()
    other = artifacts.work_folder(tmp_path / "out", "curating", "b" * 64)
    assert other.parent == tmp_path and other != work and not work.exists()
    assert (tmp_path / ".out.judging-aaaa").is_dir()


def test_only_nothing_or_an_earlier_result_is_replaced(tmp_path: Path):
    out = tmp_path / "out"
    artifacts.require_replaceable(out, "mark")
    out.mkdir()
    artifacts.require_replaceable(out, "mark")
    artifacts.commit(out, mark=1)
    artifacts.require_replaceable(out, "mark")
    with pytest.raises(ArtifactError, match="out holds something else, which would be lost"):
        artifacts.require_replaceable(out, "other")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file holds something else"):
        artifacts.require_replaceable(tmp_path / "file", "mark")


def test_a_disk_that_is_too_small_is_named_with_what_is_needed(tmp_path: Path):
    artifacts.require_space(tmp_path / "new" / "folder", 1, "this")
    with pytest.raises(ArtifactError, match=r"new has \d+\.\d GiB free, a library takes 1073741824\.0 GiB: make room"):
        artifacts.require_space(tmp_path / "new", 2**60, "a library")


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.txt"
    artifacts.write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        artifacts.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]  # noqa: PTH208  (hidden files too)


def test_an_atomic_write_makes_folders_and_a_readable_file(tmp_path: Path):
    path = tmp_path / "new" / "file.bin"
    artifacts.write_atomically(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_json_that_is_missing_or_torn_names_its_file(tmp_path: Path):
    path = tmp_path / "facts.json"
    with pytest.raises(ArtifactError, match=r"facts\.json does not exist"):
        artifacts.read_json(path)
    artifacts.write_json(path, {"path": tmp_path})
    assert artifacts.read_json(path) == {"path": str(tmp_path)}
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"facts\.json is not valid JSON"):
        artifacts.read_json(path)


def test_the_content_hash_ignores_key_order_alone():
    assert artifacts.content_hash({"a": 1, "b": [2, 3]}) == artifacts.content_hash({"b": [2, 3], "a": 1})
    assert artifacts.content_hash({"a": [2, 3]}) != artifacts.content_hash({"a": [3, 2]})
    assert artifacts.content_hash({"a": 1}) != artifacts.content_hash({"a": "1"})


def test_json_lines_survive_a_torn_end(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert artifacts.read_json_lines(path) == []
    artifacts.append_json_lines(path, [{"step": 1}, {"step": 2}])
    artifacts.append_json_lines(path, [{"step": 3}])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in artifacts.read_json_lines(path)] == [1, 2, 3]
    artifacts.append_json_lines(path, [{"step": 5}])  # what was written after the crash is not lost with it
    assert [row["step"] for row in artifacts.read_json_lines(path)] == [1, 2, 3, 5]


def test_provenance_names_versions_and_is_json():
    facts = json.loads(json.dumps(artifacts.provenance()))
    assert facts["versions"]["torch"]
    assert facts["python"].startswith("3.")


def test_leaves_are_named_by_their_path():
    assert dict(artifacts.leaves({"a": 1, "b": {"c": [2, {"d": "x"}]}, "e": []})) == {
        "a": 1,
        "b.c.0": 2,
        "b.c.1.d": "x",
    }
