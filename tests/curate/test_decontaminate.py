"""Decontamination: planted evaluation items are found, whole or nearly, and nothing else of real documents is."""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danube_ray.config import ConfigError
from danube_ray.curate.benchmarks import read_questions
from danube_ray.curate.decontaminate import MAX_SHARING_ITEMS, BenchmarkIndex, Match
from danube_ray.curate.words import tokenize
from tests.curate.real_texts import abstracts, articles, novel_pages, web_pages
from tests.curate.test_heuristics import PROSE

LAKE = (
    "Every morning the keeper of Lake Orta counts 23 herons and 4 swans, and each swan eats 3 fish. How many is that?"
)
BOAT = "A boat crosses 12 miles of open water in 3 hours; what is its mean speed in knots if there is no wind?"
SHORT = "Which lake is deepest of all?"
TINY = "Is it cold?"


def index_of(folder: Path, **benchmarks: list[str]) -> BenchmarkIndex:
    paths = {name: folder / f"{name}.jsonl" for name in benchmarks}
    for name, questions in benchmarks.items():
        paths[name].write_text("".join(json.dumps({"id": 1, "question": question}) + "\n" for question in questions))
    return BenchmarkIndex.build(paths)


def found(index: BenchmarkIndex, text: str) -> list[tuple[str, int]]:
    return [(match.benchmark, match.item) for match in index.matches(tokenize(text))]


@pytest.fixture
def index(tmp_path) -> BenchmarkIndex:
    return index_of(tmp_path, math=[BOAT, LAKE], trivia=[TINY, SHORT, SHORT.upper(), LAKE])


@pytest.mark.parametrize(
    "copy",
    [LAKE, LAKE.upper(), re.sub(r"[.,?]", " -- ", LAKE), LAKE.replace(" ", "\n"), LAKE.replace("23", "24"), LAKE[:-30]],
)
def test_a_copy_is_found_in_every_benchmark_that_has_it(index, copy):
    assert found(index, f"{PROSE}\n{copy}\n{PROSE}") == [("math", 1), ("trivia", 3)]


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "",
        LAKE[:55],
        " ".join(reversed(LAKE.split())),
        re.sub(r"(\w+ \w+ \w+ \w+ \w+ \w+) ", r"\1 and ", LAKE),
        TINY,
        SHORT.replace("deepest", "the deepest"),
        "Which lake is deepest of",
    ],
)
def test_parts_and_what_is_alike_are_not(index, text):
    assert found(index, text) == []


def test_a_short_item_is_found_whole(index):
    assert index.matches(tokenize(f'{PROSE} "WHICH lake is deepest -- of all"')) == [Match("trivia", 1, 1.0)]


def test_what_is_too_short_or_repeated_is_left_out_and_counted(index):
    assert index.left_out == {"math": 0, "trivia": 2}
    assert list(zip(index.benchmarks, index.numbers, strict=True)) == [
        ("math", 0),
        ("math", 1),
        ("trivia", 1),
        ("trivia", 3),
    ]


def test_coverage_is_the_share_of_words_in_common_ngrams(index):
    half = " ".join(LAKE.split()[:12])  # of 23 words
    match = index.matches(tokenize(half))[0]
    assert match.coverage == 12 / 23
    assert not index.matches(tokenize(" ".join(LAKE.split()[:11])))


def test_the_matched_pair_can_be_looked_at(index):
    words = tokenize(f"{PROSE} {BOAT.upper()} {PROSE} A boat crosses 12 miles of open water in silence.")
    match = index.matches(words)[0]
    assert index.item_text(match.benchmark, match.item) == BOAT
    assert index.evidence(words, match) == BOAT.upper().rstrip("?")


def test_equal_hashes_are_not_enough(index, monkeypatch):
    """Where hashes collide, the words decide."""
    words = tokenize(LAKE)
    monkeypatch.setitem(words.__dict__, "text", BOAT.replace("boat", "ship").replace("hours", "days"))
    assert index.matches(words) == []


def test_how_questions_are_asked_does_not_count(tmp_path):
    asked = "Please read what follows with care and then choose the one correct answer to the question: {} Answer: "
    questions = [" ".join(lines.split()[:9]) for lines in (PROSE + BOAT + LAKE).split("\n")]
    assert len(questions) > MAX_SHARING_ITEMS
    index = index_of(tmp_path, wrapped=[asked.format(question) for question in questions])
    assert found(index, asked.format("what?") * 3) == []
    assert found(index, f"{asked.format(questions[3])}") == [("wrapped", 3)]
    assert index.left_out == {"wrapped": 0}


def test_saved_and_loaded_it_is_the_same(index, tmp_path):
    index.save(tmp_path / "index.safetensors")
    loaded = BenchmarkIndex.load(tmp_path / "index.safetensors")
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "index.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    words = tokenize(f"{LAKE} {SHORT} {BOAT}")
    assert loaded.matches(words) == index.matches(words) != []
    assert loaded.left_out == index.left_out
    assert [loaded.item_text("trivia", number) for number in (1, 3)] == [SHORT, LAKE]


def test_a_benchmark_of_tiny_items_finds_nothing(tmp_path):
    index = index_of(tmp_path, tiny=[TINY])
    assert index.matches(tokenize(TINY)) == []
    assert index.left_out == {"tiny": 1}


def test_rows_of_many_forms(tmp_path):
    rows = [
        {"Question": "a"},
        {"question": {"stem": "b", "choices": []}},
        {"turns": ["c", "d"]},
        {"doc": {"goal": "e", "sol1": "no"}, "id": 7},
        {"instruction": "f", "input": "g"},
        {"question": "", "prompt": "h"},
        {"name": "nothing to ask"},
    ]
    expected = ["a", "b", "c", "d", "e", "f\ng", "h"]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a2.json").write_bytes(b'\xef\xbb\xbf{"question": "rows of a line"}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    with (tmp_path / "c.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["id", "sentence"], ["1", "i, j"], ["2", ""]])
    (tmp_path / "d.csv").write_text('Category,Question\nx,"k\nl"\n')
    pq.write_table(pa.table({"question": ["m"], "answer": ["no"]}), tmp_path / "e.parquet")
    (tmp_path / "README.md").write_text("no benchmark")
    (tmp_path / "folder.json").mkdir()
    assert list(read_questions(tmp_path / "a.json")) == expected
    assert list(read_questions(tmp_path)) == [*expected, "rows of a line", *expected, "i, j", "k\nl", "m"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b'{"answer": "x"}'),
        ("a.jsonl", b'{"question": "what is it?"}\n{"question"'),
        ("a.jsonl", b"[" * 100_000),
        ("a.jsonl", b'{"question": ' + b"1" * 5_000 + b"}"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "what is it?"}', mtime=0)[:-4]),
        ("a.json", b"[{"),
        ("a.json", b"[" * 100_000),
        ("a.csv", b'question,answer\n"what is it?",it,and more\n'),
        ("a.csv", None),
        ("a.parquet", b"PAR1 torn PAR1"),
        ("a.txt", b"what?"),
        ("", b""),
    ],
)
def test_files_without_questions_are_refused(tmp_path, name, content):
    if content is not None and name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"CurationConfig\.benchmarks"):
        BenchmarkIndex.build({"math": tmp_path / name})


def test_planted_questions_and_nothing_else_of_5000_documents(shared_data):
    sets = shared_data / "eval"
    benchmarks = {"gsm8k": sets / "gsm8k/test.jsonl", "arc": sets / "llm_adapters/ARC-Easy/test.json"}
    index = BenchmarkIndex.build(benchmarks | {"truthfulqa": sets / "truthfulqa", "mt_bench": sets / "mt_bench"})
    questions = list(read_questions(benchmarks["gsm8k"]))
    documents = [*articles(shared_data)[:1000], *abstracts(shared_data, 2000), *islice(novel_pages(shared_data), 1200)]
    documents += [text for _, text in web_pages(shared_data)[:800]]
    assert len(documents) == 5000

    rng = random.Random(0)
    planted = dict(zip(rng.sample(range(5000), 200), rng.sample(range(len(questions)), 200), strict=True))
    disguises = (str, str.upper, lambda text: re.sub(r"[.,?!$]", " ", text.replace("'", "\u2019")), str.split)
    for number, (place, item) in enumerate(planted.items()):
        disguised = disguises[number % 4](questions[item])
        text, middle = documents[place], len(documents[place]) // 2
        if isinstance(disguised, list):  # two thirds of it
            disguised = " ".join(disguised[: -(len(disguised) // 3)])
        documents[place] = f"{text[:middle]} {disguised} {text[middle:]}"

    assert {place: matches for place, text in enumerate(documents) if (matches := found(index, text))} == {
        place: [("gsm8k", item)] for place, item in planted.items()
    }
