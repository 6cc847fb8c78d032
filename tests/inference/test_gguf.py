from __future__ import annotations

import numpy as np
import pytest

from danube_ray.config import ConfigError
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.inference.gguf import DECODE_TOKENS, GgufModel, Interrupted
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.inference.scoring import log_softmax
from danube_ray.quantize.gguf import convert
from tests.models import tiny_model

LOGIT_TOLERANCE = 0.01  # llama.cpp keeps keys and values in 16 bits


def some_ids(count, seed=0):
    return np.random.default_rng(seed).integers(3, 512, count).tolist()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_heads": 4, "num_kv_heads": 4},
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 80},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 96},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 120},
        {"sliding_window": 64},
        {"tied_embeddings": True},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(sizes, tmp_path):
    folder = tiny_model(tmp_path / "model", **sizes)
    convert(folder, tmp_path / "F32.gguf", "F32")
    with GgufModel(tmp_path / "F32.gguf") as model:
        assert model.context_length == sizes.get("sliding_window", 256)
        ids = some_ids(model.context_length)
        expected = HuggingFaceModel(folder).logits(ids)
        assert expected.std() > 0.5
        assert np.abs(model.logits(ids) - expected).max() <= LOGIT_TOLERANCE


def test_a_prompt_longer_than_one_decode_call_is_scored_as_one(gguf_file, model_folder):
    ids = some_ids(DECODE_TOKENS + 88)
    batch = [ids, ids[:7], ids[: DECODE_TOKENS + 1], ids[:1]]
    expected = HuggingFaceModel(model_folder).log_probs(batch)
    with GgufModel(gguf_file) as model:
        found = model.log_probs(batch)
    assert [part.shape for part in found] == [(len(row) - 1,) for row in batch]
    for part, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, wanted, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.5])
def test_greedy_takes_what_transformers_holds_likeliest(repetition_penalty, gguf_file, model_folder):
    reference = HuggingFaceModel(model_folder)
    with GgufModel(gguf_file) as model:
        ids = some_ids(8)
        answer = model.generate(ids, 24, repetition_penalty=repetition_penalty)
    assert len(answer) == 24
    for token in answer:
        logits = reference.logits(ids)[-1]
        for seen in set(ids):
            logits[seen] *= repetition_penalty if logits[seen] < 0 else 1 / repetition_penalty
        assert logits[token] >= logits.max() - 2 * LOGIT_TOLERANCE  # two logits may tie within the tolerance of each
        ids.append(token)


def test_an_answer_ends_before_the_end_of_sequence_id_and_at_the_end_of_the_context(gguf_file):
    with GgufModel(gguf_file, context_length=16) as model:
        first, second, *_ = model.generate(some_ids(8), 4)
        model.eos_id = second
        assert model.generate(some_ids(8), 4) == [first]
        model.eos_id = -1
        assert len(model.generate(some_ids(8), 100)) == 8
        assert model.generate(some_ids(16), 100) == []


def test_a_seed_repeats_a_drawn_answer_and_another_draws_another(gguf_file):
    with GgufModel(gguf_file) as model:
        answers = [model.generate(some_ids(4), 16, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_what_can_not_run_is_named_before_it_starts(gguf_file, tmp_path):
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf_file.read_bytes()[:20_000])
    with pytest.raises(ConfigError, match=r"torn\.gguf"):
        GgufModel(torn)
    with pytest.raises(ConfigError, match="an existing file"):
        GgufModel(tmp_path / "missing.gguf")
    with pytest.raises(ConfigError, match="context_length is 641, allowed is 1 to 640"):
        GgufModel(gguf_file, context_length=641)
    with GgufModel(gguf_file) as model, pytest.raises(ConfigError, match="number of tokens is 641"):
        model.logits(some_ids(641))


def test_scores_tell_the_likeliest_tokens_of_each_place(gguf_file, model_folder):
    ids = some_ids(DECODE_TOKENS + 88)
    expected = log_softmax(HuggingFaceModel(model_folder).logits(ids))
    with GgufModel(gguf_file) as model:
        scores = model.score(ids, 4)
        everything = model.score(ids[:3], 10**6)
    rows = np.arange(len(ids) - 1)
    np.testing.assert_allclose(scores.log_probs, expected[rows, ids[1:]], atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(scores.top_log_probs, np.sort(expected[:-1])[:, :-5:-1], atol=LOGIT_TOLERANCE)
    told = np.take_along_axis(expected[:-1], scores.top_ids, axis=1)
    np.testing.assert_allclose(scores.top_log_probs, told, atol=LOGIT_TOLERANCE)
    assert everything.top_ids.shape == (2, 512)
    assert scores.pairs()[7][0] == (scores.top_ids[7, 0], pytest.approx(scores.top_log_probs[7, 0]))


def test_a_prompt_goes_on_from_what_it_shares_with_the_one_before(gguf_file):
    shared, first, second = some_ids(40), some_ids(20, seed=1), some_ids(30, seed=2)
    with GgufModel(gguf_file, decode_tokens=16) as model, GgufModel(gguf_file) as fresh:
        model.score(shared + first)
        for rest in (second, first, second[:1]):
            found = model.score(shared + rest, 2, first=40)
            wanted = fresh.score(shared + rest, 2)
            np.testing.assert_allclose(found.log_probs, wanted.log_probs[39:], atol=LOGIT_TOLERANCE)
        np.testing.assert_allclose(
            model.logits(shared + first, [3, 50]), fresh.logits(shared + first)[[3, 50]], atol=LOGIT_TOLERANCE
        )


def test_a_long_prompt_stops_when_told_and_the_next_one_is_whole(gguf_file):
    ids, asked = some_ids(600), []

    def stop():
        asked.append(True)
        return len(asked) == 3

    with GgufModel(gguf_file, decode_tokens=64) as model:
        expected = model.score(ids).log_probs
        model.use_adapter(None)
        with pytest.raises(Interrupted):
            model.score(ids[::-1], stop=stop)
        np.testing.assert_allclose(model.score(ids).log_probs, expected, atol=LOGIT_TOLERANCE)


def test_an_embedding_is_the_mean_of_the_last_hidden_states(gguf_file, model_folder):
    import torch
    from transformers import AutoModelForCausalLM

    ids = some_ids(100)
    with torch.inference_mode():
        states = AutoModelForCausalLM.from_pretrained(model_folder).model(torch.tensor([ids])).last_hidden_state[0]
    expected = states.mean(0).numpy()
    with GgufModel(gguf_file, decode_tokens=32) as model:
        before = model.score(ids).log_probs
        found = model.embed(ids)
        np.testing.assert_allclose(model.score(ids).log_probs, before, atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-3)


def test_pieces_and_bytes_are_the_tokenizers(gguf_file, model_folder):
    tokenizer = Tokenizer.load(model_folder)
    with GgufModel(gguf_file) as model:
        assert model.byte_ids == {byte: tokenizer.pieces.index(f"<0x{byte:02X}>") for byte in range(256)}
        ids = tokenizer.encode("Żółć, the Danube 🌊")
        assert b"".join(map(model.piece, ids)).decode() == " Żółć, the Danube 🌊"
        assert model.piece(model.eos_id) == b""
