"""What is served under a name, and whether it can be: checked before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from danube_ray.config import ConfigError, ServeConfig, ServedModel, require
from danube_ray.data.tokenizer import MODEL_FILE, Tokenizer
from danube_ray.serve.gate import ModelEntry


def entries(config: ServeConfig) -> dict[str, ModelEntry]:
    """What the gate must know of every model and adapter; `ConfigError` for the first that can't be served."""
    known = {}
    for name, model in config.models.items():
        known[name] = entry = entry_of(model)
        known |= {adapter: replace(entry, base=name) for adapter in model.adapters}
    return known


def entry_of(model: ServedModel) -> ModelEntry:
    """One model's entry. `ConfigError` when weights and tokenizer are damaged or not of one model."""
    gguf = not model.weights.is_dir()
    runs = model.num_gpus == 0 or not gguf
    require(runs, f"num_gpus of {model.weights}", model.num_gpus, "0", "llama.cpp runs a GGUF file on CPUs")
    pieces, most = read_gguf(model.weights) if gguf else read_folder(model.weights)
    beside = model.weights.parent if gguf else model.weights
    folder = (model.tokenizer_folder or beside).resolve()  # it is opened again where the gate runs
    remedy = "tokenizer.json alone won't do: put the model's tokenizer.model there, or name another folder"
    require((folder / MODEL_FILE).is_file(), "tokenizer_folder", str(folder), f"a folder with {MODEL_FILE}", remedy)
    tokenizer = Tokenizer.load(folder)
    require(
        pieces is None or pieces[: tokenizer.vocab_size] == tokenizer.pieces,
        "tokenizer_folder",
        str(folder),
        f"the tokenizer of {model.weights}",
        "its pieces are others: served ids would mean other text than trained ones",
    )
    context = model.context_tokens or most
    require(context <= most, "context_tokens", context, f"at most {most}, which the model was trained for")
    return ModelEntry(tokenizer=tokenizer, context_tokens=context)


def read_gguf(file: Path) -> tuple[list[str], int]:
    """The vocabulary of a GGUF file, and the tokens that llama.cpp can use of its context."""
    header = read_header(file)
    window = header.get("llama.attention.sliding_window") or 2**31
    return header["tokenizer.ggml.tokens"], min(header["llama.context_length"], window)


def read_folder(folder: Path) -> tuple[None, int]:
    """The context of a Hugging Face folder: vLLM keeps to a sliding window itself. Its tokenizer has the vocabulary."""
    from danube_ray.model.huggingface import load_config  # torch comes with it: a gate of GGUF files needs none

    return None, load_config(folder, any_rope=True, quantized=True).context_length


def read_header(gguf: Path) -> dict[str, Any]:
    """The metadata of a GGUF file; `ConfigError` when it is missing, torn or not of a Llama model."""
    from gguf import GGUFReader

    require(gguf.is_file(), "gguf", str(gguf), "an existing file")
    try:
        header = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
        assert {"tokenizer.ggml.tokens", "llama.context_length"} <= header.keys(), "it is not of a Llama model"
    except (ValueError, IndexError, KeyError, AssertionError) as error:
        raise ConfigError("gguf", str(gguf), "a whole GGUF file of a Llama model", str(error)) from None
    return header
