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
from danube_ray.report.page import write_report
from danube_ray.report.run import read_run
from tests.report.made_up_run import (
    RUN,
    SOURCES,
    train_row,
    write_demo,
    write_finetuning,
    write_gpu_run,
    write_pretraining,
)

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
        *("steps", "pretraining", "mixture", "machine", "curation", "posttraining"),
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
    event = {"time": 1.8e9, "step": 3, "event": attack, "detail": attack}
    append_json_lines(demo / "pretrain" / "events.jsonl", [event])
    texts = {"prompt": attack, "continuation": attack}
    append_json_lines(demo / "pretrain" / "samples.jsonl", [{"step": 20, "tokens": 1, **texts}])
    for name in ("metrics.jsonl", "config.json"):  # the stage's and a source's name
        path = demo / "pretrain" / name
        path.write_text(
            path.read_text().replace('"broad"', json.dumps(attack)).replace('"licences"', json.dumps(attack))
        )
    page = read_page(demo)
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in page.elements].count("script") == 6, "one a chart, and the page's own"
    assert page.text.count("<img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}") >= 17


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
    assert len(page.sections) == 10
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
    assert page.sections == ["pretraining", "mixture", "machine", "provenance"]
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


def test_the_mixture_lies_under_the_loss_as_the_stages_say(tmp_path: Path) -> None:
    """The areas are read back: each source's boxes are as high as its share, and end where its stage ends."""
    write_pretraining(tmp_path / "run")
    areas = read_page(tmp_path / "run").paths("area")
    ends = [1_000 * end / RUN.num_steps for end in RUN.stage_ends]
    for source, drawn in zip(SOURCES, areas, strict=True):
        boxes = [[tuple(map(float, at.split())) for at in re.split("[ML]", box)[1:]] for box in drawn.split("Z")[:-1]]
        shares = [stage.shares[source] / sum(stage.shares.values()) for stage in RUN.stages]
        assert [(box[0][1] - box[1][1]) / 1_000 for box in boxes] == pytest.approx(shares, abs=1e-3)
        assert [box[2][0] for box in boxes] == pytest.approx(ends, abs=3)


def test_a_run_in_progress_says_how_far_it_is_and_renews_itself(tmp_path: Path) -> None:
    write_gpu_run(tmp_path / "run", steps=40)
    page = read_page(tmp_path / "run")
    assert "25.0 % step 40 of 160" in page.text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "328k tokens so far of 1.31M, of 3 sources" in page.text
    (body,) = [attributes for tag, attributes in page.elements if tag == "body"]
    assert body["data-renew-s"] == "30"
    write_gpu_run(tmp_path / "whole", steps=RUN.num_steps)
    page = read_page(tmp_path / "whole")
    assert "of 160" not in page.text
    assert all("data-renew-s" not in attributes for _, attributes in page.elements)


def test_a_finetuning_run_in_progress_is_live_where_its_loop_says_so(tmp_path: Path) -> None:
    config = FinetuneConfig(name="mine", base="model", data="chat.jsonl")
    write_finetuning(tmp_path / "mine", config, 3.0, 2.0, 50)
    assert "data-renew-s" not in write_report(tmp_path / "mine").read_text()
    page = Page(write_report(tmp_path / "mine", live=True).read_text())
    assert "Running step 50 logged" in page.text


def test_what_a_run_on_gpus_measures_is_shown(tmp_path: Path) -> None:
    write_gpu_run(tmp_path / "run", steps=120)
    page = read_page(tmp_path / "run")
    assert page.sections == ["pretraining", "mixture", "machine", "events", "samples", "provenance"]
    expected = ["model-FLOPs utilisation", "waiting for the network", "0 50 GB memory", "gradient norm", "above bf16"]
    expected += ["stopped (1), rollback (1), skip (1)", "signal SIGTERM", "utilisation 5"]
    expected += ["after step 120 (983k tokens)", "provided that this notice is kept (120)", "step 20"]
    for shown in expected:
        assert shown in page.text, shown
    marks = [a for tag, a in page.elements if tag == "i" and (a.get("class") or "").startswith("mark")]
    assert len(marks) == 6, "three events in each of two charts"
    places = [float((mark["style"] or "").removeprefix("left:").removesuffix("%")) for mark in marks[:3]]
    assert places == pytest.approx([100 * 40 / 120, 100 * 61 / 120, 100 * 61 / 120], abs=0.1)
    assert [mark["class"] for mark in marks[:3]] == ["mark", "mark bad", "mark bad"]


def test_what_was_not_measured_has_no_panel(tmp_path: Path) -> None:
    write_pretraining(tmp_path / "run")
    page = read_page(tmp_path / "run")
    assert "waiting for data, share of time" in page.text
    assert not [word for word in ("utilisation", "network", "memory", "above bf16") if word in page.text]


def test_many_events_and_samples_leave_the_page_small(tmp_path: Path) -> None:
    write_gpu_run(tmp_path / "run", steps=120)
    event = {"time": 1.8e9, "step": 100, "event": "skip", "detail": "loss nan"}
    append_json_lines(tmp_path / "run" / "events.jsonl", [event] * 5_000)
    row = {"tokens": 1, "prompt": "p", "continuation": "c"}
    append_json_lines(tmp_path / "run" / "samples.jsonl", [{**row, "step": step} for step in range(200, 3_000)])
    page = read_page(tmp_path / "run")
    assert "skip (5,001)" in page.text and "The newest 50:" in page.text
    assert sum(tag == "tr" for tag, _ in page.elements) < 100
    assert page.text.count("step 2,") < 20
    assert (tmp_path / "run" / "report.html").stat().st_size < 200_000


@pytest.mark.slow
def test_a_browser_renews_the_page_where_its_reader_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.serve.browser import headless_chromium

    monkeypatch.setattr("danube_ray.report.page.RENEW_S", 1)
    write_gpu_run(tmp_path / "run", steps=40)
    path = write_report(tmp_path / "run")
    with headless_chromium() as browser:
        browser.driver.get(path.as_uri())
        browser.driver.execute_script("window.scrollTo(0, 700)")
        shutil.rmtree(tmp_path / "run")
        write_gpu_run(tmp_path / "run", steps=80)
        write_report(tmp_path / "run")
        browser.wait(lambda: "step 80 of 160" in browser.text(".status")[0])
        assert browser.driver.execute_script("return window.scrollY") == 700
        assert browser.complaints() == []


def test_a_search_alone_is_a_page(demo: Path) -> None:
    page = read_page(demo / "search")
    assert "A search of 4 trials." in page.text and "best validation loss" in page.text
    assert page.sections == ["search"]


def test_a_page_without_figures_has_no_empty_row_of_them(demo: Path) -> None:
    write_json(
        demo / "search" / "trials.json", [{"config": {"learning_rate": 0.1}, "loss": None, "error": "out of memory"}]
    )
    text = write_report(demo / "search").read_text()
    assert '<dl class="tiles">' not in text and 'title="out of memory"' in text
