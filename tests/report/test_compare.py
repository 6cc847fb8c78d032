"""Two runs side by side: what differs, and losses at the same tokens, however long each run and its log are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from danube_ray.artifacts import ArtifactError, write_json
from danube_ray.cli import main
from danube_ray.report.compare import compare, write_comparison
from tests.report.made_up_run import SOURCES, write_demo, write_gpu_run, write_pretraining
from tests.report.test_page import Page


def change(run: Path, worse: float = 0.0, every: int = 1, **settings: Any) -> Path:
    """Raise a run's losses by `worse`, keep every so manieth row of its log, and change settings."""
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        row["loss"] += worse
        if "by_source" in row:
            row["by_source"] = {source: loss + worse for source, loss in row["by_source"].items()}
    kept = [row for row in rows if row["kind"] == "validation" or row["step"] % every == 0]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in kept))
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", {**config, **settings})
    return run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("first", "second"):
        write_gpu_run(tmp_path / name, 160)
    return tmp_path / "first", change(tmp_path / "second", worse=0.03, max_epochs=2.0, name="other")


def test_settings_losses_and_speed_of_two_runs(runs: tuple[Path, Path]) -> None:
    comparison = compare(*runs)
    assert comparison.names == ("first", "second")
    assert comparison.settings == [("max_epochs", "4", "2")]
    assert len(comparison.losses()) == 8 and comparison.losses()[-1][0] == 160 * 8_192
    assert [second - first for _, first, second in comparison.losses()] == pytest.approx([0.03] * 8)
    assert [source for source, _, _ in comparison.validation] == ["all", *SOURCES]
    assert [second - first for _, first, second in comparison.validation if first and second] == pytest.approx(
        [0.03] * 4
    )
    assert [label for label, _, _ in comparison.speed] == [
        *("tokens/s", "utilisation", "memory", "waiting for data", "waiting for the network", "a step"),
    ]
    assert comparison.speed[2] == ("memory", "66.8 GB", "66.8 GB")


def test_a_run_beside_itself_differs_in_nothing(runs: tuple[Path, Path]) -> None:
    comparison = compare(runs[0], runs[0])
    assert comparison.settings == [] and comparison.names[0] != comparison.names[1]
    assert all(first == second for _, first, second in comparison.losses())


def test_a_shorter_run_that_logs_less_often_is_compared_at_the_same_tokens(tmp_path: Path) -> None:
    """Both logs are of one run, so they agree up to what the sparser one leaves out; its end is no exception."""
    write_pretraining(tmp_path / "long")
    write_pretraining(tmp_path / "short", steps=100)
    comparison = compare(tmp_path / "long", change(tmp_path / "short", every=4))
    assert comparison.common == (4 * 8_192, 100 * 8_192)
    assert all(abs(first - second) < 0.12 for _, first, second in comparison.losses()[1:])
    assert comparison.validated_tokens == (100 * 8_192, 100 * 8_192)


def test_the_page_holds_both_curves_and_their_difference(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The difference is read back from the page: a level line above zero."""
    page = Page(write_comparison(compare(*runs), tmp_path / "out" / "compare.html").read_text())
    assert page.sections == ["losses", "validation", "speed", "settings"]
    assert "first and second" in page.text and "max_epochs 4 2" in page.text and "+0.0300" in page.text
    (track,), (zero,) = page.paths("track"), page.paths("reference")
    heights, (level, _) = ([float(at.split()[1]) for at in re.split("[ML]", line)[1:]] for line in (track, zero))
    assert max(heights) - min(heights) < 1 and max(heights) < level
    assert len(page.paths("smooth")) == 2 and len(page.paths("dots")) == 2 * len(SOURCES)
    text = (tmp_path / "out" / "compare.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text) and "default-src 'none'" in text


def test_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pretraining(tmp_path / name / "pretrain")
    assert compare(tmp_path / "a" / "pretrain", tmp_path / "b" / "pretrain").names == ("a/pretrain", "b/pretrain")
    write_demo(tmp_path / "demo")
    assert compare(tmp_path / "demo", tmp_path / "demo" / "pretrain").losses()[-1][0] == 160 * 8_192


def test_runs_that_share_no_tokens_are_one_clear_error(tmp_path: Path) -> None:
    for name in ("long", "short"):
        write_pretraining(tmp_path / name, steps=40)
    change(tmp_path / "long", every=30)
    (tmp_path / "short" / "metrics.jsonl").write_text(
        (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()[0] + "\n"
    )
    with pytest.raises(ArtifactError, match="no number of tokens in common"):
        compare(tmp_path / "long", tmp_path / "short")


def test_the_verb_prints_and_writes_the_page(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", *map(str, runs), "--out", str(tmp_path / "compare.html")])
    said = " ".join(capsys.readouterr().out.split())
    assert "max_epochs 4 2" in said and "+0.0300" in said and "docstrings" in said and "66.8 GB" in said
    assert (tmp_path / "compare.html").is_file()


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_a_run_is_one_error(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(runs[0]), str(tmp_path / name)])
    assert name in capsys.readouterr().err
