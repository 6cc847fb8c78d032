from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

import pytest

from danube_ray.config import ConfigError
from danube_ray.serve.keys import Key, Keys, append, make_key, parse

HASH, OTHER = "a" * 64, "b" * 64


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_key_opens_and_its_hash_does_not(tmp_path: Path):
    secret, key = make_key("alice")
    append(tmp_path / "keys", key)
    keys = Keys(tmp_path / "keys", None)
    assert keys.find(secret.encode()) == key
    for wrong in (key.sha256, secret[:-1], secret + "x", secret.upper(), "", "alice", "ü"):
        assert keys.find(wrong.encode()) is None
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in (tmp_path / "keys").read_text()


def test_no_two_keys_are_alike():
    secrets = {make_key("alice")[0] for _ in range(100)}
    assert len(secrets) == 100 and {len(secret) for secret in secrets} == {len("sk-danube-") + 43}  # 256 bits, base64


def test_lines_comments_and_limits_of_a_file():
    text = f"""
    # keys of the team, made in May
    alice {HASH}
      bob\t{OTHER}  concurrent_requests=2 requests_per_minute=60  # nightly
    """
    alice, bob = parse(text, "keys")
    assert alice == Key(name="alice", sha256=HASH)
    assert bob == Key(name="bob", sha256=OTHER, requests_per_minute=60, concurrent_requests=2)
    assert parse(f"{alice.line}\n{bob.line}", "again") == [alice, bob]


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "sk-danube-J8s7dlQhTdZ1vbyTcXo",
        "alice sk-danube-J8s7dlQhTdZ1vbyTcXo",
        f"alice {HASH[:-1]}",
        f"alice {HASH.upper()}",
        f"a/b {HASH}",
        f"alice {HASH} fast",
        f"alice {HASH} requests_per_minute",
        f"alice {HASH} requests_per_minute=",
        f"alice {HASH} requests_per_minute=0",
        f"alice {HASH} requests_per_minute=-3",
        f"alice {HASH} requests_per_minute=1.5",
        f"alice {HASH} requests_per_minute=²",
        f"alice {HASH} requests_per_minute=1 requests_per_minute=2",
        f"alice {HASH} requests_a_minute=5",
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_not_quoted(line: str):
    with pytest.raises(ConfigError, match="'keys.txt, line 3'") as caught:
        parse(f"# team\nzoe {OTHER}\n{line}\n", "keys.txt")
    assert "J8s7" not in str(caught.value), "a key in the place of its hash would stand in a log now"


@pytest.mark.parametrize("second", [f"alice {OTHER}", f"bob {HASH}"])
def test_a_name_or_a_key_comes_once(second: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="once"):
        parse(f"alice {HASH}\n{second}", "keys")
    (tmp_path / "keys").write_text(f"alice {HASH}")
    with pytest.raises(ConfigError, match="once"):
        Keys(tmp_path / "keys", second)


def test_keys_of_the_environment_come_on_top(tmp_path: Path):
    (secret, key), (other, second), (third, in_file) = (make_key(name) for name in ("ci", "laptop", "alice"))
    append(tmp_path / "keys", in_file)
    keys = Keys(tmp_path / "keys", f"{key.line}, {second.line} ")
    assert [keys.find(one.encode()) for one in (secret, other, third)] == [key, second, in_file]
    in_lines = Keys(None, f"# build, test\n{key.line}\n{second.line}  # mine, at home\n")
    assert in_lines.find(secret.encode()) == key and in_lines.find(other.encode()) == second


def test_what_was_given_must_hold_a_key(tmp_path: Path):
    (tmp_path / "empty").write_text("# later\n")
    with pytest.raises(ConfigError, match="a file with keys"):
        Keys(tmp_path / "empty", None)
    with pytest.raises(ConfigError, match="danube keys NAME"):
        Keys(tmp_path / "nowhere", None)
    with pytest.raises(ConfigError, match="DANUBE_API_KEYS"):
        Keys(None, "")
    assert not Keys(None, None).required


def test_a_changed_file_counts_a_second_later(tmp_path: Path):
    file, clock = tmp_path / "keys", Clock()
    (first, alice), (second, bob) = make_key("alice"), make_key("bob")
    append(file, alice)
    keys = Keys(file, None, clock)
    append(file, bob)
    clock.now_s += 0.9
    assert keys.find(second.encode()) is None
    clock.now_s += 0.1
    assert keys.find(second.encode()) == bob
    file.write_text("")  # every key taken away: nobody comes in, which is not the same as everybody
    clock.now_s += 1
    assert keys.required and keys.find(first.encode()) is None is keys.find(second.encode())


@pytest.mark.parametrize("broken", [b"alice", b"\xff\xfe", None])
def test_a_broken_new_file_leaves_the_keys_as_they_are(
    broken: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file, clock = tmp_path / "keys", Clock()
    secret, key = make_key("alice")
    append(file, key)
    keys = Keys(file, None, clock)
    file.unlink() if broken is None else file.write_bytes(broken)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            clock.now_s += 1
            assert keys.find(secret.encode()) == key
    assert len(caplog.records) == 1 and "stay as they were" in caplog.text
    file.write_text(make_key("bob")[1].line)  # and mended again
    clock.now_s += 1
    assert keys.find(secret.encode()) is None


def test_a_file_is_its_owners_alone_and_is_added_to(tmp_path: Path):
    file = tmp_path / "keys"
    before = os.umask(0)
    try:
        append(file, make_key("alice")[1])
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text(file.read_text().rstrip("\n") + "  # no newline at the end")
    append(file, make_key("bob")[1])
    assert [key.name for key in parse(file.read_text(), "keys")] == ["alice", "bob"]
    before_text = file.read_text()
    with pytest.raises(ConfigError, match="alice"):
        append(file, make_key("alice")[1])
    assert file.read_text() == before_text


@pytest.mark.parametrize("name", ["", "a b", "a/b", "#", "a,b", ".hidden"])
def test_a_name_that_no_line_could_hold(name: str):
    with pytest.raises(ConfigError, match="name"):
        make_key(name)
