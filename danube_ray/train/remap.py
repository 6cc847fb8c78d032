"""Carrying a model over to another tokenizer, as Danube2 went on from Danube 1.8B (Llama 2's to Mistral's)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from danube_ray.artifacts import (
    commit,
    content_hash,
    intact,
    publish,
    read_manifest,
    require_replaceable,
    require_space,
    work_folder,
)
from danube_ray.config import require
from danube_ray.data.remap import remap_rows, spellings
from danube_ray.data.tokenizer import MODEL_FILE, Tokenizer
from danube_ray.model.huggingface import EMBEDDING, HEAD, load_config, load_model, read_weights
from danube_ray.train.export import write_model
from danube_ray.train.initial import weights_hashes

NewRows = Literal["random", "mean"]


def remap(
    model: Path,
    new_tokenizer: Path,
    out: Path,
    *,
    old_tokenizer: Path | None = None,
    new_rows: NewRows = "random",
    context_length: int = 8_192,
    sliding_window: int | None = None,
    seed: int = 1234,
) -> dict[str, Any]:
    """Write the Hugging Face folder `model` to `out` for the tokenizer folder `new_tokenizer`; the manifest of `out`.

    Rows of embedding and head whose piece both vocabularies have are copied (`rows_copied` of the manifest), the rest
    are new (`rows_new`): drawn from N(0, initializer_range) as the Danube report does and as fresh weights are, or the
    mean of the old rows of the pieces that spell them. All other weights stay, in the dtype they have; window and
    context become what is given. `old_tokenizer` is the one the model was trained with: the one in `model`, if None.

    `out` appears complete, and is left alone when it is complete from the same input. Raises `ConfigError` before any
    work for tokenizers and models that don't fit each other.
    """
    config, trained_with = load_config(model), old_tokenizer or model / MODEL_FILE
    remedy = "name the tokenizer that the model was trained with"
    require(trained_with.exists(), "old tokenizer", str(trained_with), "a folder or file that is there", remedy)
    old, new = Tokenizer.load(trained_with), Tokenizer.load(new_tokenizer)
    allowed = f"at most the model's {config.vocab_size}"
    require(old.vocab_size <= config.vocab_size, "pieces of the old tokenizer", old.vocab_size, allowed, remedy)
    whole, remedy = "a folder with tokenizer.json", "make one with `danube tokenizer --model tokenizer.model`"
    require((new_tokenizer / "tokenizer.json").is_file(), "new tokenizer", str(new_tokenizer), whole, remedy)
    require(out.resolve() != model.resolve(), "out", str(out), "another folder than the model's")
    require_replaceable(out, "rows_copied")
    target = dataclasses.replace(
        config, vocab_size=new.vocab_size, context_length=context_length, sliding_window=sliding_window
    )
    facts = {"old_tokenizer": old.sha256, "new_tokenizer": new.sha256, "new_rows": new_rows, "seed": seed}
    inputs = {**facts, "from": [config, weights_hashes(model)], "to": target}
    if intact(out, inputs):
        return read_manifest(out)
    dtype = next(read_weights(model))[1].dtype
    require_space(out, target.num_parameters * dtype.itemsize, "the remapped model")

    state, rows = load_model(model, dtype=dtype).state_dict(), remap_rows(old, new)
    missing = [piece for piece, row in zip(new.pieces, rows, strict=True) if row < 0]
    if new_rows == "mean":
        make = averages(spellings(old, missing))
    else:
        make = draws(len(missing), config.initializer_range, seed)
    for table in (EMBEDDING, HEAD):
        state[table] = carried_over(state[table], rows, make(state[table]))
    work = work_folder(out, "remapping", content_hash(inputs))
    write_model(state, target, new_tokenizer, work, dtype)
    counts = {"rows_copied": len(rows) - len(missing), "rows_new": len(missing)}
    manifest = commit(work, inputs=content_hash(inputs), **counts, **facts)
    publish(work, out)
    return manifest


def carried_over(table: Tensor, rows: np.ndarray, new: Tensor) -> Tensor:
    """The table (new V, E) of another vocabulary: row i is `table[rows[i]]`, or where that is -1 the next of `new`."""
    known = rows >= 0
    carried = table.new_empty(len(rows), table.shape[1])
    carried[torch.from_numpy(known)] = table[torch.from_numpy(rows[known])]
    carried[torch.from_numpy(~known)] = new.to(table.dtype)
    return carried


def draws(count: int, deviation: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Makes `count` rows for a table (V, E) from N(0, deviation), in fp32, other ones for each table."""
    generator = torch.Generator().manual_seed(seed)
    return lambda table: torch.empty(count, table.shape[1]).normal_(0.0, deviation, generator=generator)


def averages(spelled: list[list[int]]) -> Callable[[Tensor], Tensor]:
    """Makes a row for each spelling: the mean of a table's (V, E) rows with those ids, in fp32."""
    ids = torch.tensor([index for spelling in spelled for index in spelling], dtype=torch.int64)
    starts = torch.tensor([0, *map(len, spelled)][:-1], dtype=torch.int64).cumsum(0)
    return lambda table: F.embedding_bag(ids, table.float(), starts, mode="mean")
