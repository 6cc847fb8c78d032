"""Curation's judge step on every CPU against on one, beside copies of a busy loop against one, in turn.

What a machine's CPUs give together is less than their number: they share memory, turbo and other guests. So the speedup
of the judge step (reading, rules, language, masking, signatures, and Ray's scheduling of them) is held against that of
a loop which shares nothing, measured beside it in the same round. Its rate is taken from when each CPU has done a split
until the last is done; the speedup of the whole step, the start of Ray's workers included, stands beside it: that takes
some seconds, however much text there is.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from danube_ray.artifacts import read_json
from danube_ray.config import CurationConfig
from danube_ray.runtime.curation import THROUGHPUT, curate
from danube_ray.runtime.session import session
from tests.benchmarks import texts
from tests.benchmarks.pairs import Ratio, median_interval, record

CORPUS_BYTES, FILE_BYTES, SPLIT_BYTES = 96 * 2**20, 2**19, 2**20
ROUNDS, BUSY_S = 5, 5.0
AIM = 0.85


def write_corpus(folder: Path, total_bytes: int) -> Path:
    """JSON lines of documents of 2 to 10 thousand characters, put together from paragraphs of real ones.

    No two share more than a few paragraphs: much text, and no duplicates.
    """
    parts = (part for text in texts.load() for part in re.split(r"\n+", text) if 80 <= len(part) <= 800)
    paragraphs = [part for part in parts if part.isascii() and "{" not in part]  # most is English, and little dropped
    rng, written, number = random.Random(0), 0, 0
    folder.mkdir(parents=True)
    while written < total_bytes:
        lines, size = [], 0
        while size < FILE_BYTES:
            document, length = [], rng.uniform(2_000, 10_000)
            while sum(map(len, document)) < length:
                document.append(rng.choice(paragraphs))
            row = {"text": "\n\n".join(document), "url": f"https://example.org/{number}"}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            size, number = size + len(lines[-1].encode(errors="replace")), number + 1
        (folder / f"{number:08d}.jsonl").write_text("".join(lines), errors="replace")
        written += size
    return folder


def judge(corpus: Path, cpus: int) -> dict[str, float]:
    """Splits a second once all of so many CPUs are at work; seconds of the judge step, of Ray's start, of the run."""
    done_at: list[float] = []

    def on_progress(step: str, done: int, total: int) -> None:
        if step == "judge":
            done_at.append(time.perf_counter())

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "documents"
        with session(num_cpus=cpus):
            started = time.perf_counter()
            curate({"text": corpus}, out, CurationConfig(split_bytes=SPLIT_BYTES), on_progress)
        (row,) = [row for row in read_json(out / THROUGHPUT) if row["step"] == "judge"]
    return {
        "splits_per_s": (len(done_at) - cpus) / (done_at[-1] - done_at[cpus - 1]),
        "judge_s": row["wall_s"],
        "documents": row["documents"],
        "bytes": row["bytes"],
        "ray_start_s": started - began,
        "whole_s": time.perf_counter() - began,
    }


def busy(processes: int) -> float:
    """Turns a second of so many copies of a loop together."""
    context = get_context("spawn")
    barrier, queue = context.Barrier(processes), context.SimpleQueue()
    copies = [context.Process(target=count, args=(barrier, queue)) for _ in range(processes)]
    for copy in copies:
        copy.start()
    turns = sum(queue.get() for _ in copies)
    for copy in copies:
        copy.join()
    return turns / BUSY_S


def count(barrier: Barrier, queue: Any) -> None:
    """Count turns of a loop for `BUSY_S`, from when all copies are there."""
    turns, number = 0, 0
    barrier.wait()
    end = time.perf_counter() + BUSY_S
    while time.perf_counter() < end:
        for _ in range(10_000):
            number = (number * 31 + 7) % 1_000_003
        turns += 1
    queue.put(turns)


def speedups(measured: list[dict[str, Any]], name: str) -> Ratio:
    """A speedup's ratios to the busy loops' of its rounds."""
    ratios = [row[name] / row["busy_loop"] for row in measured]
    return Ratio(statistics.median(ratios), *median_interval(ratios), len(ratios))


def main(rounds: int = ROUNDS) -> None:
    cpus = len(os.sched_getaffinity(0))
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus", CORPUS_BYTES)
        for number in range(rounds):
            order = (1, cpus) if number % 2 == 0 else (cpus, 1)
            loops, runs = {}, {}
            for processes in order:
                before = busy(processes)
                runs[processes] = judge(corpus, processes)
                loops[processes] = (before + busy(processes)) / 2
            row = {
                "judge": runs[cpus]["splits_per_s"] / runs[1]["splits_per_s"],
                "whole_step": runs[1]["judge_s"] / runs[cpus]["judge_s"],
                "busy_loop": loops[cpus] / loops[1],
            }
            measured.append({**row, "one": runs[1], "all": runs[cpus]})
            print(f"round {number + 1}, speedup on {cpus} CPUs: ", ", ".join(f"{k} {v:.2f}" for k, v in row.items()))
    ratios = {name: speedups(measured, name) for name in ("judge", "whole_step")}
    print(f"judge's speedup on {cpus} CPUs / busy loops': {ratios['judge']}  (aim: at least {AIM})")
    print(f"the whole step's, its workers' start included: {ratios['whole_step']}")
    for who, name in (("one", "1 CPU"), ("all", f"{cpus} CPUs")):
        run = {key: statistics.median(row[who][key] for row in measured) for key in measured[0][who]}
        rates = f"{run['bytes'] / 2**20 / run['judge_s']:.2f} MiB/s, {run['documents'] / run['judge_s']:,.0f} docs/s"
        whole = f"the whole run {run['whole_s']:.1f} s, of it Ray's start {run['ray_start_s']:.1f} s"
        print(f"{name}: judge {run['judge_s']:.1f} s, {rates}; {whole}")
    record(
        "curation_scaling",
        {
            **{f"{name}_ratio": ratio for name, ratio in ratios.items()},
            "cpus": cpus,
            "rounds": measured,
        },
    )


if __name__ == "__main__":
    main()
