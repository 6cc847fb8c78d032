"""The progress bar's words, read from the end of a file that somebody else is writing."""

from __future__ import annotations

from pathlib import Path

from danube_ray.artifacts import append_json_lines
from danube_ray.train.metrics import METRICS
from danube_ray.train.progress import TAIL_BYTES, describe, newest_step

ROW = {"kind": "train", "step": 1, "stage": "broad", "loss": 2.5, "tokens_per_s": 45_123.4}


def test_the_newest_whole_training_row_is_found(tmp_path: Path) -> None:
    metrics = tmp_path / METRICS
    assert newest_step(metrics) is None
    append_json_lines(metrics, [{**ROW, "step": step} for step in range(1, 1_000)])
    append_json_lines(metrics, [{"kind": "validation", "step": 999, "loss": 2.4}])
    with metrics.open("a") as file:
        file.write('{"kind": "train", "step": 1000, "lo')
    assert metrics.stat().st_size > 2 * TAIL_BYTES
    row = newest_step(metrics)
    assert row is not None and row["step"] == 999


def test_a_row_in_words() -> None:
    assert describe(ROW) == "broad loss 2.500 · 45,123 tokens/s"
    assert describe({**ROW, "mfu": 0.5123}) == "broad loss 2.500 · 45,123 tokens/s · 51.2% MFU"
