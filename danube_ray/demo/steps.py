"""A pipeline's steps, done once: each is timed, recorded with its facts, and skipped when nothing changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from danube_ray.artifacts import content_hash, read_json, write_json

STEPS = "steps.json"


@dataclass
class StepRecord:
    """What one step did: how long it took when it last ran, what came out, and from which inputs."""

    name: str
    title: str
    path: str
    inputs: str
    seconds: float = 0.0
    skipped: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Steps:
    """Runs steps in order under one folder. A step's inputs include those of every step before it."""

    def __init__(self, root: Path, console: Console) -> None:
        self.root, self.console = root, console
        self.file = root / STEPS
        self.before = {row["name"]: StepRecord(**row) for row in read_json(self.file)} if self.file.is_file() else {}
        self.done: list[StepRecord] = []

    def run(self, name: str, title: str, settings: Any, make: Callable[[], dict[str, Any]]) -> StepRecord:
        """Run `make`, which fills `root/name` and returns facts to show, unless it ran with the same inputs before.

        `make` may find half of its work done, and goes on from there: finished steps are recorded, torn ones resume.
        """
        place = self.root / name
        inputs = content_hash([settings, self.done[-1].inputs if self.done else ""])
        earlier = self.before.get(name)
        if earlier and earlier.inputs == inputs and place.exists():
            record = earlier
            record.skipped = True
        else:
            self.console.print(f"[bold cyan]{title}[/bold cyan]")
            began = time.perf_counter()
            facts = make()
            record = StepRecord(name, title, str(place), inputs, round(time.perf_counter() - began, 1), False, facts)
        self.done.append(record)
        self.console.print(f"  [green]✓[/green] {title}: {described(record)}", highlight=False)
        later = [row for name, row in self.before.items() if name not in {step.name for step in self.done}]
        write_json(self.file, [asdict(row) for row in [*self.done, *later]])
        return record


def described(record: StepRecord) -> str:
    """A step in one line: its facts, then its time or that it was skipped."""
    facts = ", ".join(f"{name} {value}" for name, value in record.facts.items())
    took = "done before" if record.skipped else f"{record.seconds:.0f} s"
    return f"{facts} ({took})" if facts else took
