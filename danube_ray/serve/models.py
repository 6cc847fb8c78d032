"""What is served under a name, and whether it can be: checked before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from danube_ray.config import ConfigError, ServeConfig, ServedModel, require
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.serve.gate import ModelEntry


def entries(config: ServeConfig) -> dict[str, ModelEntry]:
    """What the gate must know of every model and adapter; `ConfigError` for the first that can't be served."""
    known = {}
    for name, model in config.models.items():
        known[name] = entry = entry_of(model)
        known |= {adapter: replace(entry, base=name) for adapter in model.adapters}
    return known


def entry_of(model: ServedModel) -> ModelEntry:
    """One model's entry. `ConfigError` when file and tokenizer are damaged or not of one model."""
    header = read_header(model.weights)
    folder = (model.tokenizer_folder or model.weights.parent).resolve()  # it is opened again where the gate runs
    tokenizer = Tokenizer.load(folder)
    require(
        header["tokenizer.ggml.tokens"][: tokenizer.vocab_size] == tokenizer.pieces,
        "tokenizer_folder",
        str(folder),
        f"the tokenizer of {model.weights}",
        "its pieces are others: served ids would mean other text than trained ones",
    )
    most = min(header["llama.context_length"], header.get("llama.attention.sliding_window") or 2**31)
    context = model.context_tokens or most
    require(context <= most, "context_tokens", context, f"at most {most}, which the model was trained for")
    return ModelEntry(tokenizer=tokenizer, context_tokens=context)


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
