"""Ray Data as the carrier of a data job's splits: each is one task that leaves its own files.

Ray Data schedules the tasks and tries them again; it never holds the data. What a task has finished is known by the
record it wrote last, so a job killed anywhere starts again, verifies what is there and does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray.data

from danube_ray.runtime.session import session

Progress = Callable[[int, int], None]  # how many of how many are done
StepProgress = Callable[[str, int, int], None]  # of which step: how many of how many are done


def run_splits(step: Callable[[Any], Any], splits: Sequence[Any], on_done: Callable[[int], None]) -> list[Any]:
    """`step(split)` for every split, each as a task of its own; results in the splits' order.

    Splits and results are JSON-able. `on_done(n)` is called when n splits are finished. Raises what `OSError` a task
    met: a full disk says so in its own words.
    """
    return map_splits(partial(run_split, step=step), splits, on_done)


def map_splits(
    work: Callable[[dict[str, Any]], dict[str, Any]] | type,
    splits: Sequence[Any],
    on_done: Callable[[int], None],
    **options: Any,
) -> list[Any]:
    """`run_splits` for work that calls `run_split` itself, such as an actor's; `options` are those of `Dataset.map`."""
    rows = [{"number": number, "split": json.dumps(split)} for number, split in enumerate(splits)]
    results: list[Any] = [None] * len(rows)
    with session():
        # A block a row, and so a task a row; by default Ray Data would put many splits into one.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(work, **options)
        for done, row in enumerate(dataset.iter_rows(), start=1):
            outcome = json.loads(row["outcome"])
            if "error" in outcome:
                raise OSError(*outcome["error"])
            results[row["number"]] = outcome["result"]
            on_done(done)
    return results


def run_split(row: dict[str, Any], step: Callable[[Any], Any]) -> dict[str, Any]:
    """One task. A disk that is full or gone comes back as a value: Ray would rewrite the exception's words."""
    try:
        outcome = {"result": step(json.loads(row["split"]))}
    except OSError as error:
        outcome = {"error": [error.errno, error.strerror, error.filename]}
    return {"number": row["number"], "outcome": json.dumps(outcome, default=str)}
