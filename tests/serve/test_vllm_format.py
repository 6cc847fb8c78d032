from __future__ import annotations

import json
from typing import Any

import pytest

from danube_ray.serve.engines import Delta, EngineError, EngineRejected, Sampling, TokenLogprob
from danube_ray.serve.vllm_format import completion, delta, scores, scoring


def event(text: str, ids: list[int], reason: str | None = None, logprobs: dict[str, Any] | None = None) -> str:
    choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": reason, "logprobs": logprobs}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def logprobs(token: int, value: float, others: dict[int, float]) -> dict[str, Any]:
    top = {f"token_id:{other}": logprob for other, logprob in {token: value, **others}.items()}
    return {"tokens": [f"token_id:{token}"], "token_logprobs": [value], "top_logprobs": [top]}


def test_what_came_together_is_one_delta():
    """vLLM names the drawn token beside the likeliest, so one more than was asked for where it is none of them."""
    events = [
        event("The ", [7], logprobs=logprobs(7, -0.5, {9: -2.0})),
        event("Danube", [8], logprobs=logprobs(8, -3.0, {4: -0.1, 5: -0.2})) + event("", [], "length"),
        "data: [DONE]\n\n",
    ]
    told = (TokenLogprob(7, -0.5, ((7, -0.5), (9, -2.0))), TokenLogprob(8, -3.0, ((4, -0.1), (5, -0.2))))
    assert delta(events, 5, 2) == Delta("The Danube", 7, "length", told)
    assert delta(["data: [DONE]\n\n"], 7, 2) is None


def test_the_token_that_ends_an_answer_counts_and_is_not_told():
    events = [event("Yes", [7], logprobs=logprobs(7, -0.5, {})), event("", [2], "stop", logprobs(2, -0.1, {}))]
    assert delta(events, 0, 0) == Delta("Yes", 2, "stop", (TokenLogprob(7, -0.5),))


@pytest.mark.parametrize(("code", "kind"), [(400, EngineRejected), (500, EngineError)])
def test_an_error_in_the_stream_is_raised_as_what_it_is(code: int, kind: type[EngineError]):
    error = f"data: {json.dumps({'error': {'message': 'no such schema', 'code': code}})}\n\n"
    with pytest.raises(EngineError, match="no such schema") as caught:
        delta([error], 0, None)
    assert type(caught.value) is kind


def test_an_end_that_is_none_is_an_error():
    with pytest.raises(EngineError, match="abort"):
        delta([event("", [], "abort")], 0, None)


def test_scores_are_of_the_tokens_that_stand_there():
    """The last token of the prompt is drawn, the others are read."""
    sent = scoring([1, 5, 6, 7], 1, "chat")
    assert (sent["prompt"], sent["allowed_token_ids"], sent["max_tokens"]) == ([1, 5, 6], [7], 1)
    read = [None, {5: {"logprob": -3.0}, 2: {"logprob": -0.1}}, {6: {"logprob": -0.2}}]
    choice = {"prompt_logprobs": read, "logprobs": logprobs(7, -0.4, {3: -0.3})}
    assert scores([1, 5, 6, 7], choice, 1) == [
        TokenLogprob(5, -3.0, ((2, -0.1),)),
        TokenLogprob(6, -0.2, ((6, -0.2),)),
        TokenLogprob(7, -0.4, ((3, -0.3),)),
    ]


def test_an_adapter_takes_the_models_place():
    assert completion([1], Sampling(max_tokens=1, adapter="polite"), "chat")["model"] == "polite"
    assert "logprobs" not in completion([1], Sampling(max_tokens=1), "chat")


def test_any_object_is_an_object():
    sent = completion([1], Sampling(max_tokens=1, json_schema="{}"), "chat")
    assert json.loads(sent["structured_outputs"]["json"]) == {"type": "object"}
