"""A Hugging Face folder (Llama or Mistral) to GGUF files, at any levels of `danube_ray.quantize.levels`.

Headers are written first, from shapes alone; then the weights, a span of rows at a time: read once, quantized by
llama.cpp's own code for every level that wants it, and written to its place. Spans depend on nothing but the open
files, so threads of one process or tasks all over a cluster take them in any order, and memory holds a few spans. Files
appear under their names together, when all are whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from gguf import GGMLQuantizationType as Type

from danube_ray.artifacts import read_json, require_space
from danube_ray.config import ModelConfig, require
from danube_ray.model.huggingface import EMBEDDING, HEAD, INDEX, WEIGHTS, check_weights, load_config
from danube_ray.quantize.header import llama3_factors, rope_settings, write_header
from danube_ray.quantize.imatrix import ImportanceMatrix
from danube_ray.quantize.levels import Level, check_level, size_bytes, tensor_shapes, tensor_types
from danube_ray.quantize.spans import Span, Target, Weights, unread_weights, write_span

SPAN_WEIGHTS = 8 * 2**20  # of one span: 32 MiB as float32, two seconds of a core at the slowest type
ROPE_FACTORS = "rope_freqs.weight"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class GgufFacts:
    """What a conversion made: `fallbacks` names the tensors whose rows did not fit the type that the level wants."""

    bytes: int
    bits_per_weight: float  # over the tensors, header and vocabulary left out
    histogram: dict[str, int]  # type -> number of tensors
    fallbacks: tuple[str, ...]


@dataclass
class Conversion:
    """The spans that fill the files; once they are all written, and the files renamed, `facts` of each level."""

    spans: list[Span]
    facts: dict[Level, GgufFacts] = field(default_factory=dict)


def convert(
    model_folder: Path,
    out_file: Path,
    level: Level,
    num_threads: int = 1,
    importance: ImportanceMatrix | None = None,
) -> GgufFacts:
    """Write `out_file` from the model and tokenizer in `model_folder`; `ConfigError` when the folder can't be used."""
    with (
        converting(model_folder, {level: out_file}, importance) as conversion,
        ThreadPoolExecutor(num_threads) as pool,
    ):
        list(pool.map(write_span, conversion.spans))
    return conversion.facts[level]


def require_convertible(model_folder: Path, importance: ImportanceMatrix | None = None) -> None:
    """Raise the `ConfigError` that converting would, but for weights that are not finite. Nothing is written."""
    config, _, _ = _unread_model(model_folder, importance)
    write_header(GGUFWriter(None, "llama"), model_folder, config, "F16", importance)  # kept in memory


@contextmanager
def converting(
    model_folder: Path, files: Mapping[Level, Path], importance: ImportanceMatrix | None = None
) -> Iterator[Conversion]:
    """Files for several levels, open for the spans of the block; they get their names when it ends well.

    An error in the block, or `ConfigError` for a folder that can't be used, leaves what was there before. The folders
    of `files` must be on a disk that all who write spans see, and have no other conversion to these names under way.
    """
    config, weights, tied = _unread_model(model_folder, importance)
    with ExitStack() as stack:
        opened = {}
        for level, path in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            for torn in path.parent.glob(f".{path.name}.*"):  # what a conversion that was killed has left
                torn.unlink()
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(descriptor)
            stack.callback(Path(temporary).unlink, missing_ok=True)
            opened[level] = _open_file(Path(temporary), model_folder, config, check_level(level), tied, importance)
        needed_bytes = sum(file.path.stat().st_size for file in opened.values())  # only headers are written so far
        require_space(next(iter(files.values())).parent, needed_bytes, f"{', '.join(files)} of {model_folder.name}")
        conversion = Conversion(_spans(weights, config, list(opened.values()), importance))
        yield conversion
        for level, path in files.items():
            conversion.facts[level] = opened[level].finish(path)


@dataclass(frozen=True)
class OpenFile:
    """A file with its header written and room for every tensor, under a name of its own."""

    path: Path
    targets: dict[str, Target]
    shapes: dict[str, tuple[int, ...]]
    fallbacks: tuple[str, ...]

    def finish(self, path: Path) -> GgufFacts:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.chmod(0o644)  # mkstemp makes files private to their owner
        self.path.replace(path)
        num_weights = sum(prod(shape) for shape in self.shapes.values())
        num_bytes = sum(size_bytes(self.targets[name].kind, prod(shape)) for name, shape in self.shapes.items())
        return GgufFacts(
            bytes=path.stat().st_size,
            bits_per_weight=8 * num_bytes / num_weights,
            histogram=dict(Counter(target.kind.name for target in self.targets.values())),
            fallbacks=self.fallbacks,
        )


def _open_file(
    path: Path, model_folder: Path, config: ModelConfig, level: Level, tied: bool, importance: ImportanceMatrix | None
) -> OpenFile:
    """Write the header of one level's file, make room for its tensors, and fill in those that are not weights."""
    shapes, types = tensor_shapes(config, tied), tensor_types(level, config, tied, importance is not None)
    rope = rope_settings(model_folder)
    factors = llama3_factors(config, rope) if rope["rope_type"] == "llama3" else None
    if factors is not None:
        shapes = _in_order({**shapes, ROPE_FACTORS: factors.shape})
        types[ROPE_FACTORS] = (Type.F32, False)
    writer = GGUFWriter(path, "llama")
    write_header(writer, model_folder, config, level, importance)
    sizes = {name: size_bytes(types[name][0], prod(shape)) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=types[name][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    offset, targets = path.stat().st_size, {}
    for name in shapes:
        offset = GGUFWriter.ggml_pad(offset, writer.data_alignment)
        targets[name] = Target(path, offset, types[name][0])
        offset += sizes[name]
    os.truncate(path, GGUFWriter.ggml_pad(offset, writer.data_alignment))
    if factors is not None:
        targets[ROPE_FACTORS].write(0, factors)
    return OpenFile(path, targets, shapes, tuple(name for name, (_, fell_back) in types.items() if fell_back))


def _in_order(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Tensors outside of layers by name, then the layers, as llama.cpp's quantizer writes them."""
    outside = sorted(name for name in shapes if not name.startswith("blk."))
    return {**{name: shapes[name] for name in outside}, **shapes}


def _unread_model(
    model_folder: Path, importance: ImportanceMatrix | None
) -> tuple[ModelConfig, dict[str, Weights], bool]:
    """The model's shape, every weight by GGUF's name, and whether the embeddings are the head.

    A sharded model's index says which of the folder's safetensors files are the model.
    """
    config = load_config(model_folder, any_rope=True)
    index = model_folder / INDEX
    found: dict[str, Weights] = {}
    for file in sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]:
        path = (model_folder / file).resolve()
        require(path.is_file(), "weights of the model", str(path), "a safetensors file that is there")
        for key, weights in unread_weights(path).items():
            if not key.endswith("rotary_emb.inv_freq"):  # computed by every reader; old exports stored it
                found[key] = weights
    tied = HEAD not in found and bool(read_json(model_folder / "config.json").get("tie_word_embeddings"))
    shapes = {key: weights.shape for key, weights in found.items()}
    head = {HEAD: shapes.get(EMBEDDING, ())} if tied else {}  # llama.cpp takes the embeddings where no head is
    check_weights({**head, **shapes}, config, str(model_folder))
    if importance:
        importance.require_of(config, tied)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_layers)
    by_name = {str(names.get_name(key, try_suffixes=(".weight",))): weights for key, weights in found.items()}
    return config, by_name, tied


def _spans(
    weights: dict[str, Weights], config: ModelConfig, files: list[OpenFile], importance: ImportanceMatrix | None
) -> list[Span]:
    """All rows of all tensors in spans of about `SPAN_WEIGHTS`, the largest first; heads are not cut."""
    spans = []
    for name, found in weights.items():
        head_rows = config.head_dim if name.split(".")[-2] in ("attn_q", "attn_k") else 0
        unit = head_rows or 1
        step = max(1, SPAN_WEIGHTS // (unit * found.columns)) * unit
        targets = tuple(file.targets[name] for file in files)
        scale = importance.weights(name) if importance else None
        for first in range(0, found.rows, step):
            spans.append(Span(name, found, first, min(step, found.rows - first), head_rows, scale, targets))
    return sorted(spans, key=lambda span: -span.num_weights)


def copy_tokenizer(model_folder: Path, out_dir: Path) -> None:
    """Put the tokenizer's files beside what is made of a model, where `danube serve` looks for them."""
    for name in TOKENIZER_FILES:
        if (model_folder / name).is_file() and model_folder.resolve() != out_dir.resolve():
            shutil.copyfile(model_folder / name, out_dir / name)
