from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from danube_ray.config import ConfigError
from danube_ray.evaluate.perplexity import perplexity
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.measure import Passage, divergence, passages, reference_logits, speed

TOKENS = np.random.default_rng(0).integers(3, 512, 300).astype(np.uint16)


def measured(file, texts, reference):
    with GgufModel(file) as model:
        return divergence(model, texts, reference)


def test_fewer_bits_diverge_more(wide_model_folder, tmp_path):
    texts = passages(TOKENS, 128)
    reference = list(reference_logits(wide_model_folder, texts))
    sizes, divergences = [], []
    for level in ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"):
        facts = convert(wide_model_folder, tmp_path / f"{level}.gguf", level)
        sizes.append(facts.bits_per_weight)
        divergences.append(measured(tmp_path / f"{level}.gguf", texts, reference))
    assert sizes == sorted(sizes, reverse=True)
    assert divergences[0].kld_mean < 1e-4
    for wider, narrower in pairwise(divergences[1:]):
        assert narrower.kld_mean > wider.kld_mean
        assert narrower.kld_p99 > wider.kld_p99
        assert narrower.same_top < wider.same_top


def test_perplexities_are_those_of_the_evaluation_room(model_folder, tmp_path):
    convert(model_folder, tmp_path / "Q8_0.gguf", "Q8_0")
    texts = passages(TOKENS, 64)
    found = measured(tmp_path / "Q8_0.gguf", texts, reference_logits(model_folder, texts))
    with GgufModel(tmp_path / "Q8_0.gguf") as model:
        expected = perplexity(model, TOKENS, 64)
    assert found.positions == expected.tokens
    assert found.perplexity == pytest.approx(expected.value, rel=1e-5)
    assert found.perplexity_error == pytest.approx(expected.error, rel=1e-4)
    reference = perplexity(HuggingFaceModel(model_folder), TOKENS, 64)
    assert found.reference_perplexity == pytest.approx(reference.value, rel=1e-5)


def test_logits_at_some_positions_are_those_of_a_whole_reading(model_folder, tmp_path):
    convert(model_folder, tmp_path / "F32.gguf", "F32")
    text = Passage(TOKENS[:200].astype(np.int32), np.array([0, 7, 8, 150, 198]))
    with GgufModel(tmp_path / "F32.gguf") as model:
        for reader in (model, HuggingFaceModel(model_folder)):
            whole = reader.logits(text.ids.tolist())
            assert text.logits(reader).shape == (5, 512)
            np.testing.assert_allclose(text.logits(reader), whole[text.rows], atol=1e-4)
    assert text.labels.tolist() == TOKENS[[1, 8, 9, 151, 199]].tolist()


def test_passages_cover_every_token_that_has_one_before_it():
    texts = passages(TOKENS[:130], 64)
    assert [len(text.ids) for text in texts] == [64, 64, 2]
    assert np.concatenate([text.labels for text in texts]).tolist() == [*TOKENS[1:64], *TOKENS[65:128], TOKENS[129]]
    with pytest.raises(ConfigError, match="at least two"):
        passages(TOKENS[:1], 64)


def test_speed_says_what_it_was_measured_with(model_folder, tmp_path):
    convert(model_folder, tmp_path / "Q8_0.gguf", "Q8_0")
    found = speed(tmp_path / "Q8_0.gguf", num_threads=1)
    assert found.speed_threads == 1
    assert found.prompt_tokens_per_s > found.tokens_per_s > 0, "a prompt is read many tokens at a time"
