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


def test_a_commit_lists_every_file_but_hidden_ones_and_itself(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "manifest.json").write_text("a manifest of a part is a file like any other")
    (tmp_path / "a.bin").write_bytes(b"12345")
    (tmp_path / ".a.bin.tmp").write_bytes(b"a temporary that a crash left")
    artifacts.commit(tmp_path)
    manifest = artifacts.commit(tmp_path, tokens=7)
    assert manifest["files"].keys() == {"a.bin", "deep/manifest.json"}
    assert manifest["files"]["a.bin"]["bytes"] == 5
    assert manifest["tokens"] == 7


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
