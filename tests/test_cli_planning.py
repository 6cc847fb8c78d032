"""`danube plan` and `danube doctor`: what they print, and what programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from danube_ray.cli import main
from danube_ray.doctor import packages
from danube_ray.presets import PRESETS
from tests.test_planner import ROW, write_results


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return " ".join(capsys.readouterr().out.split())


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("preset", ["danube_1_8b", "danube3_4b", "proxy_20m"])
def test_a_plan_says_what_a_launch_needs_to_know(capsys, tmp_path: Path, preset: str):
    run = PRESETS[preset]()
    out = said(capsys, "plan", preset, "--hardware", "h100:8", "--results", str(tmp_path))
    assert f"{preset}: {run.model.num_parameters:,} parameters" in out and "on 8 x H100 SXM 80 GB" in out
    for part in (
        "Memory a GPU",
        "Largest micro-batch",
        "Speed and cost at $3.00",
        "Where a GPU's time goes",
        "It fits",
    ):
        assert part in out
    assert "Nothing has been measured yet on H100 SXM 80 GB" in out
    assert ("Published, on other software: 36,600" in out) == (preset == "danube_1_8b")
    assert "for GPUs only" in out and "estimate" in out and "an assumption" in out


def test_the_formulas_error_is_printed_for_every_result(capsys, tmp_path: Path):
    results = write_results(tmp_path, ROW, {**ROW, "case": "another", "tokens_per_s": 45_000})
    arguments = ("plan", "danube_1_8b", "--results", str(results))
    out = said(capsys, *arguments)
    assert "The formula against 2 measured results" in out and "Nothing has been measured yet" not in out
    compared = as_json(capsys, *arguments)["comparisons"]
    for one in compared:
        assert f"{one['measured_tokens_per_s']:,.0f} {one['speed_error']:+.1%}" in out
        assert one["speed_error"] == pytest.approx(one["predicted_tokens_per_s"] / one["measured_tokens_per_s"] - 1)
    assert [one["case"] for one in compared] == ["danube_1_8b-2048-bf16", "another"]
    assert "Nothing has been measured yet on H200" in said(capsys, *arguments, "--hardware", "h200:8")


def test_a_plan_as_data_adds_up(capsys):
    data = as_json(capsys, "plan", "danube_1_8b", "--hardware", "h100:16", "--price-per-gpu-hour", "2.5")
    assert data["hardware"]["num_gpus"] == 16 and data["hardware"]["price_source"] == "as given"
    assert data["cost"] == pytest.approx(2.5 * data["gpu_hours"]) == sum(stage["cost"] for stage in data["stages"])
    assert data["days"] == pytest.approx(sum(stage["days"] for stage in data["stages"]))
    assert [stage["sequence_length"] for stage in data["stages"]] == [2_048, 4_096, 8_192, 16_384]
    for stage in data["stages"]:
        parts = [value for name, value in stage["memory"].items() if name != "total_bytes"]
        assert stage["memory"]["total_bytes"] == pytest.approx(sum(parts))
        assert stage["fits"] == (stage["memory"]["total_bytes"] <= data["hardware"]["usable_bytes"])


def test_what_a_plan_proposes_fits(capsys):
    too_much = {"--loop.parallelism": "ddp", "--stages.0.micro-batch-size": "9"}
    arguments = [word for option in too_much.items() for word in option]
    data = as_json(capsys, "plan", "danube3_4b", *arguments)
    assert not data["fits"]
    proposed = data["remedy"]["options"]
    assert " ".join(proposed) in said(capsys, "plan", "danube3_4b", *arguments)
    changed = too_much | dict(option.split() for option in proposed)
    follows = as_json(capsys, "plan", "danube3_4b", *(word for option in changed.items() for word in option))
    assert follows["fits"] and follows["days"] == pytest.approx(data["remedy"]["days"])


def test_more_gpus_than_windows_is_said(capsys):
    arguments = ("plan", "danube_1_8b", "--hardware", "h100:1024")
    assert "44% in stage 2k" in said(capsys, *arguments)
    shares = [stage["padding_share"] for stage in as_json(capsys, *arguments)["stages"]]
    assert shares == pytest.approx([1 - windows / 1024 for windows in (576, 288, 144, 72)])
    assert "Padding" not in said(capsys, *arguments[:-1], "h100:8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--hardware", "cpu:4"], "danube plan knows GPUs only"),
        (["--hardware", "h100:12"], "whole nodes of 8"),
        (["--hardware", "a100:8"], "--loop.precision bf16"),
        (["--price-per-gpu-hour", "-1"], "price per GPU hour is -1.0"),
    ],
)
def test_hardware_that_cannot_run_it_is_one_error(capsys, arguments: list[str], told: str):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "danube_1_8b", *arguments])
    assert stop.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_plan_needs_neither_torch_nor_ray():
    script = (
        "import sys; from danube_ray.cli import main; main(['plan', 'danube_1_8b', '--json']); "
        "sys.exit(len({'torch', 'ray', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_doctor_prints_a_line_for_each_thing(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "load_errors", lambda modules: {})  # many seconds; tests/test_doctor.py has it
    out = said(capsys, "doctor", "--preset", "nano", "--folder", str(tmp_path))
    for name in ("python", "packages", "driver", "GPU", "FP8", "attention", "collectives", "disk speed", "port 8265"):
        assert name in out
    assert "a checkpoint of nano" in out and "FP8 gain" in out
    with pytest.raises(SystemExit):
        main(["doctor", "--preset", "danube_2b"])
    assert "preset is 'danube_2b', allowed is one of danube_1_8b" in " ".join(capsys.readouterr().err.split())
