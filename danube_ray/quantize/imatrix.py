"""Importance matrices: how large the inputs of each matrix are, column by column, so that rounding spares what counts.

A quantizer that knows the mean square of a matrix's inputs weighs the error of each column by it. The file is
llama.cpp's (`llama-imatrix`, GGUF): its tools take ours, and we take theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, get_tensor_name_map
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from danube_ray.config import ConfigError, ModelConfig, require
from danube_ray.inference.scoring import windows
from danube_ray.model.huggingface import load_config
from danube_ray.quantize.levels import tensor_shapes

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_TOKENS = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Squared inputs of each matrix, by GGUF's name, summed over `counts` tokens: (columns,) float32 each.

    `datasets` names the calibration text, which was read in `num_chunks` windows of `chunk_tokens`. `source` is the
    file it was read from.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, int]
    datasets: tuple[str, ...]
    num_chunks: int
    chunk_tokens: int
    source: str = ""

    def weights(self, name: str) -> np.ndarray | None:
        """Mean squared input of each column of a matrix; None for one that was not watched (the embeddings)."""
        if name not in self.sums:
            return None
        return self.sums[name] / np.float32(self.counts[name])

    def require_of(self, config: ModelConfig, tied_embeddings: bool) -> None:
        """Raise `ConfigError` unless this was gathered on a model of this shape."""
        shapes = {name: size for name, size in tensor_shapes(config, tied_embeddings).items() if len(size) == 2}
        where, remedy = f"importance matrix {self.source}".strip(), "it is of another model: gather one on this model"
        for name in [*self.sums, *(name for name in shapes if name.startswith("blk."))]:
            found = len(self.sums[name]) if name in self.sums else "nothing"
            wanted = shapes[name][1] if name in shapes else "no such matrix"
            require(found == wanted, f"columns of {name} in the {where}", found, str(wanted), remedy)

    def describe(self, writer: GGUFWriter) -> None:
        """Say in a model's header what it was quantized with, as llama.cpp's quantizer does (127 bytes a name)."""
        writer.add_string("quantize.imatrix.file", _cut(self.source))
        if self.datasets:
            writer.add_string("quantize.imatrix.dataset", _cut(self.datasets[0]))
        writer.add_uint32("quantize.imatrix.entries_count", len(self.sums))
        if self.num_chunks:
            writer.add_uint32("quantize.imatrix.chunks_count", self.num_chunks)

    def write(self, path: Path) -> None:
        """Write the file that `llama-quantize --imatrix` takes; it appears under its name when it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.parent / f".{path.name}"
        writer = GGUFWriter(unfinished, "imatrix")
        writer.add_string("general.type", "imatrix")
        writer.add_array(DATASETS, list(self.datasets))
        writer.add_uint32(CHUNKS, self.num_chunks)
        writer.add_uint32(CHUNK_TOKENS, self.chunk_tokens)
        for name in sorted(self.sums):
            writer.add_tensor(name + SUMS, self.sums[name].astype(np.float32)[None])
            writer.add_tensor(name + COUNTS, np.array([[self.counts[name]]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.replace(path)

    @staticmethod
    def read(path: Path) -> ImportanceMatrix:
        """An importance matrix of ours or of llama.cpp's; `ConfigError` when the file is none, or torn."""
        require(path.is_file(), "importance matrix", str(path), "a file that is there")
        try:
            reader = GGUFReader(path)
            header = {name: reader.fields[name].contents() for name in (DATASETS, CHUNKS, CHUNK_TOKENS)}
            tensors = {tensor.name: np.array(tensor.data) for tensor in _float_tensors(reader)}
        except (ValueError, IndexError, KeyError) as error:
            allowed = "a whole GGUF file by llama-imatrix or danube"
            raise ConfigError("importance matrix", str(path), allowed, f"it can't be read: {error}") from None
        names = sorted({name.removesuffix(SUMS).removesuffix(COUNTS) for name in tensors})
        sums, counts = {}, {}
        for name in names:
            found, count = tensors.get(name + SUMS), tensors.get(name + COUNTS)
            whole = found is not None and count is not None and count.size == 1 and count.item() > 0
            require(whole, f"{name} in {path}", "incomplete", "sums and one count of tokens above 0", "gather it again")
            assert found is not None and count is not None
            require(bool(np.isfinite(found).all()), f"{name} in {path}", "not finite", "finite sums", "gather it again")
            sums[name], counts[name] = found.reshape(-1).astype(np.float32), round(count.item())
        require(bool(names), "importance matrix", str(path), "a file with sums and counts in it")
        return ImportanceMatrix(sums, counts, tuple(header[DATASETS]), header[CHUNKS], header[CHUNK_TOKENS], str(path))


def gather(model: nn.Module, tokens: np.ndarray, context: int, dataset: str) -> ImportanceMatrix:
    """Run a Llama over calibration ids, in windows of `context`, and sum up what the linears of its layers read.

    `model` is ours or transformers'; `dataset` names the ids' origin in the file. The head is left out, as llama.cpp
    does unless asked: it is kept at 6 bits or more.
    """
    require(len(tokens) > 1, "calibration tokens", len(tokens), "at least two")
    layers = model.get_submodule("model.layers")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, len(list(layers.children())))
    device = next(model.parameters()).device
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        sums[name], counts[name] = np.zeros(linear.in_features), 0  # float64: many windows are added up

        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float().flatten(0, -2)  # (tokens, columns)
            sums[name] += x.square().sum(0).double().cpu().numpy()
            counts[name] += len(x)

        return linear.register_forward_pre_hook(add)

    chunks = windows(tokens, context)
    with ExitStack() as stack, torch.inference_mode():
        for key, module in layers.named_modules(prefix="model.layers"):
            if isinstance(module, nn.Linear):
                name = names.get_name(key)
                assert name is not None, key
                stack.callback(watch(f"{name}.weight", module).remove)
        for ids in chunks:
            model(torch.tensor([ids], device=device))
    for name, total in sums.items():
        require(
            bool(np.isfinite(total).all()), f"inputs of {name}", "not finite", "finite numbers", "look at the model"
        )
    single = {name: total.astype(np.float32) for name, total in sums.items()}
    return ImportanceMatrix(single, counts, (dataset,), len(chunks), context)


def gather_file(
    model_folder: Path, tokens: np.ndarray, out_file: Path, context: int, dataset: str, num_threads: int = 1
) -> None:
    """Gather the importance matrix of a folder's model in float32, and write it."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    load_config(model_folder, any_rope=True)  # a Llama or Mistral, or the error that says so
    model = AutoModelForCausalLM.from_pretrained(
        str(model_folder), local_files_only=True, trust_remote_code=False, dtype=torch.float32
    )
    gather(model.eval(), tokens, context, dataset).write(out_file)


def _float_tensors(reader: GGUFReader) -> Iterable[Any]:
    for tensor in reader.tensors:
        if tensor.name.endswith((SUMS, COUNTS)):
            if tensor.tensor_type != GGMLQuantizationType.F32:
                raise ValueError(f"{tensor.name} is {tensor.tensor_type.name}, not F32")
            yield tensor


def _cut(text: str) -> str:
    return text.encode()[:127].decode(errors="ignore")
