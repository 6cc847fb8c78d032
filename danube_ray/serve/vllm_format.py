"""vLLM's words for what an engine is asked and answers: its completions API, as dictionaries, without vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from danube_ray.serve.engines import Delta, EngineError, EngineRejected, Sampling, TokenLogprob

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
        request["structured_outputs"] = {"json": sampling.json_schema}
    return request


def scoring(prompt: Sequence[int], top: int, model: str) -> dict[str, Any]:
    """The fields of a `CompletionRequest` for the log-probabilities of the prompt; vLLM can't draw no token at all."""
    return {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top}


def deltas(events: Iterator[str], num_tokens: int = 0) -> Iterator[Delta]:
    """What server-sent events of a stream tell, each as a delta, counted on from `num_tokens`."""
    for event in events:
        for line in event.splitlines():
            data = line.removeprefix("data: ").strip()
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise failure(chunk["error"])
            for choice in chunk["choices"]:
                num_tokens += len(choice.get("token_ids") or ())
                reason = choice.get("finish_reason")
                if reason not in (None, "stop", "length"):
                    raise EngineError(f"vLLM ended the answer with {reason!r}")
                yield Delta(choice["text"], num_tokens, reason, tuple(drawn(choice.get("logprobs"))))


def drawn(logprobs: Mapping[str, Any] | None) -> Iterator[TokenLogprob]:
    """The tokens of one chunk's `logprobs`."""
    if logprobs is None:
        return
    tops = logprobs["top_logprobs"] or [None] * len(logprobs["tokens"])
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True):
        likeliest = sorted(((token_id(name), other) for name, other in (top or {}).items()), key=lambda pair: -pair[1])
        yield TokenLogprob(token_id(token), value, tuple(likeliest))


def scores(prompt: Sequence[int], places: Sequence[Mapping[Any, Any] | None], top: int) -> list[TokenLogprob]:
    """A `CompletionResponse`'s `prompt_logprobs`: for each place the likeliest tokens and the one that stands there."""
    told = []
    for token, place in zip(prompt[1:], places[1:], strict=True):
        found = {int(other): value["logprob"] for other, value in (place or {}).items()}
        likeliest = sorted(found.items(), key=lambda pair: -pair[1])[:top]
        told.append(TokenLogprob(token, found[token], tuple(likeliest)))
    return told


def token_id(token: str) -> int:
    return int(token.removeprefix(TOKEN))


def failure(error: Mapping[str, Any]) -> EngineError:
    """vLLM's error object: a request that can't be met, or an engine that failed."""
    code, message = int(error.get("code") or 500), str(error.get("message") or "unknown error")
    return EngineRejected(message) if 400 <= code < 500 else EngineError(message)
