"""What quantization levels cost, measured by Ray tasks: the float model reads once, every level is held against it.

The float model's logits go through Ray's object store, 4 bytes for each position and piece of the vocabulary, and from
there to disk where they are more than it holds. Levels read at once, as CPUs and memory allow; how fast each runs is
measured alone, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import ray

from danube_ray.artifacts import content_hash, read_json, write_json
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.evaluate.gguf import language_model_lm
from danube_ray.evaluate.harness import evaluate_tasks
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.quantize.long_context import LongContext, compare_far
from danube_ray.quantize.measure import Passage, divergence, reference_logits, speed
from danube_ray.quantize.table import Row, with_drop, without_nan
from danube_ray.report.run import QUANTIZATION
from danube_ray.runtime.session import result

OnProgress = Callable[[str, int, int], None]  # what is being done, how much of it is, of how much


@dataclass(frozen=True)
class Material:
    """What levels are measured on. Empty parts are left out of the table."""

    texts: Sequence[Passage] = ()
    far: LongContext | None = None
    tasks: Sequence[dict[str, Any]] = ()
    limit: int | None = None  # documents a task

    @cached_property
    def passages(self) -> list[Passage]:
        """What the float model reads: the plain windows, then those of the long-context check."""
        return [*self.texts, *(self.far.passages if self.far else ())]

    @cached_property
    def hashes(self) -> dict[str, str]:
        """For each part that there is, what its results depend on beside the file."""
        parts: dict[str, Any] = {
            "divergence": [_facts(text) for text in self.texts],
            "long_context": [_facts(text) for text in self.far.passages] if self.far else [],
            "tasks": [[task["task"], task["metadata"], task["num_fewshot"], self.limit] for task in self.tasks],
        }
        return {name: content_hash([facts, version("xllamacpp")]) for name, facts in parts.items() if facts}


def _facts(text: Passage) -> list[list[int]]:
    return [text.ids.tolist(), text.rows.tolist()]


@dataclass
class Meter:
    """Adds what levels cost to the rows of `out_dir/quantization.json`, inside a `session`.

    A part that was measured on the same file and material is kept. What the float model said is kept for the next call.
    """

    model_folder: Path
    out_dir: Path
    material: Material
    num_threads: int = 1
    on_progress: OnProgress = field(default=lambda what, done, total: None)

    def __post_init__(self) -> None:
        self.model_folder, self.out_dir = self.model_folder.resolve(), self.out_dir.resolve()  # workers stand elsewhere

    def measure(self, levels: Sequence[str]) -> list[Row]:
        """Measure what is missing of `levels`, whose files are there, and return their rows."""
        rows = {row["level"]: row for row in self._rows() if row["level"] in levels}
        for parts, measure in ((("divergence", "long_context"), self._read), (("tasks",), self._answer)):
            hashes = {part: self.material.hashes[part] for part in parts if part in self.material.hashes}
            missing = [row for row in rows.values() if not hashes.items() <= row.get("measured", {}).items()]
            for level, values in measure(missing) if missing else ():
                self._keep(rows[level], values, hashes)
        timed = {"speed": content_hash([self.num_threads, version("xllamacpp")])}
        missing = [row for row in rows.values() if not timed.items() <= row.get("measured", {}).items()]
        for done, row in enumerate(missing):
            self.on_progress("levels timed", done, len(missing))
            found = self._task(speed, self.num_threads).remote(self._file(row), self.num_threads)
            self._keep(row, asdict(result(found)), timed)
        return [row for row in self._rows() if row["level"] in levels]

    def _rows(self) -> list[Row]:
        return read_json(self.out_dir / QUANTIZATION)

    def _keep(self, row: Row, values: Row, hashes: dict[str, str]) -> None:
        row.update(without_nan(values), measured={**row.get("measured", {}), **hashes})
        write_json(self.out_dir / QUANTIZATION, [row if old["level"] == row["level"] else old for old in self._rows()])

    def _read(self, rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
        reference = self._reference  # first: it takes all CPUs
        threads = max(1, self.num_threads // len(rows))
        texts, far = self.material.texts, self.material.far
        cache_and_logits_bytes = 2 * 2**30 if far else 2**29
        tasks = {
            self._task(read, threads, row["bytes"] + cache_and_logits_bytes).remote(
                self._file(row), texts, far, reference, threads
            ): row["level"]
            for row in rows
        }
        return self._finished("levels read", tasks)

    @cached_property
    def _reference(self) -> list[ray.ObjectRef]:
        """The float model's logits of each passage, in the object store."""
        passages = self.material.passages
        weights_bytes = 2 * sum(path.stat().st_size for path in self.model_folder.glob("*.safetensors"))
        task = self._task(reference_logits, self.num_threads, weights_bytes)
        logits: list[ray.ObjectRef] = []
        for reference in task.remote(self.model_folder, passages, self.num_threads):
            logits.append(reference)
            self.on_progress("passages read by the float model", len(logits), len(passages))
        result(logits[-1])  # raises what ended it, if something did
        return logits

    def _answer(self, rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
        tasks, limit = self.material.tasks, self.material.limit
        threads = max(1, self.num_threads // (len(rows) + 1))
        reference = self._reference_answers
        waiting = {
            self._task(answer, threads, row["bytes"]).remote(
                self._file(row), self.model_folder, tasks, limit, threads
            ): row["level"]
            for row in rows
        }
        for level, answers in self._finished("levels scored on tasks", waiting):
            yield level, {"tasks": with_drop(answers, result(reference))}

    @cached_property
    def _reference_answers(self) -> ray.ObjectRef:
        tasks, limit, threads = self.material.tasks, self.material.limit, max(1, self.num_threads // 2)
        return self._task(answer, threads).remote(None, self.model_folder, tasks, limit, threads)

    def _finished(self, what: str, tasks: dict[ray.ObjectRef, str]) -> Iterator[tuple[str, Any]]:
        """Each task's level and result as it ends; the first error ends them all."""
        waiting = list(tasks)
        try:
            while waiting:
                self.on_progress(what, len(tasks) - len(waiting), len(tasks))
                (done, *_), waiting = ray.wait(waiting)
                yield tasks[done], result(done)
            self.on_progress(what, len(tasks), len(tasks))
        finally:
            for task in waiting:
                ray.cancel(task)

    def _task(self, function: Callable[..., Any], threads: int, memory_bytes: int = 0) -> Any:
        """`function` as a task that waits for its CPUs and memory, but never for more than a node has."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, memory = (max(node.get(name, 0) for node in nodes) for name in ("CPU", "memory"))
        return ray.remote(num_cpus=min(threads, cpus), memory=min(memory_bytes, int(memory)))(function)

    def _file(self, row: Row) -> Path:
        return self.out_dir / row["file"]


def read(
    file: Path, texts: Sequence[Passage], far: LongContext | None, reference: Iterable[ray.ObjectRef], threads: int
) -> Row:
    """One level's divergence over `texts`, and its part of the long-context check; one passage's logits at a time."""
    longest = max(len(text.ids) for text in [*texts, *(far.passages if far else ())])
    logits = (ray.get(passage) for passage in reference)
    values: Row = {}
    with GgufModel(file, context_length=longest, num_threads=threads) as model:
        if texts:
            values = asdict(divergence(model, texts, islice(logits, len(texts))))
        if far:
            values["long_context"] = compare_far(model, far, logits)
    return values


def answer(
    file: Path | None, model_folder: Path, tasks: Sequence[dict[str, Any]], limit: int | None, threads: int
) -> list[Row]:
    """lm-eval's rows of a level, or of the float model (`file` None), with every document's score."""
    tokenizer = Tokenizer.load(model_folder)
    if file is None:
        return evaluate_tasks(
            language_model_lm(HuggingFaceModel(model_folder), tokenizer), tasks, limit, per_document=True
        )
    with GgufModel(file, num_threads=threads) as model:
        return evaluate_tasks(language_model_lm(model, tokenizer), tasks, limit, per_document=True)
