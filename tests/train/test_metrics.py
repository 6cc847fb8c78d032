"""A run's log: files that resume without a repeated step, the same numbers in TensorBoard, and where time went."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from danube_ray.artifacts import read_json_lines
from danube_ray.presets import PRESETS
from danube_ray.train import metrics
from danube_ray.train.metrics import METRICS, SAMPLES, MetricsLog, StepClock, bf16_peak_flops, mean_loss

SAMPLE = {"prompt": "The Danube", "continuation": " flows\nfar"}


def log_steps(folder: Path, start: int, end: int, loss: float = 1.0, **settings: Any) -> None:
    """Rows of steps start + 1 to end, with validation and a sample every fifth."""
    with MetricsLog(folder, start, **settings) as log:
        for step in range(start + 1, end + 1):
            log.write(
                "train",
                {"step": step, "tokens": 10 * step, "stage": "only", "loss": loss / step, "learning_rate": 1e-3},
            )
            if step % 5 == 0:
                log.write("validation", {"step": step, "loss": loss, "by_source": {"web": 2.5, "wiki": 1.5}})
                log.write_samples({"step": step, "tokens": 10 * step}, [SAMPLE])


def test_a_resumed_log_has_every_step_once(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 12)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "train", "step": 13, "lo')  # killed while writing
    log_steps(tmp_path, 8, 15, loss=2.0)
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 16))
    assert [row["loss"] for row in rows if row["kind"] == "validation"] == [1.0, 2.0, 2.0]
    assert [row["step"] for row in read_json_lines(tmp_path / SAMPLES)] == [5, 10, 15]


def shown(folder: Path, tag: str) -> list[tuple[int, Any]]:
    """Steps and values of a tag, as TensorBoard itself reads them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]


def test_tensorboard_has_the_same_numbers_and_texts_once(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 12)
    log_steps(tmp_path, 8, 15, loss=2.0)
    losses = [(step, pytest.approx((1.0 if step <= 8 else 2.0) / step)) for step in range(1, 16)]
    assert shown(tmp_path, "train/loss") == losses
    assert shown(tmp_path, "validation/by_source/wiki") == [(5, 1.5), (10, 1.5), (15, 1.5)]
    texts = shown(tmp_path, "samples/0/text_summary")
    assert [step for step, _ in texts] == [5, 10, 15]
    assert texts[0][1].decode().split() == ["The", "Danube", "|", "flows", "far"]
    for tag in ("train/step", "train/stage"):
        with pytest.raises(KeyError):
            shown(tmp_path, tag)


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 5)
    (tmp_path / "config.json").write_text("{torn")
    with MetricsLog(tmp_path, 5) as log, pytest.warns(UserWarning, match="report.html was not written"):
        log.write_report()


def test_the_report_follows_the_run_at_little_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come every 10 s and a page takes 0.5 s: one is written at once, then one in 250 s, and one at the end."""
    now, pages = [0.0], list[tuple[float, bool]]()

    def write_page(folder: Path, live: bool) -> None:
        pages.append((now[0], live))
        now[0] += 0.5

    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics, "write_report", write_page)
    with MetricsLog(tmp_path, 0) as log:
        for step in range(1, 60):
            log.write("train", {"step": step, "loss": 1.0})
            now[0] += 10
        log.write_report(finished=True)
    assert [round(at) for at, _ in pages] == [0, 250, 501, 592]
    assert [live for _, live in pages] == [True, True, True, False]


def test_the_page_is_there_from_the_first_row_on(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 1)
    assert "data-renew-s" in (tmp_path / "report.html").read_text()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is set."""
    moment = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: moment[0])
    return moment


def test_time_is_told_apart_by_what_it_went_to(now: list[float]) -> None:
    clock = StepClock(torch.device("cpu"), num_devices=2)
    for _ in range(4):
        now[0] += 0.5
        clock.add(waited_s=0.1, communicated_s=0.05)
    with clock.paused():
        now[0] += 1_000
    facts = clock.read(tokens=2_000, flops=1e12)
    memory = facts.pop("memory_bytes")
    assert facts == pytest.approx(
        {"tokens_per_s": 1_000, "step_s": 0.5, "data_wait_share": 0.2, "communication_share": 0.1}
    )
    assert 50e6 < memory < 64e9, "a process with torch in it"
    now[0] += 2
    clock.add(waited_s=0.0)
    facts = clock.read(tokens=100, flops=1e12)
    assert facts["tokens_per_s"] == 50 and facts["data_wait_share"] == 0
    assert not facts.keys() & {"communication_share", "mfu"}, "nothing measured one, no peak is known for the other"


def test_utilisation_is_what_the_danube_report_reached(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """292.7k tokens/s at 2,048 on 8 H100s are 41.6 % of their bf16 peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(metrics, "memory_bytes", lambda device: 0)
    clock = StepClock(torch.device("cuda"), num_devices=8)
    now[0] += 10
    tokens = 2_927_000
    facts = clock.read(tokens, tokens * PRESETS["danube_1_8b"]().model.flops_per_token(2_048))
    assert facts["mfu"] == pytest.approx(0.416, abs=5e-4)
    now[0] += 10
    assert "mfu" not in clock.read(tokens), "a task without a formula"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", math.nan),
    ],
)
def test_peaks_go_by_the_devices_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert bf16_peak_flops(torch.device("cuda")) == pytest.approx(peak, nan_ok=True)
    assert math.isnan(bf16_peak_flops(torch.device("cpu")))


@pytest.mark.gpu
def test_utilisation_and_memory_of_a_real_gpu() -> None:
    """A large matrix product in bf16 runs at a good part of the peak, and never above it."""
    device, side, repeats = torch.device("cuda"), 8_192, 20
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize()
    clock = StepClock(device)
    for _ in range(repeats):
        matrix @ matrix
    torch.cuda.synchronize()
    facts = clock.read(tokens=0, flops=2 * side**3 * repeats)
    if math.isfinite(clock.peak_flops):
        assert 0.3 < facts["mfu"] < 1
    assert facts["memory_bytes"] >= 2 * matrix.nbytes
    assert clock.read(tokens=0)["memory_bytes"] < facts["memory_bytes"], "the product is gone since"


def test_the_mean_loss_weighs_units_not_sources() -> None:
    assert mean_loss({"web": (30.0, 10.0), "wiki": (2.0, 2.0)}) == pytest.approx(32 / 12)
    assert math.isnan(mean_loss({"web": (0.0, 0.0)})) and math.isnan(mean_loss({}))
