"""Quantization levels as Ray tasks, one each: convert, measure, and keep the table that says what a level costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from danube_ray.artifacts import content_hash, file_hash, read_json, write_json
from danube_ray.config import require
from danube_ray.model.huggingface import load_config
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.levels import DEFAULT_LEVELS, LEVELS, Level, check_level
from danube_ray.quantize.measure import measure
from danube_ray.runtime.session import session

TABLE = "quantization.json"
MODEL_FILES = ("config.json", "*.safetensors", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")

Row = dict[str, Any]


def quantize(
    model_folder: Path,
    out_dir: Path,
    tokens: np.ndarray,
    levels: Sequence[Level] = DEFAULT_LEVELS,
    *,
    context: int | None = None,
    cpus_per_level: int = 1,
    on_level: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Write `out_dir/LEVEL.gguf` for each level, and the table of this model's levels, `out_dir/quantization.json`.

    Each level's distributions are compared with the float32 model's over `tokens` (validation ids), in windows of
    `context` ids (512, or what the model has). A level made from the same model, tokens and context is kept; the others
    run at once, as the cluster has CPUs. `on_level` gets each new row. Rows come in `LEVELS` order, with the fields of
    `Divergence` and level, file, bytes, bits_per_weight, fallbacks, tokens_per_s, sha256 and inputs.
    """
    require(bool(levels), "levels", list(levels), f"some of {', '.join(LEVELS)}")
    require(cpus_per_level > 0, "cpus_per_level", cpus_per_level, "at least 1")
    config = load_config(model_folder)
    longest = min(config.context_length, config.sliding_window or config.context_length)
    context = context or min(512, longest)
    require(2 <= context <= longest, "context", context, f"2 to {longest}, which llama.cpp can use of this model")
    require(len(tokens) > 1, "tokens to compare levels on", len(tokens), "at least two")
    model_folder, out_dir = model_folder.resolve(), out_dir.resolve()
    inputs = content_hash([_model_hash(model_folder), tokens.tolist(), context, version("xllamacpp")])
    rows = {row["level"]: row for row in _kept_rows(out_dir, inputs)}
    wanted = {check_level(level) for level in levels}
    missing: list[Level] = [level for level in LEVELS if level in wanted and level not in rows]
    if missing:
        with session():
            task = ray.remote(num_cpus=cpus_per_level)(quantize_level)
            waiting = [task.remote(model_folder, out_dir, level, tokens, context, cpus_per_level) for level in missing]
            while waiting:
                done, waiting = ray.wait(waiting)
                row = {**_result(done[0]), "inputs": inputs}
                rows[row["level"]] = row
                write_json(out_dir / TABLE, _in_order(rows))
                on_level(row)
    return _in_order(rows)


def quantize_level(
    model_folder: Path, out_dir: Path, level: Level, tokens: np.ndarray, context: int, num_threads: int
) -> Row:
    """Make and measure one level; its row of the table."""
    file = out_dir / f"{level}.gguf"
    facts = convert(model_folder, file, level, num_threads)
    measured = measure(model_folder, file, tokens, context, num_threads)
    return {
        "level": level,
        "file": file.name,
        "bytes": facts.bytes,
        "bits_per_weight": facts.bits_per_weight,
        "types": facts.histogram,
        "fallbacks": list(facts.fallbacks),
        **asdict(measured.divergence),
        "tokens_per_s": measured.tokens_per_s,
        "sha256": file_hash(file),
    }


def _model_hash(model_folder: Path) -> str:
    files = sorted(path for pattern in MODEL_FILES for path in model_folder.glob(pattern))
    return content_hash({path.name: file_hash(path) for path in files})


def _kept_rows(out_dir: Path, inputs: str) -> list[Row]:
    """Rows of an earlier table that were made from the same inputs and whose files are still what they were."""
    if not (out_dir / TABLE).is_file():
        return []

    def whole(file: Path, sha256: str) -> bool:
        return file.is_file() and file_hash(file) == sha256

    rows = read_json(out_dir / TABLE)
    return [row for row in rows if row["inputs"] == inputs and whole(out_dir / row["file"], row["sha256"])]


def _in_order(rows: dict[str, Row]) -> list[Row]:
    return [rows[level] for level in LEVELS if level in rows]


def _result(reference: Any) -> Row:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None  # a wrong setting is said in its own words, not in Ray's
