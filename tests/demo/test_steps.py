"""A pipeline's steps: done once, gone on with when cut off, done anew when what they depend on changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from danube_ray.artifacts import ArtifactError, read_json
from danube_ray.demo.steps import STEPS, Steps


class Pipeline:
    """Two steps that write a file each, and count how often they ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []

    def run(self, setting: int, dies: bool = False) -> list[bool]:
        steps = Steps(self.root, Console(quiet=True))

        def make(name: str) -> dict[str, int]:
            self.ran.append(name)
            (self.root / name).mkdir(exist_ok=True)
            if dies and name == "second":
                (self.root / name / "half").write_text("half")
                raise KeyboardInterrupt
            (self.root / name / "whole").write_text(str(setting))
            return {"setting": setting}

        for name, settings in (("first", setting), ("second", "same")):
            steps.run(name, name.title(), settings, lambda name=name: make(name))
        return [record.skipped for record in steps.done]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """Its `first` would be removed."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds something else"):
        Pipeline(tmp_path).run(1)
    assert (tmp_path / "first" / "thesis.tex").exists()


def test_a_finished_step_is_skipped_and_keeps_its_facts(tmp_path):
    pipeline = Pipeline(tmp_path)
    assert pipeline.run(1) == [False, False] and pipeline.run(1) == [True, True]
    assert pipeline.ran == ["first", "second"]
    assert [row["facts"] for row in read_json(tmp_path / STEPS)] == [{"setting": 1}] * 2


def test_a_changed_step_is_done_anew_and_so_are_those_after_it(tmp_path):
    pipeline = Pipeline(tmp_path)
    pipeline.run(1)
    (tmp_path / "second" / "stale").write_text("of other inputs")
    assert pipeline.run(2) == [False, False]
    assert (tmp_path / "second" / "whole").read_text() == "2" and not (tmp_path / "second" / "stale").exists()


def test_a_step_that_was_cut_off_finds_its_half_of_the_work(tmp_path):
    pipeline = Pipeline(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(1, dies=True)
    assert read_json(tmp_path / STEPS)[1]["seconds"] is None
    assert pipeline.run(1) == [True, False]
    assert (tmp_path / "second" / "half").exists() and (tmp_path / "second" / "whole").exists()


def test_a_step_whose_result_is_gone_is_done_again(tmp_path):
    pipeline = Pipeline(tmp_path)
    pipeline.run(1)
    (tmp_path / "second" / "whole").unlink()
    (tmp_path / "second").rmdir()
    assert pipeline.run(1) == [True, False]
