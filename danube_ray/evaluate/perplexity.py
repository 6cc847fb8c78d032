"""How well a model predicts a text, and how well counting its tokens alone would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from danube_ray.artifacts import read_manifest
from danube_ray.config import require
from danube_ray.data.shards import open_validation
from danube_ray.data.tokenizer import MODEL_FILE, Tokenizer
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.inference.protocol import LanguageModel
from danube_ray.inference.scoring import token_mean, windows


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with its standard error over windows, the same as nats a token (`loss`), and how many were scored."""

    value: float
    error: float
    loss: float
    loss_error: float
    tokens: int


def unigram_entropy(chunks: Iterable[np.ndarray]) -> float:
    """Entropy (nats a token) of the tokens' own distribution: -sum over ids of n_id/n * ln(n_id/n).

    It is the loss of the best model that ignores context, fitted on these very tokens: a trained model that does not go
    below it has learnt nothing from context. `chunks` are arrays of ids; all tokens count, document marks too.
    """
    counts = np.zeros(0, dtype=np.int64)
    for chunk in chunks:
        part = np.bincount(chunk.astype(np.int64))
        longer, shorter = (part, counts) if len(part) > len(counts) else (counts, part)
        longer[: len(shorter)] += shorter
        counts = longer
    seen = counts[counts > 0]
    require(seen.size > 0, "tokens of unigram_entropy", 0, "at least one")
    shares = seen / seen.sum()
    return float(-(shares * np.log(shares)).sum())


def perplexity(model: LanguageModel, tokens: np.ndarray, context: int, batch_size: int = 8) -> Perplexity:
    """Perplexity of `tokens` (one array of ids) in windows of `context` ids that do not overlap.

    Every id but a window's first is scored, as in training; what stands before the window is not seen. (llama.cpp's
    tool scores the second half of each window only, so its figures are lower.)
    """
    require(2 <= context <= model.context_length, "context", context, f"2 to the model's {model.context_length}")
    require(len(tokens) > 1, "tokens of perplexity", len(tokens), "at least two")
    parts = windows(tokens, context)
    losses = [
        -scores.sum(dtype=np.float64)
        for start in range(0, len(parts), batch_size)
        for scores in model.log_probs(parts[start : start + batch_size])
    ]
    counts = [len(part) - 1 for part in parts]
    loss = token_mean(losses, counts)
    value = loss.exp()
    return Perplexity(value.value, value.error, loss.value, loss.error, sum(counts))


def held_out_perplexity(
    model_folder: Path, tokens_dir: Path, context: int = 512, device: str = "cpu"
) -> dict[str, Perplexity]:
    """Perplexity of a Hugging Face folder on each source's held-out tokens, in windows of `context` or what it has.

    `ConfigError` where they were made with another tokenizer than lies beside the weights.
    """
    stores, tokenizer = open_validation(tokens_dir), model_folder / MODEL_FILE
    if tokenizer.is_file():
        made_with, own = read_manifest(tokens_dir)["tokenizer_sha256"], Tokenizer.load(tokenizer).sha256
        remedy = "write the tokens with the model's own tokenizer"
        require(made_with == own, f"tokenizer of {tokens_dir}", made_with, f"the model's, {own}", remedy)
    model = HuggingFaceModel(model_folder, device=device)
    length = min(context, model.context_length)
    return {source: perplexity(model, store.read(0, store.num_tokens), length) for source, store in stores.items()}
