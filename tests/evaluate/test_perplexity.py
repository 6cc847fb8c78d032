from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from danube_ray.config import ConfigError
from danube_ray.evaluate.perplexity import perplexity, unigram_entropy
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.model.huggingface import load_model


def test_unigram_entropy_of_known_distributions():
    assert unigram_entropy([np.arange(8)]) == pytest.approx(math.log(8))
    assert unigram_entropy([np.full(50, 7, np.uint16)]) == 0
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_entropy([np.array([9, 9]), np.array([], np.uint16), np.array([9, 2])]) == pytest.approx(expected)


def test_unigram_entropy_of_large_arrays_is_the_loss_of_counting():
    random = np.random.default_rng(0)
    chunks = [random.zipf(1.5, 40_000).clip(max=65_535).astype(np.uint16) for _ in range(3)]
    tokens = np.concatenate(chunks)
    ids, counts = np.unique(tokens, return_counts=True)
    share = dict(zip(ids.tolist(), (counts / len(tokens)).tolist(), strict=True))
    loss = -np.mean([math.log(share[token]) for token in tokens.tolist()])
    assert unigram_entropy(chunks) == pytest.approx(loss)


def test_unigram_entropy_needs_tokens():
    with pytest.raises(ConfigError, match="at least one"):
        unigram_entropy([np.array([], np.uint16)])


def test_perplexity_is_the_exponential_of_the_mean_loss_over_scored_tokens(model_folder):
    tokens = np.random.default_rng(0).integers(3, 512, 205).astype(np.uint16)
    found = perplexity(HuggingFaceModel(model_folder), tokens, context=50, batch_size=3)
    model, losses = load_model(model_folder), []
    for start in range(0, 205, 50):
        ids = torch.tensor(tokens[start : start + 50].astype(np.int64))
        with torch.inference_mode():
            losses += torch.nn.functional.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none").tolist()
    assert found.tokens == len(losses) == 4 * 49 + 4
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found.error == pytest.approx(found.value * found.loss_error)
    assert found.loss_error > 0


def test_a_context_over_the_models_is_refused(model_folder):
    with pytest.raises(ConfigError, match="context is 2048, allowed is 2 to the model's 1024"):
        perplexity(HuggingFaceModel(model_folder), np.arange(100), context=2048)
