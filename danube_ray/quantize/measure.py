"""One quantized file against the model it was made from: divergence over validation windows, and speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from danube_ray.config import require
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.scoring import windows
from danube_ray.model.huggingface import load_model
from danube_ray.quantize.divergence import Divergence, compare


@dataclass(frozen=True)
class Measurement:
    """`tokens_per_s` is llama.cpp's decoding of one sequence on `num_threads` threads."""

    divergence: Divergence
    tokens_per_s: float


def measure(model_folder: Path, gguf_file: Path, tokens: np.ndarray, context: int, num_threads: int = 1) -> Measurement:
    """Run the Hugging Face weights in float32 and the GGUF file in llama.cpp over `tokens`, side by side.

    `tokens` is one array of ids, cut into windows of `context`. Both models are in memory at once, and logits of one
    window.
    """
    require(len(tokens) > 1, "tokens to compare levels on", len(tokens), "at least two")
    torch.set_num_threads(num_threads)
    reference = load_model(model_folder).eval()

    def pairs(model: GgufModel) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for ids in windows(tokens, context):
            with torch.inference_mode():
                logits = reference(torch.tensor([ids]))[0].float().numpy()
            yield logits, model.logits(ids), np.asarray(ids)

    with GgufModel(gguf_file, context_length=context, num_threads=num_threads) as model:
        return Measurement(compare(pairs(model)), model.tokens_per_second())
