from __future__ import annotations

import json
from typing import Any

import pytest

from danube_ray.serve.engines import Delta, EngineError, EngineRejected, Sampling, TokenLogprob
from danube_ray.serve.vllm_format import completion, deltas, scores


def event(text: str, ids: list[int], reason: str | None = None, logprobs: dict[str, Any] | None = None) -> str:
    choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": reason, "logprobs": logprobs}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def test_a_stream_becomes_deltas():
    logprobs = {
        "tokens": ["token_id:7"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"token_id:9": -2.0, "token_id:7": -0.5}],
    }
    events = [
        event("The ", [7], logprobs=logprobs),
        event("Danube", [8, 9]) + event("", [], "length"),
        "data: [DONE]\n\n",
    ]
    assert list(deltas(iter(events))) == [
        Delta("The ", 1, None, (TokenLogprob(7, -0.5, ((7, -0.5), (9, -2.0))),)),
        Delta("Danube", 3),
        Delta("", 3, "length"),
    ]


@pytest.mark.parametrize(("code", "kind"), [(400, EngineRejected), (500, EngineError)])
def test_an_error_in_the_stream_is_raised_as_what_it_is(code: int, kind: type[EngineError]):
    error = f"data: {json.dumps({'error': {'message': 'no such schema', 'code': code}})}\n\n"
    with pytest.raises(EngineError, match="no such schema") as caught:
        list(deltas(iter([error])))
    assert type(caught.value) is kind


def test_an_end_that_is_none_is_an_error():
    with pytest.raises(EngineError, match="abort"):
        list(deltas(iter([event("", [], "abort")])))


def test_scores_are_of_the_tokens_that_stand_there():
    places = [None, {5: {"logprob": -3.0}, 2: {"logprob": -0.1}}, {6: {"logprob": -0.2}}]
    assert scores([1, 5, 6], places, 1) == [TokenLogprob(5, -3.0, ((2, -0.1),)), TokenLogprob(6, -0.2, ((6, -0.2),))]


def test_an_adapter_takes_the_models_place():
    assert completion([1], Sampling(max_tokens=1, adapter="polite"), "chat")["model"] == "polite"
    assert "logprobs" not in completion([1], Sampling(max_tokens=1), "chat")
