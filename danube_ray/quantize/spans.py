"""Spans of a model's weights: read, quantized by llama.cpp's own code, and written to their place in GGUF files.

A span says by itself where its bytes lie and where they go: threads of one process, or tasks all over a cluster, take
spans in any order, and may take one twice. Nothing here imports torch, so workers start seconds sooner.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors import SafetensorError, safe_open

from danube_ray.config import ConfigError, require
from danube_ray.inference.llamacpp import library
from danube_ray.quantize.levels import size_bytes

# numpy's name of what safetensors calls a type of weights; it has none for bfloat16, the upper half of a float32.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Weights:
    """One tensor of a safetensors file, unread: where its bytes start, and what they are."""

    source: Path
    offset: int
    dtype: str  # of `DTYPES`
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def read(self, first_row: int, num_rows: int) -> np.ndarray:
        """Some rows as float32 (num_rows, columns)."""
        dtype = np.dtype(DTYPES[self.dtype])
        start = self.offset + first_row * self.columns * dtype.itemsize
        flat = np.fromfile(self.source, dtype, num_rows * self.columns, offset=start)
        if self.dtype == "BF16":
            wide = flat.astype(np.uint32)
            flat = np.left_shift(wide, 16, out=wide).view(np.float32)
        return flat.astype(np.float32, copy=False).reshape(num_rows, self.columns)


@dataclass(frozen=True)
class Target:
    """Where the bytes of a tensor start in one file, and of which type they are."""

    file: Path
    offset: int
    kind: Type

    def write(self, start_bytes: int, data: np.ndarray) -> None:
        """Put `data` into its place, `start_bytes` into the tensor.

        The file is not open for reading: over NFS, a page that was read goes back whole, with what another node has
        written beside `data` meanwhile undone.
        """
        with os.fdopen(os.open(self.file, os.O_WRONLY), "wb") as file:
            file.seek(self.offset + start_bytes)
            file.write(data.data)


@dataclass(frozen=True)
class Span:
    """Some rows of one tensor, where they are read and where they go."""

    name: str  # GGUF's
    weights: Weights
    first_row: int
    num_rows: int
    head_rows: int  # rows of a head of queries or keys, which change places; else 0
    importance: np.ndarray | None  # (columns,) float32
    targets: tuple[Target, ...]

    @property
    def num_weights(self) -> int:
        return self.num_rows * self.weights.columns


def unread_weights(path: Path) -> dict[str, Weights]:
    """Every tensor of a safetensors file by its name there; `ConfigError` when it is torn, or holds no plain floats."""
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library checks the file whole, but does not say where in it tensors begin: its header does
    except SafetensorError as error:
        raise ConfigError("weights of the model", str(path), f"a whole safetensors file ({error})") from None
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    for name, facts in header.items():
        require(facts["dtype"] in DTYPES, f"type of {name} in {path}", facts["dtype"], ", ".join(DTYPES))
    return {
        name: Weights(path, 8 + header_bytes + facts["data_offsets"][0], facts["dtype"], tuple(facts["shape"]))
        for name, facts in header.items()
    }


def write_span(span: Span) -> None:
    """Read the rows of a span, and write them to every file at its type; a type that several want is computed once.

    `ConfigError` when a weight is not finite, or too large for a type.
    """
    rows = span.weights.read(span.first_row, span.num_rows)
    if not np.isfinite(rows).all():
        raise ConfigError(f"weights of {span.name}", "not finite", "finite numbers", "the model is broken")
    if span.head_rows:  # from halves that rotate together to llama.cpp's neighbours
        halves = rows.reshape(-1, 2, span.head_rows // 2, span.weights.columns)
        rows = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
    for kind in {target.kind for target in span.targets}:
        data = quantize(rows, kind, span.importance)
        for target in span.targets:
            if target.kind == kind:
                target.write(span.first_row * data.nbytes // len(rows), data)


def quantize(weight: np.ndarray, kind: Type, importance: np.ndarray | None = None) -> np.ndarray:
    """Float32 `weight` (rows, columns) in a type's bytes, (rows, bytes) uint8, by llama.cpp's own code.

    `importance` (columns,) float32 is what rounding weighs the error of each column by. `ConfigError` for weights so
    large that their blocks' scales, float16 in most types, are infinite.
    """
    rows, columns = weight.shape
    out = np.empty((rows, size_bytes(kind, columns)), np.uint8)
    scale = None if importance is None else importance.ctypes.data
    written = library().ggml_quantize_chunk(int(kind), weight.ctypes.data, out.ctypes.data, 0, rows, columns, scale)
    if written != out.nbytes:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of {out.nbytes} as {kind.name}")
    if not library().ggml_validate_row_data(int(kind), out.ctypes.data, out.nbytes):
        largest = float(np.abs(weight).max())
        raise ConfigError(f"largest weight at {kind.name}", largest, "what float16 can scale", "BF16 holds it")
    return out
