"""The table of levels: what a row says, how rows are ordered, and which level answers a limit on size or divergence.

`quantization.json` is a list of rows, largest file first. A row has what the file is:
`level`, `file`, `bytes`, `bits_per_weight`, `types` (tensors of each type), `fallbacks` (names), `sha256`, `inputs`
(the hash of all that made it), `model` (of the float model), `imatrix` (the importance matrix's name, or null);
and, where it was measured, what the level costs:
- the fields of `Divergence` (KL divergence in nats from the float32 model, same top, perplexity, and their errors);
- the fields of `Speed`, on the machine that measured;
- `tasks`: rows of `task`, `metric`, `value`, `stderr`, `n`, `reference`, `drop`, `drop_error`,
  `prompts_sha256` (`with_drop`);
- `long_context`: see `danube_ray.quantize.long_context.compare_far`;
- `measured`: for each of these parts, a hash of what it was measured on, so that it is measured once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import isnan
from typing import Any

import numpy as np

from danube_ray.config import ConfigError, require
from danube_ray.quantize.estimate import LevelSize
from danube_ray.quantize.levels import LEVELS, Level
from danube_ray.report.units import size

Row = dict[str, Any]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def by_size(rows: Iterable[Row]) -> list[Row]:
    """Rows, largest file first; of equal sizes in the order of `LEVELS`."""
    return sorted(rows, key=lambda row: (-row["bytes"], LEVELS.index(row["level"])))


def with_drop(rows: Sequence[Row], reference: Sequence[Row]) -> list[Row]:
    """A level's task rows (with `values` by document) beside the float model's: how far it fell, and that one's error.

    Both answered the same questions, so the error is that of their differences, much smaller than either score's own.
    """
    compared = []
    for mine, theirs in zip(rows, reference, strict=True):
        same = [mine[key] for key in ("task", "metric", "prompts_sha256")]
        assert same == [theirs[key] for key in ("task", "metric", "prompts_sha256")]  # one adapter asks both
        falls = np.subtract(theirs["values"], mine["values"], dtype=np.float64)
        error = float(falls.std(ddof=1) / np.sqrt(len(falls))) if len(falls) > 1 else None
        kept = {key: mine[key] for key in ("task", "metric", "value", "stderr", "n", "prompts_sha256")}
        drop = {"reference": theirs["value"], "drop": theirs["value"] - mine["value"], "drop_error": error}
        compared.append({**kept, **drop})
    return compared


def without_nan(value: Any) -> Any:
    """A row as JSON has it: an error bar that one window alone can't give is null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and isnan(value) else value


def parse_size(text: str) -> int:
    """Bytes of `2.5GB`, `700 MB`, `2GiB` or a plain number; units are decimal unless they have an i."""
    match = re.fullmatch(r"([\d_]*\.?\d+)\s*([kKmMgGtT]?i?[bB]?)", text.strip())
    unit = match[2].upper() if match else ""
    unit = unit if unit.endswith("B") or not unit else f"{unit}B"
    if match is None or unit not in {**UNITS, "B": 1}:
        raise ConfigError("size", text, "a number with B, KB, MB, GB, TB, KiB, MiB or GiB, such as 2.5GB")
    return int(float(match[1]) * {**UNITS, "B": 1}[unit])


def fitting(sizes: Sequence[LevelSize], target_bytes: int) -> list[Level]:
    """Levels whose files should fit, best first: with more bits a weight. `ConfigError` when none does."""
    fits = sorted((each for each in sizes if each.bytes <= target_bytes), key=lambda each: -each.bytes)
    if not fits:
        smallest = min(sizes, key=lambda each: each.bytes)
        raise nothing_fits(target_bytes, smallest.level, smallest.bytes)
    return [each.level for each in fits]


def nothing_fits(target_bytes: int, level: Level, num_bytes: int) -> ConfigError:
    """The error for a target below the smallest file."""
    allowed = f"at least {size(num_bytes)}, this model at {level}, the smallest"
    return ConfigError("--target-size", size(target_bytes), allowed, "give it more room, or take a smaller model")


def within(rows: Sequence[Row], max_kld: float) -> Row:
    """The smallest file whose mean KL divergence is at most `max_kld`; `ConfigError` when none is."""
    require(bool(rows), "levels", [], "at least one that was measured")
    good = [row for row in rows if row["kld_mean"] <= max_kld]
    if not good:
        best = min(rows, key=lambda row: row["kld_mean"])
        allowed = f"at least {best['kld_mean']:.2g}, what {best['level']} has, the nearest of those tried"
        raise ConfigError("--max-kld", max_kld, allowed, "allow more, or offer a wider level by --levels")
    return min(good, key=lambda row: row["bytes"])
