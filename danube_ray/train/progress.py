"""A progress bar over a run's metrics file: the same whether the loop runs here, under Ray, or on another node."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from danube_ray.train.metrics import METRICS

POLL_S = 0.5
TAIL_BYTES = 16 * 2**10


class Progress:
    """Draws a bar with loss, tokens/s and time left while a run is followed; without a console it draws nothing."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console

    @contextmanager
    def follow(self, run_folder: Path, num_steps: int, title: str) -> Iterator[None]:
        """Follow `run_folder/metrics.jsonl` until the block ends."""
        if self.console is None:
            yield
            return
        ended = threading.Event()
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console) as bars:
            bar = bars.add_task(title, total=num_steps, facts="starting workers")

            def draw() -> None:
                row = newest_step(run_folder / METRICS)
                if row is not None:
                    bars.update(bar, completed=row["step"], facts=describe(row))

            def poll() -> None:
                while not ended.wait(POLL_S):
                    draw()

            follower = threading.Thread(target=poll, daemon=True)
            follower.start()
            try:
                yield
            finally:
                ended.set()
                follower.join()
                draw()


def newest_step(metrics: Path) -> dict[str, Any] | None:
    """The newest training line, read from the file's end however long the run has been."""
    if not metrics.is_file():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in reversed(lines[:-1]):  # the last piece is empty, or a line still being written
        if line.startswith(b'{"kind": "train"'):
            return json.loads(line)
    return None


def describe(row: dict[str, Any]) -> str:
    """A metrics line in a few words."""
    used = f" · {row['mfu']:.1%} MFU" if "mfu" in row else ""
    return f"{row.get('stage', '')} loss {row['loss']:.3f} · {row['tokens_per_s']:,.0f} tokens/s{used}".strip()
