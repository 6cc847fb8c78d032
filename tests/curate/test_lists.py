"""Lists: what they block, what looks alike and stays, and what files are refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from danube_ray.config import ConfigError
from danube_ray.curate.lists import UrlList, WordList
from danube_ray.curate.words import tokenize


def url_list(folder: Path, *entries: str) -> UrlList:
    (folder / "urls.txt").write_text("\n".join(entries))
    return UrlList.load([folder / "urls.txt"])


def found(folder: Path, text: str, *entries: str) -> list[str]:
    (folder / "words.txt").write_text("\n".join(entries))
    return WordList.load([folder / "words.txt"]).found(tokenize(text))


HOSTS = (
    "bad.com # as a comment says",
    "WWW.Worse.org",
    "# nothing.net",
    "münchen.de",
    "xxx",
    "198.51.100.7",
    "[2001:db8::1]",
    "*.ads.io",
)


@pytest.mark.parametrize(
    "url",
    [
        "http://bad.com",
        "https://bad.com/",
        "HTTPS://Sub.Bad.COM:8443/page?x=1#top",
        "http://user:good.com@bad.com./a",
        "//bad.com/a",
        "https://worse.org/a",
        "https://www.worse.org",
        "https://deep.sub.worse.org/a",
        "https://xn--mnchen-3ya.de/a",
        "https://www.MÜNCHEN.de",
        "http://any.site.xxx/",
        "http://198.51.100.7:80/a",
        "http://[2001:DB8::1]/a",
        "https://x.ads.io",
    ],
)
def test_hosts_block_themselves_and_what_is_below(tmp_path, url):
    assert url_list(tmp_path, *HOSTS).blocks(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://good.com/bad.com",
        "http://notbad.com",
        "http://bad.com.good.net",
        "http://bad.community",
        "http://good.com/?next=http://bad.com",
        "http://bad.com@good.com/",
        "http://nothing.net",
        "http://xxx.com",
        "web/bad.com/page.html",
        "bad.com/pages.jsonl#12",
        "/data/bad.com.warc.gz#1024",
        "s3://bad.com/file.parquet#7",
        "",
        "http://",
        "http://[bad.com",
        "http://" + "a." * 1000 + "bad.com",
        "http://\ud800.com/\udfff",
    ],
)
def test_other_hosts_and_places_without_one_pass(tmp_path, url):
    assert not url_list(tmp_path, *HOSTS).blocks(url)


def test_an_address_blocks_itself_and_what_is_below(tmp_path):
    urls = url_list(tmp_path, "http://forum.com/adult/", "site.org/user?id=7", "site.org/~jane")
    blocked = ["https://www.forum.com/adult", "http://forum.com/adult/a/b?c", "http://site.org/user?id=7#a"]
    blocked += ["https://site.org/~jane/cv.html"]
    assert all(map(urls.blocks, blocked))
    passed = ["http://forum.com/", "http://forum.com/adults", "http://a.forum.com/adult", "http://forum.com/x/adult"]
    passed += [
        "http://site.org/user?id=77",
        "http://site.org/user",
        "http://site.org/~janet",
        "http://site.org" + "/" * 10**6,
    ]
    assert not any(map(urls.blocks, passed))


def test_files_add_up_and_may_be_packed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a.com\r\n\r\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("".join(f"site{number}.com\n" for number in range(1000)))
    urls = UrlList.load([tmp_path / "a.txt", tmp_path / "b.txt.gz"])
    assert len(urls.hashes) == 1001
    assert urls.blocks("http://a.com") and urls.blocks("http://site999.com") and not urls.blocks("http://site1000.com")


@pytest.mark.parametrize("content", ["", "\n \n", "# only a comment\n", None])
@pytest.mark.parametrize("kind", [UrlList, WordList])
def test_missing_and_empty_files_are_refused(tmp_path, kind, content):
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ConfigError, match=r"blocked_.*list\.txt"):
        kind.load([tmp_path / "list.txt"])


def test_a_hosts_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 bad\.com"):
        url_list(tmp_path, "0.0.0.0 bad.com")


ENTRIES = ("Casino", "straße", "slot machine", "hot-dog stand", "f*ck", "🖕", "won't", "can")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The CASINO's doors", ["casino"]),
        ("casino_royale, casinos, occasino", []),
        ("In der STRASSE", ["strasse"]),
        ("a Slot\n machine!", ["slot machine"]),
        ("slot-machine", ["slot machine"]),
        ("slot. Machine", []),
        ("slot machines, aslot machine", []),
        ("two hot-dog  stands", []),
        ("two Hot-Dog  stand", ["hot-dog stand"]),
        ("what the F*CK", ["f*ck"]),
        ("f*cks", []),
        ("so 🖕", ["🖕"]),
        ("they won\u2019t", ["won't"]),
        ("they want", []),
        ("can't", ["can"]),
        ("cannot", []),
        ("casino slot machine", ["casino", "slot machine"]),
        ("", []),
    ],
)
def test_words_and_phrases_are_found_whole(tmp_path, text, expected):
    assert found(tmp_path, text, *ENTRIES) == expected
