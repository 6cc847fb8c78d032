from __future__ import annotations

import numpy as np
import pytest
import torch

from danube_ray.config import ConfigError
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.model.huggingface import load_model


@pytest.fixture(scope="module")
def model(model_folder):
    return HuggingFaceModel(model_folder)


def test_logits_and_log_probs_agree_with_our_own_transformer(model, model_folder):
    rows = [[1, 7, 300, 12, 90], [1, 44, 5]]
    ours = load_model(model_folder)
    for ids, scores in zip(rows, model.log_probs(rows), strict=True):
        with torch.inference_mode():
            logits = ours(torch.tensor([ids]))[0]
        np.testing.assert_allclose(model.logits(ids), logits.numpy(), atol=1e-4)
        labels = torch.tensor(ids[1:])
        losses = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="none")
        np.testing.assert_allclose(scores, -losses.numpy(), atol=1e-4)


def test_greedy_is_the_likeliest_token_each_time_and_ends_before_eos(model):
    prompt = [1, 50, 60]
    answer = model.generate(prompt, 6)
    for end, token in enumerate(answer, start=len(prompt)):
        assert model.logits([*prompt, *answer][:end])[-1].argmax() == token
    model.eos_id, eos = answer[1], model.eos_id
    try:
        assert model.generate(prompt, 6) == answer[:1]
    finally:
        model.eos_id = eos


def test_a_seed_repeats_a_drawn_answer_and_leaves_the_callers_draws_alone(model):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    answers = [model.generate([1, 50], 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_hub_id_needs_a_revision(tmp_path):
    with pytest.raises(ConfigError, match="revision of someone/model is None"):
        HuggingFaceModel("someone/model")


def test_a_prompt_over_the_context_is_refused(model):
    with pytest.raises(ConfigError, match="number of tokens is 641"):
        model.log_probs([[1] * 641])
