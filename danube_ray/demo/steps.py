"""A pipeline's steps, done once: each is timed, recorded with its facts, and skipped when nothing changed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from danube_ray.artifacts import ArtifactError, content_hash, read_json, write_json

STEPS = "steps.json"


@dataclass
class StepRecord:
    """What one step did: how long it took when it last ran, what came out, and from which inputs.

    `seconds` is None while it runs, and stays so when it is cut off.
    """

    name: str
    title: str
    path: str
    inputs: str
    seconds: float | None = None
    skipped: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Steps:
    """Runs steps in order under one folder, new or of an earlier run: what stands in a step's way there is removed.

    A step's inputs include those of every step before it.
    """

    def __init__(self, root: Path, console: Console) -> None:
        self.root, self.console = root, console
        self.file = root / STEPS
        if root.exists() and not self.file.is_file() and (not root.is_dir() or any(root.iterdir())):
            raise ArtifactError(f"{root} holds something else, which would be lost: choose another folder")
        root.mkdir(parents=True, exist_ok=True)
        self.before = {row["name"]: StepRecord(**row) for row in read_json(self.file)} if self.file.is_file() else {}
        self.done: list[StepRecord] = []

    def run(self, name: str, title: str, settings: Any, make: Callable[[], dict[str, Any]]) -> StepRecord:
        """Run `make`, which fills `root/name` and returns facts to show, unless it did so with the same inputs before.

        What other inputs left there is removed. What the same inputs left when they were cut off stays: `make` goes on
        from it.
        """
        place = self.root / name
        inputs = content_hash([settings, self.done[-1].inputs if self.done else ""])
        earlier = self.before.get(name)
        if earlier is None or earlier.inputs != inputs:
            remove(place)
            earlier = None
        if earlier is not None and earlier.seconds is not None and place.exists():
            record = replace(earlier, skipped=True)
        else:
            record = StepRecord(name, title, str(place), inputs)
            self.record(record)
            self.console.print(f"[bold cyan]{title}[/bold cyan]")
            began = time.perf_counter()
            record.facts = make()
            record.seconds = round(time.perf_counter() - began, 1)
        self.record(record)
        self.done.append(record)
        self.console.print(f"  [green]✓[/green] {title}: {described(record)}", highlight=False)
        return record

    def record(self, record: StepRecord) -> None:
        """Write `record` in its place among those of this run and of the one before."""
        self.before[record.name] = record
        write_json(self.file, [asdict(row) for row in self.before.values()])


def remove(place: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def described(record: StepRecord) -> str:
    """A step in one line: its facts, then its time or that it was skipped."""
    facts = ", ".join(f"{name} {value}" for name, value in record.facts.items())
    took = "done before" if record.skipped else f"{record.seconds or 0:.0f} s"
    return f"{facts} ({took})" if facts else took
