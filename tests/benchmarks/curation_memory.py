"""Whether curation's memory stays flat: the peak of a whole run, and of one over ten times as much text.

Memory is that of the driver and everything Ray started under it, each page counted once (PSS), read a few times a
second. Each run has a process of its own. Both have more splits than CPUs, so that both keep every CPU busy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from danube_ray.config import CurationConfig
from danube_ray.runtime.curation import curate
from danube_ray.runtime.session import session
from tests.benchmarks.curation_scaling import SPLIT_BYTES, write_corpus
from tests.benchmarks.pairs import record
from tests.benchmarks.stream_memory import resident_mib

CORPUS_BYTES = (20 * 2**20, 200 * 2**20)
EVERY_S = 0.5


class Peak:
    """The most memory that was seen inside the block, MiB, by step of curation."""

    def __init__(self) -> None:
        self.step = "start"
        self.mib: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            step = self.step
            self.mib[step] = max(self.mib.get(step, 0.0), round(resident_mib(), 1))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def on_progress(self, step: str, done: int, total: int) -> None:
        self.step = step


def measure(corpus: Path, out: Path) -> None:
    """In a process of its own: curate, and print the counts and the peaks."""
    with Peak() as peak, session():
        counts = curate({"text": corpus}, out, CurationConfig(split_bytes=SPLIT_BYTES), peak.on_progress)["counts"]
    number = {name: counts["text"][name] for name in ("read", "kept", "dropped", "quarantined")}
    print(json.dumps({"documents": number, "peak_mib_by_step": peak.mib}))


def main() -> None:
    runs = []
    for total_bytes in CORPUS_BYTES:
        with tempfile.TemporaryDirectory() as folder:
            corpus = write_corpus(Path(folder) / "corpus", total_bytes)
            command = [sys.executable, "-m", __spec__.name, str(corpus), str(Path(folder) / "documents")]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        run = {"corpus_bytes": total_bytes, **json.loads(said)}
        run["peak_mib"] = max(run["peak_mib_by_step"].values())
        runs.append(run)
        steps = ", ".join(f"{step} {mib:,.0f}" for step, mib in run["peak_mib_by_step"].items())
        size = f"{total_bytes / 2**20:,.0f} MiB, {run['documents']['read']:,} documents"
        print(f"{size}: peak {run['peak_mib']:,.0f} MiB ({steps})")
    small, large = (run["peak_mib"] for run in runs)
    print(f"ten times the input: {large - small:+,.0f} MiB, {large / small - 1:+.1%}; before the first split both have "
          f"{' and '.join(format(run['peak_mib_by_step']['start'], ',.0f') for run in runs)} MiB of Ray")  # fmt: skip
    record("curation_memory", {"peak_ratio": large / small, "runs": runs})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
