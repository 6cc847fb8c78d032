"""The report: written from real artifact formats, complete, self-contained, safe against what the artifacts say."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from danube_ray.artifacts import ArtifactError, append_json_lines, write_json
from danube_ray.config import FinetuneConfig, LoopConfig
from danube_ray.report import write_report
from danube_ray.report.run import read_run
from tests.report.made_up_run import RUN, SOURCES, train_row, write_demo, write_finetuning, write_pretraining

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write_demo(tmp_path / "demo")


class Page(HTMLParser):
    """What a browser would make of the page: its text and its elements, each closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(word for word in self.words if word))

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]

    def paths(self, kind: str) -> list[str]:
        return [a["d"] or "" for tag, a in self.elements if tag == "path" and a["class"] == kind]


def read_page(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


def test_every_artifact_is_shown(demo: Path) -> None:
    page = read_page(demo)
    assert page.sections == [
        *("steps", "pretraining", "mixture", "curation", "posttraining"),
        *("evaluation", "quantization", "search", "samples", "provenance"),
    ]
    expected = ["1.31M tokens", "43.3", "Figure 1.", "Figure 2.", "done before", "Direct preference optimisation"]
    expected += [
        "few_stop_words",
        "10⁻⁵",
        "96.58",
        "0.438",
        "29.14",
        "failed",
        "os.path.join",
        "4f0c2a9b",
        "1.43 epochs",
    ]
    for shown in expected:
        assert shown in page.text, shown


def test_the_page_asks_nothing_of_the_network(demo: Path) -> None:
    page = read_page(demo)
    links = [a.get("href") or a.get("src") or "" for _, a in page.elements if a.get("href") or a.get("src")]
    assert len(links) > 10
    for link in links:
        assert link.startswith(("#", "data:")) or (demo / link).exists(), link
    text = (demo / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_what_artifacts_say_is_text_and_never_markup(demo: Path) -> None:
    attack = "</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
    steps = [{"name": "a", "title": attack, "seconds": 1, "skipped": False, "facts": {attack: attack}, "path": attack}]
    write_json(demo / "steps.json", steps)
    write_json(demo / "samples.json", [{"prompt": attack, "answer": attack, "model": attack}])
    write_json(demo / "evaluation" / "results.json", [{"task": attack, "metric": attack, "value": 0.5}])
    write_json(demo / "search" / "trials.json", [{"config": {attack: attack}, "loss": 1.0}])
    for name in ("metrics.jsonl", "config.json"):  # the stage's and a source's name
        path = demo / "pretrain" / name
        path.write_text(
            path.read_text().replace('"broad"', json.dumps(attack)).replace('"licences"', json.dumps(attack))
        )
    page = read_page(demo)
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in page.elements].count("script") == 4, "one a chart, and the page's own"
    assert page.text.count("<img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}") >= 12


@pytest.mark.parametrize(
    ("part", "section"),
    [
        ("steps.json", "steps"),
        ("documents", "curation"),
        ("evaluation", "evaluation"),
        ("gguf", "quantization"),
        ("search", "search"),
        ("samples.json", "samples"),
    ],
)
def test_a_missing_part_is_left_out(demo: Path, part: str, section: str) -> None:
    path = demo / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read_page(demo)
    assert section not in page.sections
    assert len(page.sections) == 9
    assert f"#{section}" not in [attributes.get("href") for _, attributes in page.elements]


def test_perplexity_by_source_is_shown_as_results(demo: Path) -> None:
    by_source = {"docstrings": {"value": 31.25, "error": 0.52, "tokens": 4_096}}
    write_json(demo / "evaluation" / "perplexity.json", by_source)
    page = read_page(demo)
    assert "docstrings perplexity 31.25 0.52 4,096" in page.text
    assert "unigram" not in page.text


def test_a_plain_training_run_has_a_report(tmp_path: Path) -> None:
    write_pretraining(tmp_path / "danube")
    page = read_page(tmp_path / "danube")
    assert page.sections == ["pretraining", "mixture", "provenance"]
    assert "trained on 1.31M tokens of 3 sources in 3 stages" in page.text


def test_a_plain_finetuning_run_has_a_report(tmp_path: Path) -> None:
    config = FinetuneConfig(name="mine", base="model", data="chat.jsonl", loop=LoopConfig(num_workers=2))
    write_finetuning(tmp_path / "mine", config, 3.0, 2.0, 50)
    page = read_page(tmp_path / "mine")
    assert page.sections == ["posttraining", "provenance"]
    assert "chat.jsonl" in page.text


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_a_folder_without_artifacts_is_one_clear_error(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text("nothing")
    with pytest.raises(ArtifactError, match="holds nothing to report"):
        write_report(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        write_report(tmp_path / "absent")
    assert not (tmp_path / "report.html").exists()


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    write_pretraining(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    replayed = [{**row, "loss": 9.25} for row in rows if row["kind"] == "train" and 50 <= row["step"] < 60]
    append_json_lines(metrics, replayed)
    training = read_run(tmp_path / "run").pretraining
    assert training is not None
    assert [row["step"] for row in training.train] == list(range(1, RUN.num_steps + 1))
    assert [row["loss"] for row in training.train[49:59]] == [9.25] * 10
    assert training.train[60]["loss"] != 9.25


def test_a_loss_that_is_not_finite_does_not_break_the_chart(tmp_path: Path) -> None:
    write_pretraining(tmp_path / "run")
    diverged = [train_row(161, math.nan, 1e-4), train_row(162, math.inf, 1e-4)]
    append_json_lines(tmp_path / "run" / "metrics.jsonl", diverged)
    page = read_page(tmp_path / "run")
    assert all("nan" not in path and "inf" not in path for _, a in page.elements if (path := a.get("d")))


def test_a_run_of_one_step_has_a_report(tmp_path: Path) -> None:
    write_pretraining(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    assert "pretraining" in read_page(tmp_path / "run").sections


def test_the_loss_curve_lies_where_the_numbers_are(tmp_path: Path) -> None:
    """The chart is read back: the dots of a source's validation are at their tokens, in proportion to their losses."""
    write_pretraining(tmp_path / "run")
    page = read_page(tmp_path / "run")
    training = read_run(tmp_path / "run").pretraining
    assert training is not None
    for source, drawn in zip(SOURCES, page.paths("dots"), strict=True):
        places = [tuple(map(float, place.split())) for place in re.findall(r"M([\d.]+ [\d.-]+)h0", drawn)]
        tokens = [row["tokens"] for row in training.validation]
        losses = [row["by_source"][source] for row in training.validation]
        assert [x for x, _ in places] == pytest.approx(
            [1_000 * t / training.train[-1]["tokens"] for t in tokens], abs=0.1
        )
        slopes = [(places[i][1] - places[i + 1][1]) / (losses[i] - losses[i + 1]) for i in range(len(places) - 1)]
        assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=0.05)
        assert slopes[0] < 0, "a higher loss lies higher up"
