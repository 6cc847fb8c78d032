"""A LoRA adapter of PEFT to a GGUF file, as llama.cpp loads it beside a model.

llama.cpp computes W x + alpha / rank * B (A x), PEFT's rule (Hu et al., 2021). Rows of B that make queries and keys are
reordered as those of W were. What the two can't agree on is refused: an adapter that half fits answers nonsense.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, get_tensor_name_map
from safetensors import SafetensorError, safe_open

from danube_ray.artifacts import ArtifactError, read_json
from danube_ray.config import ConfigError, require

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's own, before the model's names
# Settings that change the computation into another one than llama.cpp's; empty or off is what it can.
OTHER_KINDS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters"),
    *("modules_to_save", "trainable_token_indices", "alpha_pattern", "rank_pattern", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)


def convert_adapters(adapters: Mapping[str, Path], model: Path, out_folder: Path) -> dict[str, Path]:
    """Write `out_folder/NAME.gguf` from each PEFT folder of an adapter to `model`, a GGUF file at any level.

    `ConfigError` when a folder is none, damaged, of another kind than plain LoRA, or of another model. Files appear
    under their names only when they are whole.
    """
    files = {name: out_folder / f"{name}.gguf" for name in adapters}
    for name, alpha, tensors in _read(adapters, model):
        _write(files[name], alpha, tensors)
    return files


def convert_adapter(adapter_folder: Path, model: Path, out_file: Path) -> Path:
    """Write `out_file` alone, which ends in .gguf."""
    return convert_adapters({out_file.stem: adapter_folder}, model, out_file.parent)[out_file.stem]


def check_adapters(adapters: Mapping[str, Path], model: Path) -> None:
    """Raise the `ConfigError` that `convert_adapters` would, and write nothing."""
    for _ in _read(adapters, model):
        pass


def _read(adapters: Mapping[str, Path], model: Path) -> Iterator[tuple[str, float, dict[str, np.ndarray]]]:
    """Of each adapter its name, alpha as llama.cpp takes it, and its tensors by llama.cpp's names."""
    header = _Header(model) if adapters else None  # a second of work, for all of them
    for name, folder in adapters.items():
        assert header is not None
        alpha, rank = lora_settings(folder)
        tensors = {}
        for weight, (a, b) in _pairs(folder / WEIGHTS, header.num_layers).items():
            found, wanted = (*b.shape, *a.shape), header.shapes.get(weight)
            fits = wanted is not None and found == (wanted[0], rank, rank, wanted[1])
            allowed = f"{(wanted[0], rank)} and {(rank, wanted[1])}" if wanted else "no such weight in the model"
            require(fits, f"B and A for {weight} of {folder}", (b.shape, a.shape), allowed, "name its own model")
            finite = bool(np.isfinite(a).all() and np.isfinite(b).all())
            require(finite, f"adapter weights for {weight}", "not finite", "finite numbers", "the adapter is broken")
            tensors[f"{weight}.lora_a"], tensors[f"{weight}.lora_b"] = a, header.in_llama_cpps_order(weight, b)
        yield name, alpha, tensors


class _Header:
    """What of a model's GGUF file an adapter must fit."""

    def __init__(self, model: Path) -> None:
        require(model.is_file(), "model of the adapter", str(model), "an existing GGUF file")
        try:
            reader = GGUFReader(model)
            self.shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
            self.num_layers = int(reader.fields["llama.block_count"].contents())
            self._heads = {
                "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
                "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
            }
        except (ValueError, IndexError, KeyError) as error:
            raise ConfigError("model of the adapter", str(model), "a whole GGUF file of a Llama", str(error)) from None

    def in_llama_cpps_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of queries and keys from rotate-half to llama.cpp's rotation of neighbours; others as they are."""
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return rows
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def lora_settings(folder: Path) -> tuple[float, int]:
    """Alpha as llama.cpp divides it by the rank, and the rank, of a PEFT folder; `ConfigError` unless it is plain LoRA.

    vLLM can no more than llama.cpp, but passes over settings that it doesn't know.
    """
    path = folder / CONFIG
    try:
        read = read_json(path)
    except (ArtifactError, UnicodeDecodeError) as error:
        raise ConfigError("adapter", str(path.parent), f"a PEFT folder with {CONFIG}", str(error)) from None
    config: dict[str, Any] = read if isinstance(read, dict) else {}
    require(config.get("peft_type") == "LORA", f"peft_type in {path}", config.get("peft_type"), "LORA")
    require(config.get("bias", "none") == "none", f"bias in {path}", config.get("bias"), "none")
    for key in OTHER_KINDS:
        remedy = "merge the adapter into its model, and convert that"
        require(not config.get(key), f"{key} in {path}", config.get(key), "nothing: engines have plain LoRA", remedy)
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    require(isinstance(rank, int) and rank > 0, f"r in {path}", rank, "a positive number")
    require(isinstance(alpha, int | float) and alpha > 0, f"lora_alpha in {path}", alpha, "a positive number")
    return float(alpha * sqrt(rank) if config.get("use_rslora") else alpha), rank


def _pairs(path: Path, num_layers: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A (rank, in) and B (out, rank) as float32 by the GGUF name of the weight they change."""
    require(path.is_file(), "adapter weights", str(path), "a safetensors file (pickled weights are never loaded)")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, num_layers)
    halves: dict[str, dict[str, np.ndarray]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith(".base_layer.weight"):  # PEFT adds an untouched copy of a head that has an adapter
                    continue
                module, _, half = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
                name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
                known = name is not None and half in ("lora_A", "lora_B")
                require(known, f"weight in {path}", key, "lora_A and lora_B of linears of a Llama", "merge it instead")
                halves.setdefault(str(name), {})[half] = file.get_tensor(key).float().numpy()
    except SafetensorError as error:
        raise ConfigError("adapter weights", str(path), f"a whole safetensors file ({error})") from None
    require(bool(halves), "adapter weights", str(path), "some weights")
    for name, pair in halves.items():
        whole = len(pair) == 2 and all(half.ndim == 2 for half in pair.values())
        require(whole, f"adapter weights for {name}", sorted(pair), "matrices lora_A and lora_B")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in sorted(halves.items())}


def _write(out_file: Path, alpha: float, tensors: Mapping[str, Any]) -> None:
    out_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=out_file.parent, prefix=f".{out_file.name}.")
    os.close(descriptor)
    try:
        writer = GGUFWriter(Path(temporary), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        Path(temporary).replace(out_file)
    finally:
        Path(temporary).unlink(missing_ok=True)
