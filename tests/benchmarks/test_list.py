"""What `python -m tests.benchmarks` knows of: every benchmark of this folder, and none by a wrong name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import BENCHMARKS, main


def test_help_tells_of_every_benchmark(monkeypatch, capsys):
    files = [file for file in Path(__file__).parent.glob("[!_]*.py") if "\ndef main(" in file.read_text()]
    assert {file.stem for file in files} == set(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    listing = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"  {name} ") and line.endswith(".") for line in listing) for name in BENCHMARKS)


def test_a_name_of_none_is_refused_before_any_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "resume", "speed"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no benchmark is named speed; there are step_vs_transformers" in capsys.readouterr().err
