"""`danube inspect`: what it finds is what the tables hold, and what they don't hold is one clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro

from danube_ray.artifacts import ArtifactError
from danube_ray.cli.console import registry
from danube_ray.cli.inspect import inspect
from danube_ray.config import ConfigError
from danube_ray.report import lookup
from danube_ray.report.curated import FOLDERS, read_curated
from danube_ray.report.lookup import Wanted, find
from tests.report.made_up_curation import ATTACK, SOURCES, write_curation

Show = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_curation(tmp_path_factory.mktemp("curation") / "documents")


@pytest.fixture
def show(folder: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    """What the verb prints, white space put together."""

    def run(*options: str, where: Path = folder) -> str:
        with registry:
            tyro.cli(inspect, args=[str(where), *options], prog="danube inspect")
        return " ".join(capsys.readouterr().out.split())

    return run


def rows(folder: Path, table: str) -> list[dict]:
    """A table as it lies in the files, in the order in which they are looked through."""
    files = [path for source in SOURCES for path in sorted((folder / table / source).glob("*.parquet"))]
    return pa.concat_tables([pq.read_table(path) for path in files]).to_pylist()


def test_without_options_it_gives_an_overview(show: Show) -> None:
    said = show().replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "web 1,558 703 45.1 % 839 16 1.58 MB" in said
    assert "max_curly_brackets at most 0 164 7.5 % 3.6 % 1.0 % 22.5 %" in said
    assert said.index("language") < said.index("min_words") < said.index("near_duplicate")


def test_a_run_is_inspected_by_its_documents(folder: Path, show: Show) -> None:
    assert show(where=folder.parent) == show()


def test_documents_of_a_reason_come_with_what_broke_it(folder: Path, show: Show) -> None:
    said = show("--reason", "min_words", "--count", "3")
    expected = [row for row in rows(folder, "dropped") if row["reason"] == "min_words"][:3]
    places = [said.index(row["id"]) for row in expected]
    assert places == sorted(places) and said.count("dropped min_words: words") == 3
    for row in expected:
        assert f"words {row['signal_words']:.0f}, at least 50 is kept" in said and row["url"] in said
    assert "--count shows more than 3" in said
    assert said == show("--reason", "min_words", "--count", "3")


@pytest.mark.parametrize(
    ("table", "wanted", "source", "holds"),
    [
        ("kept", Wanted(), None, lambda row: True),
        ("kept", Wanted(), "wiki", lambda row: row["source"] == "wiki"),
        ("kept", Wanted(min_quality=0.9), None, lambda row: row["quality"] >= 0.9),
        ("kept", Wanted(max_quality=0.6, contains="RIVER had"), None,
         lambda row: row["quality"] <= 0.6 and "river had" in row["text"].lower()),
        ("dropped", Wanted(language="ja"), None, lambda row: row["language"] == "ja"),
        ("dropped", Wanted(reason="near_duplicate"), "books", lambda row: (row["reason"], row["source"]) ==
         ("near_duplicate", "books")),
        ("quarantine", Wanted(reason="not text", contains="raw"), "web",
         lambda row: row["reason"] == "not text" and "raw" in row["sample"]),
    ],
)  # fmt: skip
def test_filters_find_exactly_what_is_there(folder, table, wanted, source, holds) -> None:
    expected = [row for row in rows(folder, FOLDERS[table]) if holds(row)]
    assert expected, "the made-up folder holds some"
    curated = read_curated(folder)
    assert find(curated, table, wanted, source, 10_000) == expected
    assert find(curated, table, wanted, source, 2) == expected[:2]


def test_files_are_looked_through_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curated = read_curated(folder)
    whole = find(curated, "dropped", Wanted(reason="duplicate"), None, 10_000)
    monkeypatch.setattr(lookup, "FILES_AT_ONCE", 1)
    assert find(curated, "dropped", Wanted(reason="duplicate"), None, 10_000) == whole and len(whole) == 52


def test_texts_are_read_only_where_a_row_is_wanted(tmp_path: Path) -> None:
    """The texts of every file without such a row are spoilt, and nobody notices until one of them is asked for."""
    curated = read_curated(write_curation(tmp_path / "documents"))
    whole = find(curated, "dropped", Wanted(reason="blocked_url"), None, 10_000)
    for source in ("wiki", "academic", "books"):
        for path in curated.files("dropped", source):
            text = pq.read_metadata(path).row_group(0).column(1)
            assert text.path_in_schema == "text"
            with path.open("r+b") as file:
                file.seek(text.dictionary_page_offset or text.data_page_offset)
                file.write(bytes(text.total_compressed_size))
    assert find(curated, "dropped", Wanted(reason="blocked_url"), None, 10_000) == whole
    with pytest.raises(OSError):
        find(curated, "dropped", Wanted(reason="min_words"), "wiki", 1)


def test_one_document_tells_what_became_of_it(folder: Path, show: Show) -> None:
    repeat = next(row for row in rows(folder, "dropped") if row["reason"] == "near_duplicate")
    said = show("--id", repeat["id"])
    assert f"dropped near_duplicate of {repeat['duplicate_of']}: similarity {repeat['similarity']:.3f}"[:-1] in said
    assert "kept in its place: kept quality" in said and said.count(repeat["duplicate_of"]) == 2
    said = show("--id", repeat["duplicate_of"][:16])
    assert said.startswith("kept quality") and "dropped as duplicates of it: dropped near_duplicate of" in said
    assert repeat["id"] in said


def test_whole_texts_and_every_signal_are_shown_when_asked(folder: Path, show: Show) -> None:
    longest = max(rows(folder, "documents"), key=lambda row: len(row["text"]))
    words = " ".join(longest["text"].split())
    assert words not in show("--id", longest["id"])
    said = show("--id", longest["id"], "--full")
    assert words in said and "duplicate 7gram chars 0.05" in said


def test_what_a_document_says_does_not_steer_the_terminal(show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    said = show("--contains", "taken over", "--full")
    assert "<script>document.title = 'taken over'</script>" in said and "\u202e" not in said
    assert ATTACK not in said
    assert "\x1f" not in show("--table", "quarantine", "--source", "web")


def test_a_search_that_finds_nothing_says_so(show: Show) -> None:
    assert "no such document in kept" in show("--contains", "no text says this")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--reason", "min_wrods"], "allowed is one of blocked_url, language, min_words, "),
        (
            ["--reason", "min_words", "--table", "quarantine"],
            "one of bad WARC record, not JSON, not text, truncated gzip",
        ),
        (["--reason", "min_words", "--table", "kept"], "kept documents have none"),
        (["--source", "wikis"], "one of web, wiki, academic, books"),
        (["--language", "xx"], "one of en, de, ja"),
        (["--table", "quarantine", "--min-quality", "0.5"], "what is unreadable has none"),
        (["--count", "0"], "--count is 0"),
        (["--id", "3f", "--reason", "min_words"], "alone, or with --source"),
    ],
)
def test_what_the_folder_does_not_have_is_one_clear_error(show: Show, options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        show(*options)


def test_scores_are_refused_where_there_are_none(tmp_path: Path, show: Show) -> None:
    unscored = write_curation(tmp_path / "documents", scored=False)
    with pytest.raises(ConfigError, match="were not scored"):
        show("--max-quality", "0.3", where=unscored)
    assert "kept words" in show("--table", "kept", where=unscored)


def test_an_unknown_id_or_folder_is_one_clear_error(show: Show, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="of source 'wiki' in .* has an id that begins with 'zz'"):
        show("--id", "zz", "--source", "wiki")
    with pytest.raises(ArtifactError, match="holds no finished curation"):
        show(where=tmp_path)
