from __future__ import annotations

import asyncio
import re
from contextlib import aclosing
from pathlib import Path

import pytest

from danube_ray.config import ConfigError, ServedModel
from danube_ray.inference.gguf import GgufModel
from danube_ray.serve.engines import Delta, EngineRejected, LlamaCppEngine, Sampling
from danube_ray.serve.gate import ModelEntry

PROMPT = [1, 300, 301, 302, 303]
GREEDY = Sampling(max_tokens=24, temperature=0)


def answer(engine: LlamaCppEngine, sampling: Sampling, prompt: list[int] = PROMPT) -> list[Delta]:
    async def collect() -> list[Delta]:
        return [delta async for delta in engine.generate(prompt, sampling)]

    return asyncio.run(collect())


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_deltas_count_tokens_and_only_the_last_one_ends(engine: LlamaCppEngine):
    deltas = answer(engine, GREEDY)
    counts = [delta.num_tokens for delta in deltas]
    assert counts == sorted(counts) and counts[-1] == 24
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_tokens_share_deltas(engine: LlamaCppEngine):
    deltas = answer(engine, Sampling(max_tokens=400, temperature=0))
    assert deltas[0].num_tokens < 400, "the first piece must not wait for the whole answer"
    assert 2 <= len(deltas) <= 200, "400 tokens of well under 20 ms each travel in far fewer messages"


@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_greedy_answers_are_those_that_evaluation_measures(
    engine: LlamaCppEngine, served: ServedModel, entry: ModelEntry, penalty: float
):
    prompt = entry.tokenizer.encode("The Danube")
    with GgufModel(served.weights, context_length=256) as model:
        ids = model.generate(prompt, 24, repetition_penalty=penalty)
    sampling = Sampling(max_tokens=24, temperature=0, repetition_penalty=penalty)
    expected = entry.tokenizer.decode(ids)
    assert text(answer(engine, sampling, prompt)).strip("\ufffd ") == expected.strip("\ufffd ")


def test_a_seed_repeats_an_answer(engine: LlamaCppEngine):
    first, again, other = (text(answer(engine, Sampling(max_tokens=16, seed=seed))) for seed in (7, 7, 8))
    assert first == again != other


def test_stop_text_ends_the_answer_before_it(engine: LlamaCppEngine):
    whole = text(answer(engine, Sampling(max_tokens=200, seed=1)))
    stop = re.findall(r"[a-z]{3}", whole)[3]
    deltas = answer(engine, Sampling(max_tokens=200, seed=1, stop=("never said", stop)))
    assert text(deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"


def test_leaving_frees_the_slot(served: ServedModel, entry: ModelEntry):
    """With one slot, an answer of minutes that was left must not stand before the next one."""
    engine = LlamaCppEngine(served.weights, entry.context_tokens, num_slots=1, num_threads=1)

    async def leave_and_ask() -> list[Delta]:
        async with aclosing(engine.generate(PROMPT, Sampling(max_tokens=60_000))) as deltas:
            await anext(deltas)
        return [delta async for delta in engine.generate(PROMPT, GREEDY)]

    assert asyncio.run(leave_and_ask())[-1].num_tokens == 24
    engine.close()


def test_what_llama_cpp_refuses_is_rejected(engine: LlamaCppEngine):
    with pytest.raises(EngineRejected, match="invalid tokens"):
        answer(engine, GREEDY, [1, 10**6])


def test_every_slot_has_the_whole_context(engine: LlamaCppEngine, entry: ModelEntry):
    with pytest.raises(EngineRejected, match=f"context size \\({entry.context_tokens} tokens\\)"):
        answer(engine, GREEDY, [5] * (entry.context_tokens + 1))


def test_a_file_that_is_no_gguf_is_one_clear_error(tmp_path: Path):
    (tmp_path / "model.gguf").write_text("no model")
    with pytest.raises(ConfigError, match=r"model\.gguf"):
        LlamaCppEngine(tmp_path / "model.gguf", 64)
