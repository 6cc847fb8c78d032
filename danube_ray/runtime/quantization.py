"""Quantization as Ray tasks: spans of tensors all over the cluster. What a level costs, `runtime.measuring` adds.

Every task writes to its place in the files, so the folder of the files must be on a disk that all nodes see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray

from danube_ray.artifacts import content_hash, file_hash, read_json, write_json
from danube_ray.config import require
from danube_ray.model.huggingface import load_config
from danube_ray.quantize.gguf import TOKENIZER_FILES, GgufFacts, converting, copy_tokenizer, require_convertible
from danube_ray.quantize.imatrix import ImportanceMatrix, gather_file
from danube_ray.quantize.levels import DEFAULT_LEVELS, LEVELS, Level, check_level
from danube_ray.quantize.spans import Span, write_span
from danube_ray.quantize.table import Row, by_size
from danube_ray.report.run import QUANTIZATION
from danube_ray.runtime.session import result, session

MODEL_FILES = ("config.json", "*.safetensors", *TOKENIZER_FILES)


def quantize(
    model_folder: Path,
    out_dir: Path,
    levels: Sequence[Level] = DEFAULT_LEVELS,
    *,
    imatrix: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, spans: None,
) -> list[Row]:
    """Write `out_dir/LEVEL.gguf` for each level, the tokenizer beside them, and the table, `out_dir/quantization.json`.

    A level made from the same model (and importance matrix) is kept; the others are made together: each weight is read
    once for all of them, by tasks of one CPU. `on_progress` gets the spans done and the number of them. Returned are
    all rows that the table has now, those of other levels of the same model too, as `danube_ray.quantize.table`
    describes them. `ConfigError` when the model can't be converted; then no file is changed. What is killed half-way
    counts for nothing, and is made again.
    """
    require(bool(levels), "levels", list(levels), f"some of {', '.join(LEVELS)}")
    wanted = {check_level(level) for level in levels}
    model_folder, out_dir = model_folder.resolve(), out_dir.resolve()
    importance = ImportanceMatrix.read(imatrix) if imatrix else None
    require_convertible(model_folder, importance)
    model = _model_hash(model_folder)
    inputs = content_hash([model, imatrix and file_hash(imatrix), version("xllamacpp")])
    made_from = {"inputs": inputs, "model": model, "imatrix": imatrix and imatrix.name}
    rows = {row["level"]: row for row in _kept_rows(out_dir, made_from)}
    there = {level for level, row in rows.items() if row["inputs"] == inputs}
    missing: list[Level] = [level for level in LEVELS if level in wanted - there]
    files: dict[Level, Path] = {level: out_dir / f"{level}.gguf" for level in missing}
    if files:
        with session():
            with converting(model_folder, files, importance) as conversion:
                write_spans(conversion.spans, on_progress=on_progress)
            copy_tokenizer(model_folder, out_dir)
            hashing: Any = ray.remote(num_cpus=1)(file_hash)
            hashes = ray.get([hashing.remote(file) for file in files.values()])
        for level, sha256 in zip(missing, hashes, strict=True):
            rows[level] = {**_row(files[level], level, conversion.facts[level]), "sha256": sha256, **made_from}
        write_json(out_dir / QUANTIZATION, by_size(rows.values()))
    return by_size(rows.values())


def write_spans(
    spans: Sequence[Span],
    *,
    cpus_per_span: float = 1,
    on_progress: Callable[[int, int], None] = lambda done, spans: None,
) -> None:
    """One task a span, as many at once as the cluster has CPUs; the first error ends them all."""
    task = ray.remote(num_cpus=cpus_per_span)(write_span)
    waiting = [task.remote(span) for span in spans]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            result(done[0])
            on_progress(len(spans) - len(waiting), len(spans))
    finally:
        for reference in waiting:
            ray.cancel(reference)


def gather_imatrix(
    model_folder: Path,
    tokens: np.ndarray,
    out_file: Path,
    *,
    dataset: str,
    context: int = 512,
    num_threads: int = 1,
) -> Path:
    """Write the importance matrix of a model over calibration ids as `out_file`, in a task of `num_threads` CPUs.

    `tokens` is one array of ids, read in windows of `context`; `dataset` says in the file where they are from.
    """
    config = load_config(model_folder, any_rope=True)
    longest = config.usable_context
    require(2 <= context <= longest, "context", context, f"2 to {longest}, which llama.cpp can use of this model")
    require(len(tokens) > 1, "calibration tokens", len(tokens), "at least two")
    with session():
        task: Any = ray.remote(num_cpus=num_threads)(gather_file)
        result(task.remote(model_folder.resolve(), tokens, out_file.resolve(), context, dataset, num_threads))
    return out_file


def _row(file: Path, level: Level, facts: GgufFacts) -> Row:
    return {
        "level": level,
        "file": file.name,
        "bytes": facts.bytes,
        "bits_per_weight": facts.bits_per_weight,
        "types": facts.histogram,
        "fallbacks": list(facts.fallbacks),
    }


def _model_hash(model_folder: Path) -> str:
    files = sorted(path for pattern in MODEL_FILES for path in model_folder.glob(pattern))
    return content_hash({path.name: file_hash(path) for path in files})


def _kept_rows(out_dir: Path, made_from: Row) -> list[Row]:
    """Rows of an earlier table that were made from the same model and whose files are still what they were."""
    if not (out_dir / QUANTIZATION).is_file():
        return []

    def whole(row: Row) -> bool:
        file = out_dir / row["file"]
        same = any(row.get(key) == made_from[key] for key in ("inputs", "model"))  # rows once had no model
        return same and file.is_file() and file_hash(file) == row["sha256"]

    return [row for row in read_json(out_dir / QUANTIZATION) if whole(row)]
