"""A Hugging Face folder (Llama or Mistral) to one GGUF file, at any level of `danube_ray.quantize.levels`.

The header is written first, from the shapes alone; then each tensor is read, quantized by llama.cpp's own code and
written, so memory holds one tensor at a time. The file appears under its name only when it is whole.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize as quantize_in_numpy
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor

from danube_ray.artifacts import read_json
from danube_ray.config import ConfigError, ModelConfig, require
from danube_ray.inference.llamacpp import library
from danube_ray.model.huggingface import EMBEDDING, HEAD, INDEX, WEIGHTS, check_weights, load_config
from danube_ray.quantize.levels import PLAIN_TYPES, Level, Shape, check_level, file_type, size_bytes, tensor_type


@dataclass(frozen=True)
class GgufFacts:
    """What a conversion made: `fallbacks` names the tensors whose rows did not fit the type that the level wants."""

    bytes: int
    bits_per_weight: float  # over the tensors, header and vocabulary left out
    histogram: dict[str, int]  # type -> number of tensors
    fallbacks: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: GGUF's name, shape and type, and how to read it as float32."""

    name: str
    shape: tuple[int, ...]
    kind: Type
    fell_back: bool
    read: Callable[[], np.ndarray]

    @property
    def num_weights(self) -> int:
        return int(np.prod(self.shape))


def convert(model_folder: Path, out_file: Path, level: Level, num_threads: int = 1) -> GgufFacts:
    """Write `out_file` from the model and tokenizer in `model_folder`; `ConfigError` when the folder can't be used.

    The context length in the header is capped at the sliding window, which llama.cpp ignores for this architecture.
    """
    check_level(level)
    config = load_config(model_folder)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=out_file.parent, prefix=f".{out_file.name}.")
    os.close(descriptor)
    try:
        with ExitStack() as stack:
            tensors = _tensors(model_folder, config, level, stack)
            writer = GGUFWriter(Path(temporary), "llama")
            stack.callback(writer.close)
            _write_model_header(writer, model_folder, config, level)
            _write_tokenizer_header(writer, model_folder, config.vocab_size)
            _write_tensors(writer, tensors, num_threads)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(out_file)
    finally:
        Path(temporary).unlink(missing_ok=True)
    num_weights = sum(tensor.num_weights for tensor in tensors)
    num_bytes = sum(size_bytes(tensor.kind, tensor.num_weights) for tensor in tensors)
    return GgufFacts(
        bytes=out_file.stat().st_size,
        bits_per_weight=8 * num_bytes / num_weights,
        histogram=dict(Counter(tensor.kind.name for tensor in tensors)),
        fallbacks=tuple(tensor.name for tensor in tensors if tensor.fell_back),
    )


def _write_model_header(writer: GGUFWriter, model_folder: Path, config: ModelConfig, level: Level) -> None:
    writer.add_name(model_folder.resolve().name)
    writer.add_file_type(file_type(level))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(min(config.context_length, config.sliding_window or config.context_length))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer_header(writer: GGUFWriter, model_folder: Path, vocab_size: int) -> None:
    """Pieces, scores and types of `tokenizer.model`, padded with unused pieces up to the embedding's rows."""
    model_file = model_folder / "tokenizer.model"
    require(model_file.is_file(), "tokenizer", str(model_file), "a sentencepiece model beside the weights")
    pieces = SentencePieceProcessor(model_file=str(model_file))
    num_pieces = pieces.vocab_size()
    marks = (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
    require(min(marks) >= 0, f"ids of <unk>, <s> and </s> in {model_file}", marks, "pieces of the vocabulary")
    require(num_pieces <= vocab_size, "vocab_size", vocab_size, f"at least the tokenizer's {num_pieces} pieces")

    def kind(piece: int) -> TokenType:
        if pieces.is_unknown(piece):
            return TokenType.UNKNOWN
        if pieces.is_control(piece):
            return TokenType.CONTROL
        if pieces.is_byte(piece):
            return TokenType.BYTE
        return TokenType.UNUSED if pieces.is_unused(piece) else TokenType.NORMAL

    padding = range(num_pieces, vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        [pieces.id_to_piece(i).encode() for i in range(num_pieces)] + [b"[PAD%d]" % i for i in padding]
    )
    writer.add_token_scores([pieces.get_score(i) for i in range(num_pieces)] + [-1000.0 for _ in padding])
    writer.add_token_types([kind(i) for i in range(num_pieces)] + [TokenType.UNUSED for _ in padding])
    writer.add_unk_token_id(marks[0])
    writer.add_bos_token_id(marks[1])
    writer.add_eos_token_id(marks[2])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    # sentencepiece's add_dummy_prefix, seen from outside: does the first word get the space marker?
    writer.add_add_space_prefix(pieces.encode("a", out_type=str)[0].startswith("▁"))
    if template := _chat_template(model_folder):
        writer.add_chat_template(template)


def _chat_template(model_folder: Path) -> str | None:
    if (model_folder / "chat_template.jinja").is_file():
        return (model_folder / "chat_template.jinja").read_text()
    if (model_folder / "tokenizer_config.json").is_file():
        return read_json(model_folder / "tokenizer_config.json").get("chat_template")
    return None


def _tensors(model_folder: Path, config: ModelConfig, level: Level, stack: ExitStack) -> list[_Tensor]:
    """Every tensor of the folder's safetensors files in llama.cpp's order, unread; files stay open in `stack`."""
    slices = dict(_open_slices(model_folder, stack))
    shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
    tied = HEAD not in slices and bool(read_json(model_folder / "config.json").get("tie_word_embeddings"))
    head = {HEAD: shapes.get(EMBEDDING, ())} if tied else {}  # llama.cpp takes the embeddings where no head is
    check_weights({**head, **shapes}, config, str(model_folder))
    shape = Shape(config.num_layers, config.num_heads, config.num_kv_heads, tied)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_layers)
    tensors = []
    for key, part in slices.items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None  # check_weights let only a Llama's weights through
        rotated = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
        size = shapes[key]
        kind, fell_back = (Type.F32, False) if len(size) == 1 else tensor_type(level, name, size[-1], shape)
        tensors.append(_Tensor(name, size, kind, fell_back, partial(_read, part, rotated)))
    return sorted(tensors, key=lambda tensor: _file_order(tensor.name))


def _open_slices(model_folder: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    """(name, unread slice) of every weight; a sharded model's index says which files are the model."""
    index = model_folder / INDEX
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    for file in files:
        path = model_folder / file
        require(path.is_file(), "weights of the model", str(path), "a safetensors file that is there")
        try:
            handle = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ConfigError("weights of the model", str(path), f"a whole safetensors file ({error})") from None
        for key in handle.keys():  # noqa: SIM118 (not a mapping)
            if not key.endswith("rotary_emb.inv_freq"):  # computed by every reader; old exports stored it
                yield key, handle.get_slice(key)


def _file_order(name: str) -> tuple[int, int, str]:
    """Embeddings, then layers by number, then the final norm and head."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (1, int(match[1]), name) if match else (0 if name.startswith("token_embd") else 2, 0, name)


def _read(part: Any, rotated_heads: int | None) -> np.ndarray:
    """A weight as float32; query and key rows reordered from rotate-half to llama.cpp's rotation of neighbours."""
    weight = part[:].float().numpy()
    if rotated_heads is None:
        return weight
    rows, columns = weight.shape
    halves = weight.reshape(rotated_heads, 2, rows // rotated_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _write_tensors(writer: GGUFWriter, tensors: list[_Tensor], num_threads: int) -> None:
    for tensor in tensors:
        num_bytes = size_bytes(tensor.kind, tensor.num_weights)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ThreadPoolExecutor(num_threads) as pool:
        for tensor in tensors:
            weight = tensor.read()
            if not np.isfinite(weight).all():
                raise ConfigError(f"weights of {tensor.name}", "not finite", "finite numbers", "the model is broken")
            writer.write_tensor_data(quantize(weight, tensor.kind, pool, num_threads))


def quantize(weight: np.ndarray, kind: Type, pool: ThreadPoolExecutor, num_threads: int) -> np.ndarray:
    """Float32 `weight` (rows, columns) in a type's bytes; rows are independent, so threads take a span each."""
    if kind == Type.F32:
        return weight
    if kind == Type.F16:
        largest = float(np.abs(weight).max())
        require(largest <= 65504, "largest weight at F16", largest, "at most 65504", "BF16 holds it")
    if kind in PLAIN_TYPES:
        return quantize_in_numpy(weight, kind)
    weight = np.ascontiguousarray(weight)
    rows, columns = weight.shape
    out = np.empty((rows, size_bytes(kind, columns)), np.uint8)
    span = ceil(rows / num_threads)

    def quantize_rows(first: int) -> int:
        count = min(span, rows - first)
        return library().ggml_quantize_chunk(
            int(kind), weight.ctypes.data, out.ctypes.data, first * columns, count, columns, None
        )

    written = sum(pool.map(quantize_rows, range(0, rows, span)))
    if written != out.nbytes:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of {out.nbytes} as {kind.name}")
    return out
