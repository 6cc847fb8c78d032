"""What is served under a name, and whether it can be: checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danube_ray.config import ConfigError, require, require_positive
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.serve.gate import ModelEntry


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A GGUF file, the tokenizer folder of its training, and how far its engine scales.

    `context_tokens` None takes the file's context, and its sliding window where that is shorter: llama.cpp attends to
    everything, the model never learnt to. Every replica has `num_slots` answers under way and loads the file anew;
    with `min_replicas` 0 an idle model is unloaded, and the first request after that waits for it.
    """

    gguf: Path
    tokenizer_folder: Path
    context_tokens: int | None = None
    num_slots: int = 4
    num_threads: int = 2
    min_replicas: int = 1
    max_replicas: int = 1
    max_queued: int = 64

    def __post_init__(self) -> None:
        require_positive(self, "num_slots", "num_threads", "max_replicas", "max_queued")
        if self.context_tokens is not None:
            require_positive(self, "context_tokens")
        allowed = f"0 to max_replicas={self.max_replicas}"
        require(0 <= self.min_replicas <= self.max_replicas, "ServedModel.min_replicas", self.min_replicas, allowed)

    def entry(self) -> ModelEntry:
        """What the gate must know. `ConfigError` when file and tokenizer are damaged or not of one model."""
        header = read_header(self.gguf)
        tokenizer = Tokenizer.load(self.tokenizer_folder.resolve())  # it is opened again where the gate runs
        require(
            header["tokenizer.ggml.tokens"][: tokenizer.vocab_size] == tokenizer.pieces,
            "tokenizer_folder",
            str(self.tokenizer_folder),
            f"the tokenizer of {self.gguf}",
            "its pieces are others: served ids would mean other text than trained ones",
        )
        most = min(header["llama.context_length"], header.get("llama.attention.sliding_window") or 2**31)
        context = self.context_tokens or most
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
