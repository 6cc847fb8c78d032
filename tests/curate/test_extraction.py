"""Extraction: the article of a page and nothing else, whatever its bytes are."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile

import pytest

from danube_ray.config import Extraction
from danube_ray.curate import extraction
from danube_ray.curate.extraction import decode_page, extract
from danube_ray.curate.records import Unusable
from tests.curate.reading import page

BOTH: list[Extraction] = ["trafilatura", "resiliparse"]
SENTENCE = "The sea was calm that morning, and nobody in the harbour expected the ship to return so early."


@pytest.mark.parametrize("how", BOTH)
def test_the_article_is_kept_and_its_frame_is_not(how):
    text = extract(page(SENTENCE), how)
    assert text is not None and SENTENCE in text
    assert "contact" not in text and "All rights reserved" not in text


@pytest.mark.parametrize("how", BOTH)
def test_paragraphs_are_lines_of_their_own(how):
    paragraphs = [f"{SENTENCE} It was day {number}." for number in range(5)]
    html = page("</p><p>".join(paragraphs))
    lines = (extract(html, how) or "").splitlines()
    assert all(paragraph in lines for paragraph in paragraphs)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("html", [b"", b"<html></html>", b"<html><body><script>var x = 1;</script></body></html>"])
def test_a_page_without_text_is_none(how, html):
    assert extract(html, how) is None


@pytest.mark.parametrize("how", BOTH)
def test_a_text_does_not_depend_on_the_pages_before(how):
    html = page(f"{SENTENCE} {SENTENCE} Nothing else happened.")
    assert len({extract(html, how) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("data", "charset", "text"),
    [
        ("Zürich".encode(), None, "Zürich"),
        ("Zürich".encode(), "iso-8859-1", "Zürich"),  # valid UTF-8 is never Latin-1 by chance
        ("\ufeffZürich".encode(), None, "Zürich"),
        ("Zürich".encode("utf-16"), None, "Zürich"),
        ("Zürich“".encode("cp1252"), "ISO-8859-1", "Zürich“"),  # as browsers read it
        ('<meta charset="windows-1251">Привет'.encode("cp1251"), None, '<meta charset="windows-1251">Привет'),
        ("Привет".encode("koi8-r"), "koi8-r", "Привет"),
        ("こんにちは".encode("shift_jis"), "Shift_JIS", "こんにちは"),
        ("こんにちは".encode("iso2022_jp"), "iso-2022-jp", "こんにちは"),
        ("Zürich".encode("cp1252"), "no such charset", "Zürich"),
        ("Zürich".encode("cp1252"), "unicode_escape", "Zürich"),
    ],
)
def test_characters_are_read_as_declared_unless_they_are_utf_8(data, charset, text):
    assert decode_page(data, charset) == text


def test_bytes_that_fit_no_charset_are_replaced():
    assert "caf" in decode_page(b'<meta charset="utf-8">caf\xe9 \x81\x8d\xff')


@pytest.mark.parametrize("how", BOTH)
def test_a_page_that_would_take_minutes_is_refused_by_what_it_holds(how):
    crowd = b"<html><body>" + b"<div>text <p>para</p> tail</div>" * 50_000
    with pytest.raises(Unusable, match="too many tags"):
        extract(crowd, how)
    swarm = b"<html><body " + b" ".join(b"a%d=1" % number for number in range(50_000)) + b">text</body></html>"
    with pytest.raises(Unusable, match="too many attributes"):
        extract(swarm, how)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize(
    "html",
    [
        b"<html><body>" + b"<div>" * 3_000 + b"deep",
        b"<html><body>" + b"<table><tr><td>" * 1_000 + b"deep",
        b"<html><body><p>" + b"word " * 500_000,
        b"<" * 40_000,
        b"<html><body><p>&#0;&#xD800;&#x110000;&#xFFFF;text and more text, as a page has it.</p></body></html>",
        b"<html><!-- " + b"-" * 10**6,
        b'<?xml version="1.0" encoding="utf-16"?><html><body><p>text</p></body></html>',
        bytes(range(1, 256)) * 1_000,
    ],
    ids=["nested", "tables", "long", "brackets", "references", "comment", "wrong encoding", "any bytes"],
)
def test_no_page_is_more_than_unusable(how, html):
    try:
        text = extract(html, how)
    except Unusable:
        return
    assert text is None or text.encode()


@pytest.mark.parametrize("error", [ValueError("from a library"), RecursionError()])
def test_what_a_library_raises_makes_a_page_unusable(monkeypatch, error):
    def fails(page: str) -> str:
        raise error

    monkeypatch.setattr(extraction, "_trafilatura", fails)
    with pytest.raises(Unusable, match="extraction failed"):
        extract(page(SENTENCE), "trafilatura")


def test_the_seed_of_hashing_does_not_change_a_text(shared_data):
    """Nor what was extracted before: each process takes the pages in another order."""
    script = """
import hashlib, sys, tarfile
from danube_ray.curate.extraction import extract
with tarfile.open(sys.argv[1]) as archive:
    pages = [archive.extractfile(m).read() for m, _ in zip((m for m in archive if m.isreg()), range(25))]
if sys.argv[2] == "1":
    pages.reverse()
texts = sorted(extract(page, "trafilatura") or "" for page in pages)
print(hashlib.sha256("".join(texts).encode()).hexdigest(), sum(map(bool, texts)))
"""
    archive = shared_data / "web" / "html_trafilatura" / "html.tar.xz"
    command = [sys.executable, "-c", script, str(archive)]
    outputs = {
        subprocess.run(
            [*command, seed], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and int(outputs.pop().split()[1]) > 20


def test_real_pages_give_what_their_authors_wrote(shared_data):
    wanted = {"cache/dw.com.uncork.html": "wine", "cache/laviedesidees.fr.evaluation.html": "évaluation"}
    with tarfile.open(shared_data / "web" / "html_trafilatura" / "html.tar.xz") as archive:
        for member in archive:
            word = wanted.pop(member.name.removeprefix("tests/"), None)
            if word is not None:
                file = archive.extractfile(member)
                assert file is not None
                html = file.read()
                precise, fast = (extract(html, how) or "" for how in BOTH)
                assert word in precise and word in fast and len(precise) > 1_000
            if not wanted:
                return
    raise AssertionError(f"not in the archive: {wanted}")
