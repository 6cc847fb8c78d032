"""The demo's text: bounded, the same every time, and instructions that the questions do not give away."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from danube_ray.config import ConfigError
from danube_ray.curate.sources import plan_splits
from danube_ray.demo.corpus import CorpusFacts, collect
from danube_ray.demo.docstrings import Symbol, read_module
from danube_ray.demo.instructions import instruction_sets

MAX_BYTES = 400_000

MODULE = '''"""A module.

    Indented prose that goes on for long enough to make a page of it, which takes two hundred characters in all.
"""

def greet(name: str, /, greeting="hello", *rest: int, **more) -> str:
    """Greet a person by name. Then leave."""

class Door:
    """A door that can be opened and closed."""

    def __init__(self, wide: bool = True): ...

    def open(self):
        """Open it."""

    @classmethod
    def _hidden(cls):
        """Hidden."""

class Room(Door):
    """A room -> with arrows."""

def _private():
    """Not for you, nor for anyone who reads this."""

def silent(): ...
'''


def rows_of(folder: Path) -> list[dict[str, str]]:
    files = sorted(folder.glob("*.jsonl.gz"))
    return [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, CorpusFacts]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, collect(folder, MAX_BYTES)


def test_sources_are_bounded_and_counted(corpus):
    folder, facts = corpus
    assert set(facts.source_bytes) == {"web", "docs", "stdlib"}
    for source, limit in (("web", MAX_BYTES), ("docs", MAX_BYTES // 2), ("stdlib", MAX_BYTES // 2)):
        rows = rows_of(folder / "sources" / source)
        assert facts.source_bytes[source] == sum(len(row["text"].encode(errors="replace")) for row in rows)
        assert 0.5 * limit < facts.source_bytes[source] <= limit
        prefix = "python:" if source == "stdlib" else "package:"
        assert all(row["url"].startswith(prefix) for row in rows)
        assert len({row["url"] for row in rows}) > 0.9 * len(rows)


def test_web_is_raw_and_the_others_are_clean(corpus):
    folder, _ = corpus
    web, docs = (rows_of(folder / "sources" / source) for source in ("web", "docs"))
    assert any("LICENSE" in row["url"] for row in web)
    assert any(row["url"].endswith("METADATA") for row in web)
    texts = [row["text"] for row in web]
    assert len(set(texts)) < len(texts)  # the same licence in several packages
    indented = [sum("\n    " in row["text"][:400] for row in rows) / len(rows) for rows in (web, docs)]
    assert indented[0] > indented[1]


def test_the_same_environment_gives_the_same_bytes(corpus, tmp_path):
    folder, facts = corpus
    (tmp_path / "sources" / "old").mkdir(parents=True)  # what an earlier run left is no part of this one
    assert collect(tmp_path, MAX_BYTES) == facts
    assert contents(tmp_path) == contents(folder)


def test_instruction_sets_are_short_and_about_other_names_than_the_questions(corpus):
    folder, facts = corpus
    conversations, pairs, questions = (
        read_rows(folder / f"{name}.jsonl") for name in ("instructions", "preferences", "questions")
    )
    assert (facts.instructions, facts.preferences, facts.questions) == tuple(
        map(len, (conversations, pairs, questions))
    )
    assert 1_500 <= len(conversations) <= 3_000
    assert 200 <= len(pairs) <= 400
    assert len(questions) == 100
    for row in conversations:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert 0 < len(assistant["content"]) < 200
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    assert len({row["answer"] for row in questions}) == 4

    taught = [turn["content"] for row in conversations for turn in row["messages"]]
    taught += [text for row in pairs for text in row.values()]
    words = {word.strip(".?") for text in taught for word in text.split()}
    for row in questions:
        name = row["question"].removeprefix("What does ").removesuffix(" do?")
        assert name not in words
        assert len(set(row["choices"])) == 4
        assert not set(row["choices"]) & set(taught)


def test_a_symbol_with_two_right_answers_is_left_out():
    symbols = [Symbol(f"m.f{i}", f"m.f{i}()", f"Does thing number {i}.") for i in range(200)]
    twins = [Symbol("m.twin", None, "Does the same."), Symbol("m.other_twin", None, "Does the same.")]
    sets = instruction_sets([*symbols, *twins, symbols[0]])
    assert instruction_sets(symbols[1:]) == sets
    assert instruction_sets(symbols[:0:-1]) == sets  # in any order


def test_a_module_is_read_without_importing_it(tmp_path):
    path = tmp_path / "house.py"
    path.write_text(MODULE + "\nraise SystemExit('imported')\n")
    found = read_module(path, "house")
    assert found.symbols == [
        Symbol("house.greet", "house.greet(name, /, greeting='hello', *rest, **more)", "Greet a person by name."),
        Symbol("house.Door", "house.Door(wide=True)", "A door that can be opened and closed."),
    ]
    assert dict(found.raw)["house"].startswith("A module.\n\n    Indented prose")
    assert "house._private" not in dict(found.raw)
    [(name, page)] = found.pages  # the class's own is too short for one
    assert name == "house"
    assert page.startswith("house\n\nA module.\n\nIndented prose")
    assert page.endswith(
        "\n\nhouse.greet(name, /, greeting='hello', *rest, **more)\n\nGreet a person by name. Then leave."
    )


def test_a_file_that_python_cannot_read_has_no_documentation(tmp_path):
    for content in (b"def broken(:", b"\0", b"# coding: nonsense\n", b"(" * 5_000):
        (tmp_path / "bad.py").write_bytes(content)
        assert read_module(tmp_path / "bad.py", "bad").raw == []


def test_text_of_the_users_own_becomes_sources(tmp_path):
    own = tmp_path / "My Texts"
    (own / "novels").mkdir(parents=True)
    (own / "novels" / "one.txt").write_text("A novel.")
    (own / "loose.jsonl").write_text('{"text": "A row."}\n')
    facts = collect(tmp_path / "out", MAX_BYTES, own)
    assert facts.source_bytes == {"My-Texts": 19, "novels": 8}
    assert facts.instructions > 0
    sources = {path.name: path for path in (tmp_path / "out" / "sources").iterdir()}
    assert {name: plan_splits(name, path, 1)[0].parts[0].file for name, path in sources.items()} == {
        "My-Texts": "loose.jsonl",
        "novels": "one.txt",
    }
    single = collect(tmp_path / "out", MAX_BYTES, own / "novels" / "one.txt")
    assert single.source_bytes == {"one": 8}
    assert own.is_dir()
    assert (own / "novels" / "one.txt").read_text() == "A novel."


def test_missing_and_empty_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        collect(tmp_path / "out", MAX_BYTES, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="at least one file"):
        collect(tmp_path / "out", MAX_BYTES, tmp_path / "empty")


def test_a_book_becomes_documents_cut_between_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {n} of the book. " + "It goes on for a while. " * 20 for n in range(60)]
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "novel.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "books" / "note.txt").write_text("A short note.")
    collect(tmp_path / "out", 10_000, text=tmp_path / "books")
    cut = tmp_path / "out" / "sources" / "books" / "novel.txt.jsonl"
    rows = [json.loads(line) for line in cut.read_text().splitlines()]
    assert len(rows) > 4 and rows[1]["url"].endswith("novel.txt#1")
    assert "\n\n".join(row["text"] for row in rows) == "\n\n".join(paragraphs)
    assert (tmp_path / "out" / "sources" / "books" / "note.txt").read_text() == "A short note."
