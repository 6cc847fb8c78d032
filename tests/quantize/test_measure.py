from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from danube_ray.evaluate.perplexity import perplexity
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.measure import measure

TOKENS = np.random.default_rng(0).integers(3, 512, 300).astype(np.uint16)


def test_fewer_bits_diverge_more(wide_model_folder, tmp_path):
    levels = ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
    sizes, divergences = [], []
    for level in levels:
        facts = convert(wide_model_folder, tmp_path / f"{level}.gguf", level)
        found = measure(wide_model_folder, tmp_path / f"{level}.gguf", TOKENS, context=128)
        sizes.append(facts.bits_per_weight)
        divergences.append(found.divergence)
        assert found.tokens_per_s > 0
    assert sizes == sorted(sizes, reverse=True)
    assert divergences[0].kld_mean < 1e-4
    for wider, narrower in pairwise(divergences[1:]):
        assert narrower.kld_mean > wider.kld_mean
        assert narrower.kld_p99 > wider.kld_p99
        assert narrower.same_top < wider.same_top


def test_perplexities_are_those_of_the_evaluation_room(model_folder, tmp_path):
    convert(model_folder, tmp_path / "Q8_0.gguf", "Q8_0")
    found = measure(model_folder, tmp_path / "Q8_0.gguf", TOKENS, context=64).divergence
    with GgufModel(tmp_path / "Q8_0.gguf") as model:
        expected = perplexity(model, TOKENS, 64)
    assert found.positions == expected.tokens
    assert found.perplexity == pytest.approx(expected.value, rel=1e-5)
    assert found.perplexity_error == pytest.approx(expected.error, rel=1e-4)
    reference = perplexity(HuggingFaceModel(model_folder), TOKENS, 64)
    assert found.reference_perplexity == pytest.approx(reference.value, rel=1e-5)
