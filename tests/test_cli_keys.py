"""`danube keys`: a key for whoever asks, its hash for the server."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from danube_ray.cli import main
from danube_ray.serve.keys import Keys


def test_the_key_is_printed_once_and_its_hash_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "keys"
    main(["keys", "alice", "--file", str(file), "--requests-per-minute", "60", "--concurrent-requests", "4"])
    printed = capsys.readouterr()
    (secret,) = printed.out.split()  # what $(danube keys alice) is
    assert secret not in printed.err and secret not in file.read_text()
    main(["keys", "bob", "--file", str(file)])
    found = Keys(file, None).find(secret.encode())
    assert found and (found.name, found.requests_per_minute, found.concurrent_requests) == ("alice", 60, 4)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(file.read_text().splitlines()) == 2


def test_without_a_file_the_line_to_keep_is_shown(capsys: pytest.CaptureFixture[str]):
    main(["keys", "ci"])
    printed = capsys.readouterr()
    line = f"ci {hashlib.sha256(printed.out.strip().encode()).hexdigest()}"
    assert line in printed.err.splitlines() and "DANUBE_API_KEYS" in printed.err
    assert Keys(None, line).find(printed.out.strip().encode())


@pytest.mark.parametrize("options", [["a b"], ["alice"], ["bob", "--requests-per-minute", "0"]])
def test_a_mistake_is_one_line_and_changes_nothing(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "keys"
    main(["keys", "alice", "--file", str(file)])
    before = file.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["keys", *options, "--file", str(file)])
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == "" and len(printed.err.splitlines()) == 1
    assert file.read_text() == before
