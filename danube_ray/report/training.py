"""What a training run tells beside its charts: how far it has come, what happened to it, what the model writes."""

from __future__ import annotations

import datetime
import statistics
from typing import Any

from danube_ray.report import units
from danube_ray.report.figures import BAD_EVENTS
from danube_ray.report.plot import sample
from danube_ray.report.run import Row, Training

MOST_EVENTS, EARLIER_SAMPLES = 50, 6
RECENT_ROWS = 50  # whose speed says when the run will end


def status(training: Training, live: bool) -> dict[str, Any] | None:
    """How far an unfinished run has come, and when it will end at its recent speed; None for a finished one."""
    if not (live or training.unfinished):
        return None
    last, num_steps = training.train[-1], training.num_steps
    speeds = [row["tokens_per_s"] for row in training.train[-RECENT_ROWS:] if row.get("tokens_per_s")]
    left_tokens = training.tokens_at(num_steps) - last["tokens"] if num_steps else 0
    left_s = left_tokens / statistics.median(speeds) if speeds else None
    return {
        "share": last["step"] / num_steps if num_steps else None,
        "step": f"step {last['step']:,}" + (f" of {num_steps:,}" if num_steps else ""),
        "left": f"about {units.duration(left_s)} left" if left_s else "",
        "at": moment(last["time"]) if "time" in last else "",
    }


def events(training: Training) -> dict[str, Any]:
    """What happened, newest first, with a count of each kind; empty where nothing did."""
    rows = training.events
    if not rows:
        return {}
    kinds = [row["event"] for row in rows]
    shown = [
        {**row, "at": moment(row["time"]), "bad": row["event"] in BAD_EVENTS} for row in rows[: -MOST_EVENTS - 1 : -1]
    ]
    return {"rows": shown, "counts": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}, "total": len(rows)}


def written(training: Training) -> dict[str, Any]:
    """The newest samples, and some earlier ones by prompt to see them change; empty without prompts."""
    if not training.samples:
        return {}
    by_step: dict[int, list[Row]] = {}
    for row in training.samples:
        by_step.setdefault(row["step"], []).append(row)
    steps = sorted(by_step)
    earlier = [steps[:-1][index] for index in sample(len(steps) - 1, EARLIER_SAMPLES)][::-1] if len(steps) > 1 else []
    newest = []
    for row in by_step[steps[-1]]:
        before = [other for step in earlier for other in by_step[step] if other["prompt"] == row["prompt"]]
        newest.append({**row, "earlier": before})
    return {"step": steps[-1], "tokens": by_step[steps[-1]][0].get("tokens"), "rows": newest}


def moment(time_s: float) -> str:
    """A time as 2026-11-22 03:11 UTC."""
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
