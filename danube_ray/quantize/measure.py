"""What one quantized file loses against the model it was made from, and how fast it runs.

Both models read the same passages. The float model reads them once for all levels (`reference_logits`): its logits are
kept in float32, since 16 bits would add as much divergence as an F16 file has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from danube_ray.config import require
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.inference.scoring import windows
from danube_ray.quantize.divergence import Divergence, score, summarize

PROMPT_TOKENS = 512  # of the prompt whose reading is timed
MOST_S = 20.0  # for generating: a slow machine is timed on fewer tokens


@dataclass(frozen=True)
class Passage:
    """Ids (T,) that both models read, and the positions (R,), ascending, at which their logits are compared."""

    ids: np.ndarray
    rows: np.ndarray

    @cached_property
    def labels(self) -> np.ndarray:
        """The token after each of `rows`: (R,) int64."""
        return self.ids[self.rows + 1].astype(np.int64)

    def logits(self, model: GgufModel | HuggingFaceModel) -> np.ndarray:
        """A model's logits (R, V) float32 at `rows`: all of them, (T, V), may be gigabytes."""
        return model.logits(self.ids.tolist(), self.rows.tolist())


@dataclass(frozen=True)
class Speed:
    """llama.cpp with one sequence on `speed_threads` threads: tokens a second, generated and read from a prompt."""

    tokens_per_s: float
    prompt_tokens_per_s: float
    speed_threads: int


def passages(tokens: np.ndarray, context: int) -> list[Passage]:
    """Windows of `context` ids that do not overlap, compared wherever the next token is known."""
    require(len(tokens) > 1, "tokens to compare levels on", len(tokens), "at least two")
    return [Passage(np.array(ids, np.int32), np.arange(len(ids) - 1)) for ids in windows(tokens, context)]


def reference_logits(model_folder: Path, texts: Sequence[Passage], num_threads: int = 1) -> Iterator[np.ndarray]:
    """Logits (R, V) float32 of the Hugging Face weights, computed in float32, passage after passage."""
    torch.set_num_threads(num_threads)
    model = HuggingFaceModel(model_folder)
    for text in texts:
        yield text.logits(model)


def divergence(
    model: GgufModel | HuggingFaceModel, texts: Sequence[Passage], reference: Iterable[np.ndarray]
) -> Divergence:
    """How far a model is over `texts` from the `reference` logits, which are taken one passage at a time."""
    pairs = zip(texts, reference, strict=True)
    return summarize([score(wanted, text.logits(model), text.labels) for text, wanted in pairs])


def speed(gguf_file: Path, num_threads: int = 1) -> Speed:
    """How fast a GGUF file generates and reads, behind an almost empty context. Nothing else should run meanwhile."""
    with GgufModel(gguf_file, num_threads=num_threads) as model:
        generated = model.tokens_per_second(4)  # first: it brings the weights in from disk
        if 64 / generated < MOST_S:
            generated = model.tokens_per_second(64)
        prompt = [(model.eos_id + 1 + i) % model.vocab_size for i in range(min(PROMPT_TOKENS, model.context_length))]
        started = time.perf_counter()
        model.logits(prompt, rows=[len(prompt) - 1])
        return Speed(generated, len(prompt) / (time.perf_counter() - started), num_threads)
