"""Cases one after the other in a process of their own, which may die; each result is on disk before the next begins."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from danube_ray.artifacts import append_json_lines, read_json_lines
from tests.benchmarks.gpu.cases import Case

RESULTS, LOG, RUNNING = "results.jsonl", "log.txt", "running"  # the last names the case that is being measured
POLL_S = 0.2
LOG_TAIL_LINES = 15
SPARE_S = 5.0  # of the budget, for the summary


def remaining(cases: list[Case], out: Path) -> list[Case]:
    """The cases without a line in the results; one that failed has its line."""
    done = {row["case"] for row in read_json_lines(out / RESULTS)}
    return [case for case in cases if case.name not in done]


def supervise(cases: list[Case], out: Path, deadline: float, worker: list[str], case_s: float) -> list[Case]:
    """Run `worker`, a command that does what `work` does, until no case or no time is left; the cases left over.

    A worker that dies in a case, or is in it for more than `case_s`, is recorded as that case's failure, and another
    goes on behind it. What the deadline (`time.time()`) cuts off is left over. A worker that gets no further than the
    one before it ends the suite: it had no time for another case, or could not begin.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1", **os.environ}
    running = out / RUNNING
    todo = remaining(cases, out)
    while todo and time.time() < deadline:
        with (out / LOG).open("ab") as log, subprocess.Popen(worker, stderr=log, env=environment) as process:
            died = watched(process, running, deadline, case_s)
        if died and running.is_file() and time.time() < deadline:
            tail = "\n".join((out / LOG).read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
            case = next(case for case in cases if case.name == running.read_text())
            record(out, case, {"error": {"type": "WorkerDied", "message": f"{died}\n{tail}"}}, {})
        running.unlink(missing_ok=True)
        left = remaining(cases, out)
        if len(left) == len(todo):
            return left
        todo = left
    return todo


def watched(process: subprocess.Popen[bytes], running: Path, deadline: float, case_s: float) -> str | None:
    """Wait for a worker, and end it where it must not go on; how it died, or None where it ended well."""
    while True:
        try:
            code = process.wait(timeout=POLL_S)
            return f"the process ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            now = time.time()
            if now >= deadline:
                process.kill()
                return "the time was up"
            if running.is_file() and now - running.stat().st_mtime > case_s:
                process.kill()
                return f"no end within {case_s:g} s"


def record(out: Path, case: Case, result: dict[str, Any], machine: dict[str, Any]) -> None:
    """Append a case's line: what it is, what was measured or why not, and on what."""
    asked = asdict(case)
    asked["asked_mode"] = asked.pop("mode")
    append_json_lines(out / RESULTS, [{"case": case.name, **asked, "aim": case.aim, **result, "machine": machine}])
