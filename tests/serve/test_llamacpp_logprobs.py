"""What an engine tells beside its answers: log-probabilities, scores of prompts, embeddings; all with adapters too."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from danube_ray.config import ServedModel
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.scoring import log_softmax
from danube_ray.quantize.adapter import convert_adapter
from danube_ray.quantize.gguf import convert
from danube_ray.serve.engines import EngineRejected, Sampling
from danube_ray.serve.gate import ModelEntry
from danube_ray.serve.llamacpp_engine import LlamaCppEngine
from tests.adapters import tiny_adapter
from tests.models import tiny_model
from tests.serve.asking import GREEDY, PROMPT, answer, text

LOGIT_TOLERANCE = 0.01  # llama.cpp keeps keys and values in 16 bits
ADAPTED_TOLERANCE = 0.03  # and random adapters make them large


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A folder with `base.gguf` and, for each of two adapters, the GGUF of the adapter and of the merged model."""
    folder = tmp_path_factory.mktemp("tuned")
    base = tiny_model(folder / "base")
    convert(base, folder / "base.gguf", "F32")
    adapters = {}
    for seed, name in enumerate(("first", "second")):
        tiny_adapter(base, folder / name, seed=seed, merged=folder / f"{name}-merged", lora_alpha=8)
        convert(folder / f"{name}-merged", folder / f"{name}-merged.gguf", "F32")
        adapters[name] = convert_adapter(folder / name, folder / "base.gguf", folder / f"{name}.gguf")
    return folder, adapters


@pytest.fixture(scope="module")
def tuned_engine(tuned: tuple[Path, dict[str, Path]]) -> Iterator[LlamaCppEngine]:
    folder, adapters = tuned
    engine = LlamaCppEngine(folder / "base.gguf", 256, num_slots=3, num_threads=1, adapters=adapters)
    yield engine
    engine.close()


def test_every_token_of_an_answer_has_its_log_probability(
    engine: LlamaCppEngine, served: ServedModel, entry: ModelEntry
):
    """Those that are but a byte of a character too: random weights draw many, a few of which make one."""
    sampling = Sampling(max_tokens=12, temperature=1.5, repetition_penalty=1.2, logprobs=3)
    bytes_told = 0
    with GgufModel(served.weights) as model:
        for seed in range(300):
            deltas = answer(engine, replace(sampling, seed=seed))
            told = [token for delta in deltas for token in delta.logprobs]
            ids = [token.id for token in told]
            if len(ids) < deltas[-1].num_tokens or (seed > 10 and "\ufffd" in text(deltas)):
                continue  # bytes that make no character are not all told
            bytes_told += sum(entry.tokenizer.pieces[token] > "<0x7F>" for token in ids if 3 <= token < 259)
            assert b"".join(map(model.piece, ids)).decode(errors="replace") == text(deltas)
            expected = log_softmax(model.logits([*PROMPT, *ids])[len(PROMPT) - 1 : -1])
            found = [token.logprob for token in told]
            np.testing.assert_allclose(found, expected[range(len(ids)), ids], atol=LOGIT_TOLERANCE)
            for token, row in zip(told, expected, strict=True):
                best = [score for _, score in token.top]
                np.testing.assert_allclose(best, np.sort(row)[:-4:-1], atol=LOGIT_TOLERANCE)
                assert all(abs(row[other] - score) < LOGIT_TOLERANCE for other, score in token.top)
    assert bytes_told >= 6


def test_log_probabilities_come_with_the_text_of_their_tokens(engine: LlamaCppEngine, served: ServedModel):
    """Text that may be the start of a stop text is held back, and so is what is told of its tokens."""
    with GgufModel(served.weights) as model:
        for seed in range(8):
            whole = text(answer(engine, Sampling(max_tokens=60, seed=seed)))
            stop = re.findall(r"[a-z]{3}", whole)[3]
            sampling = Sampling(max_tokens=60, seed=seed, logprobs=0, stop=(stop, f"{stop[0]}never said"))
            deltas = answer(engine, sampling)
            assert text(deltas) == whole[: whole.index(stop)]
            told = [token for delta in deltas for token in delta.logprobs]
            assert told and all(token.top == () for token in told)
            for delta in deltas:
                first = re.match(r"[ -~]*", delta.text)
                written = b"".join(model.piece(token.id) for token in delta.logprobs)
                assert first and written.startswith(first[0].encode())


def test_no_log_probabilities_unless_asked(engine: LlamaCppEngine):
    assert all(delta.logprobs == () for delta in answer(engine, GREEDY))


def test_the_end_of_an_answer_is_no_token_of_it(engine: LlamaCppEngine):
    schema = json.dumps({"const": "yes"})
    deltas = answer(engine, Sampling(max_tokens=60, temperature=2.0, seed=1, json_schema=schema, logprobs=1))
    assert deltas[-1].finish_reason == "stop"
    assert len([token for delta in deltas for token in delta.logprobs]) == deltas[-1].num_tokens - 1


def test_an_adapter_answers_as_the_model_that_it_was_merged_into(
    tuned: tuple[Path, dict[str, Path]], tuned_engine: LlamaCppEngine
):
    """Several at once too, over and over in the same slots, whose kept prompts are of another adapter."""
    names = (None, "first", "second")
    expected = {}
    for name in names:
        with GgufModel(tuned[0] / (f"{name}-merged.gguf" if name else "base.gguf")) as model:
            ids = model.generate(PROMPT, 24)
            expected[name] = b"".join(map(model.piece, ids)).decode(errors="ignore")  # bytes that make no character
    assert len(set(expected.values())) == 3

    async def all_at_once() -> list[str]:
        async def one(name: str | None) -> str:
            sampling = replace(GREEDY, adapter=name)
            return "".join([delta.text async for delta in tuned_engine.generate(PROMPT, sampling)])

        return await asyncio.gather(*map(one, names))

    for _ in range(3):
        for found, name in zip(asyncio.run(all_at_once()), names, strict=True):
            assert found.replace("\ufffd", "") == expected[name], name
    with pytest.raises(EngineRejected, match="no adapter 'third'"):
        answer(tuned_engine, replace(GREEDY, adapter="third"))


@pytest.mark.parametrize("adapter", [None, "first", "second"])
def test_scores_and_embeddings_are_those_of_transformers(
    tuned: tuple[Path, dict[str, Path]], tuned_engine: LlamaCppEngine, adapter: str | None
):
    import torch
    from transformers import AutoModelForCausalLM

    tolerance = LOGIT_TOLERANCE if adapter is None else ADAPTED_TOLERANCE
    prompt = [1, *range(5, 405, 4)]
    reference = AutoModelForCausalLM.from_pretrained(tuned[0] / (f"{adapter}-merged" if adapter else "base"))
    with torch.inference_mode():
        output = reference(torch.tensor([prompt]), output_hidden_states=True)
    expected = torch.log_softmax(output.logits[0], -1)
    scores = asyncio.run(tuned_engine.score(prompt, 5, adapter))
    assert [token.id for token in scores] == prompt[1:]
    for row, token in zip(expected, scores, strict=False):
        assert abs(row[token.id] - token.logprob) < tolerance
        best = row.topk(5).values.tolist()
        np.testing.assert_allclose([score for _, score in token.top], best, atol=tolerance)
        assert all(abs(row[other] - score) < tolerance for other, score in token.top)
    mean = output.hidden_states[-1][0].mean(0)
    found = torch.tensor(asyncio.run(tuned_engine.embed(prompt, adapter)))
    assert found.norm() == pytest.approx(1)
    assert torch.cosine_similarity(found, mean, dim=0) > 0.999


def test_a_prompt_that_can_not_be_scored_is_rejected(tuned_engine: LlamaCppEngine):
    for prompt in ([], [1] * 257, [1, 512], [-1]):
        for ask in (tuned_engine.score, tuned_engine.embed):
            with pytest.raises(EngineRejected):
                asyncio.run(ask(prompt))
    with pytest.raises(EngineRejected, match="no adapter"):
        asyncio.run(tuned_engine.score([1, 5], adapter="third"))
    assert asyncio.run(tuned_engine.score([1])) == []
    assert [token.top for token in asyncio.run(tuned_engine.score([1, 5]))] == [()]
