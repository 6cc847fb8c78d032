"""vLLM's words for what an engine is asked and answers: its completions API, as dictionaries, without vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from danube_ray.serve.engines import Delta, EngineError, EngineRejected, Sampling, TokenLogprob

ANY_OBJECT = '{"type": "object"}'
TOKEN = "token_id:"  # what `return_tokens_as_token_ids` puts in front of an id, in the place of the token's text


def completion(prompt: Sequence[int], sampling: Sampling, model: str) -> dict[str, Any]:
    """The fields of a streamed `CompletionRequest`. What nobody asked for is set all the same: a model folder's
    generation_config.json would decide it otherwise."""
    request: dict[str, Any] = {
        "model": sampling.adapter or model,
        "prompt": list(prompt),
        "stream": True,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(sampling.stop),
        "return_token_ids": True,
    }
    if sampling.seed is not None:
        request["seed"] = sampling.seed
    if sampling.logprobs is not None:
        request |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.json_schema is not None:
        schema = sampling.json_schema if sampling.json_schema != "{}" else ANY_OBJECT  # to vLLM "{}" is any value
        request["structured_outputs"] = {"json": schema}
    return request


def scoring(prompt: Sequence[int], top: int, model: str) -> dict[str, Any]:
    """The fields of a `CompletionRequest` for the log-probabilities of the prompt, of two tokens or more.

    vLLM can't draw no token at all, so its last one is drawn: then a prompt as long as the context fits. What vLLM
    tells of a drawn token is from before it was told that no other is allowed.
    """
    return {
        "model": model,
        "prompt": list(prompt[:-1]),
        "max_tokens": 1,
        "temperature": 0.0,
        "allowed_token_ids": [prompt[-1]],
        "prompt_logprobs": top,
        "logprobs": top,
        "return_tokens_as_token_ids": True,
    }


def delta(events: Iterable[str], num_tokens: int, top: int | None) -> Delta | None:
    """What server-sent events of a stream tell together, after `num_tokens`; None for no more than its end.

    `top` is `Sampling.logprobs`. Of a stop text that is several tokens only the last one is not told.
    """
    text, reason, told = "", None, []
    choices = list(chosen(events))
    for choice in choices:
        text += choice["text"]
        num_tokens += len(choice.get("token_ids") or ())
        reason = choice.get("finish_reason")
        if reason not in (None, "stop", "length"):
            raise EngineError(f"vLLM ended the answer with {reason!r}")
        told += drawn(choice.get("logprobs"), top or 0)
    if reason == "stop" and told:
        told.pop()
    return Delta(text, num_tokens, reason, tuple(told)) if choices else None


def chosen(events: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The choices in server-sent events; an error among them is raised as what it means."""
    for event in events:
        for line in event.splitlines():
            data = line.removeprefix("data: ").strip()
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise failure(chunk["error"])
            yield from chunk["choices"]


def drawn(logprobs: Mapping[str, Any] | None, top: int) -> Iterator[TokenLogprob]:
    """The tokens of one choice's `logprobs`, where vLLM puts a drawn token beside the `top` likeliest."""
    if logprobs is None:
        return
    columns = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    for token, value, others in zip(*columns, strict=True):
        found = {token_id(name): other for name, other in others.items()}
        yield TokenLogprob(token_id(token), value, likeliest(found, top))


def scores(prompt: Sequence[int], choice: Mapping[str, Any], top: int) -> list[TokenLogprob]:
    """The one choice of what `scoring` asked for: for each place the likeliest tokens and the one that stands there."""
    told = []
    for token, place in zip(prompt[1:-1], choice["prompt_logprobs"][1:], strict=True):
        found = {int(other): value["logprob"] for other, value in place.items()}
        told.append(TokenLogprob(token, found[token], likeliest(found, top)))
    return [*told, *drawn(choice["logprobs"], top)]


def likeliest(found: Mapping[int, float], top: int) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(found.items(), key=lambda pair: -pair[1])[:top])


def token_id(token: str) -> int:
    return int(token.removeprefix(TOKEN))


def failure(error: Mapping[str, Any]) -> EngineError:
    """vLLM's error object: a request that can't be met, or an engine that failed."""
    code, message = int(error.get("code") or 500), str(error.get("message") or "unknown error")
    return EngineRejected(message) if 400 <= code < 500 else EngineError(message)
