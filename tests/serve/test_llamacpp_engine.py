from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import aclosing
from pathlib import Path

import pytest

from danube_ray.config import ConfigError, ServedModel
from danube_ray.inference.gguf import GgufModel
from danube_ray.serve.engines import Delta, EngineError, EngineRejected, Sampling, TokenLogprob
from danube_ray.serve.gate import ModelEntry
from danube_ray.serve.llamacpp_engine import LlamaCppEngine
from tests.serve.asking import GREEDY, PROMPT, answer, text


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


def test_who_leaves_frees_what_they_held_at_any_stage(served: ServedModel, entry: ModelEntry):
    """200 answers of minutes, left while queued, in their prompt of a minute, or while they are written."""
    engine = LlamaCppEngine(served.weights, entry.context_tokens, num_slots=2, num_threads=1)
    long = [5 + place % 500 for place in range(60_000)]

    async def leave(stage: int) -> None:
        stream = engine.generate(long if stage == 1 else PROMPT, Sampling(max_tokens=5_000, seed=stage))
        async with aclosing(stream):
            first = asyncio.ensure_future(anext(stream))
            if stage == 2:
                await first
            else:
                await asyncio.sleep(0)
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)

    async def everyone() -> None:
        threads = set()
        for part in range(10):
            await asyncio.gather(*(leave(place % 3) for place in range(20)))
            threads.add(threading.active_count())
            if part == 0:
                assert (await anext(engine.generate(PROMPT, GREEDY))).num_tokens > 0
        assert len(threads) <= 2
        while engine.stats()["busy"] or engine.stats()["queued"]:
            await asyncio.sleep(0.01)
        assert [delta async for delta in engine.generate(PROMPT, GREEDY)][-1].num_tokens == 24

    asyncio.run(everyone())
    engine.close()


def test_a_score_that_nobody_waits_for_ends(served: ServedModel, entry: ModelEntry):
    engine = LlamaCppEngine(served.weights, entry.context_tokens, num_slots=1, num_threads=1)

    async def leave_and_ask() -> list[TokenLogprob]:
        await engine.score([1, 5])  # the model is loaded
        for _ in range(5):
            minutes = asyncio.ensure_future(engine.score([5 + place % 500 for place in range(60_000)]))
            await asyncio.sleep(0)
            minutes.cancel()
            await asyncio.gather(minutes, return_exceptions=True)
        return await engine.score([1, 5])

    assert len(asyncio.run(leave_and_ask())) == 1
    engine.close()


def test_stats_count_answers_and_those_that_wait(served: ServedModel, entry: ModelEntry):
    engine = LlamaCppEngine(served.weights, entry.context_tokens, num_slots=1, num_threads=1)

    async def two() -> None:
        first, second = (engine.generate(PROMPT, Sampling(max_tokens=60_000)) for _ in range(2))
        async with aclosing(first), aclosing(second):
            await anext(first)
            waiting = asyncio.ensure_future(anext(second))
            await asyncio.sleep(0)
            assert engine.stats() == {"slots": 1, "busy": 1, "queued": 1}
            await first.aclose()
            await waiting
            assert engine.stats() == {"slots": 1, "busy": 1, "queued": 0}

    asyncio.run(two())
    engine.close()


def test_closing_ends_answers_under_way_with_an_error(served: ServedModel, entry: ModelEntry):
    engine = LlamaCppEngine(served.weights, entry.context_tokens, num_slots=1, num_threads=1)

    async def closed_on() -> None:
        streams = [engine.generate(PROMPT, Sampling(max_tokens=60_000)) for _ in range(2)]
        await anext(streams[0])
        waiting = asyncio.ensure_future(anext(streams[1]))
        score = asyncio.ensure_future(engine.score([5] * 60_000))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
        for work in (streams[0].__anext__(), waiting, score, anext(engine.generate(PROMPT, GREEDY))):
            with pytest.raises(EngineError):
                while True:
                    await work
                    work = streams[0].__anext__()

    asyncio.run(closed_on())
    engine.close()


def test_signals_stay_with_who_had_them(served: ServedModel):
    """llama.cpp's server would take Ctrl+C for itself, and the process would go on without an engine."""
    engine = LlamaCppEngine(served.weights, 64, num_slots=1, num_threads=1)
    heard = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: heard.set())
    again = LlamaCppEngine(served.weights, 64, num_slots=1, num_threads=1)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(10)
        assert answer(engine, GREEDY)[-1].num_tokens == answer(again, GREEDY)[-1].num_tokens == 24
    finally:
        signal.signal(signal.SIGTERM, before)
        engine.close()
        again.close()


def test_what_llama_cpp_refuses_is_rejected(engine: LlamaCppEngine):
    with pytest.raises(EngineRejected, match="invalid tokens"):
        answer(engine, GREEDY, [1, 10**6])


def test_every_slot_has_the_whole_context(engine: LlamaCppEngine, entry: ModelEntry):
    with pytest.raises(EngineRejected, match=f"context size \\({entry.context_tokens} tokens\\)"):
        answer(engine, GREEDY, [5] * (entry.context_tokens + 1))


def test_a_file_that_is_no_model_is_one_clear_error(served: ServedModel, tmp_path: Path):
    whole = served.weights.read_bytes()
    for name, data in (("text", b"no model"), ("empty", b""), ("torn", whole[:-1000]), ("header", whole[:2000])):
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(ConfigError, match=rf"{name}\.gguf"):
            LlamaCppEngine(tmp_path / f"{name}.gguf", 64)
    with pytest.raises(ConfigError, match="an existing file"):
        LlamaCppEngine(tmp_path / "missing.gguf", 64)


def test_a_model_that_does_not_fit_is_one_clear_error(served: ServedModel):
    """25 GB of keys and values where 4 GB of memory are: no crash."""
    code = f"""
import resource
from pathlib import Path
from danube_ray.config import ConfigError
from danube_ray.serve.llamacpp_engine import LlamaCppEngine
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
try:
    LlamaCppEngine(Path({str(served.weights)!r}), 50_000_000, num_slots=1, num_threads=1)
except ConfigError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "model.gguf" in ended.stdout
