"""From a request to the answers to draw: token ids, and how. What can't be answered is refused here.

The template is rendered and tokenized by the functions that made the training data, so served token ids equal trained
ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import cast

from danube_ray.config import GateSettings, require_positive
from danube_ray.data.chat import Message, render
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.serve.engines import Sampling
from danube_ray.serve.errors import ApiError
from danube_ray.serve.logprobs import prompt_text
from danube_ray.serve.replies import Choice, Echo
from danube_ray.serve.schema import (
    MAX_EMBEDDING_INPUTS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Prompt,
    listed,
)

COMPLETION_TOKENS = 16  # OpenAI's default there


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model as the gate knows it. `context_tokens` bounds prompt and answer together; `base` is the model that an
    adapter belongs to, whose engine answers for it."""

    tokenizer: Tokenizer
    context_tokens: int
    base: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        require_positive(self, "context_tokens")


def chat_choices(body: ChatRequest, entry: ModelEntry, limits: GateSettings) -> list[Choice]:
    """`n` answers to a conversation."""
    check_number(body.n or 1, limits)
    messages = [cast(Message, {"role": turn.speaker, "content": turn.text}) for turn in body.messages]
    try:
        ids, _ = render(messages, entry.tokenizer, add_generation_prompt=True)
    except ValueError as error:  # an order of roles that the template has no words for
        raise ApiError(400, str(error), param="messages") from None
    max_tokens = answer_tokens(len(ids), body.max_completion_tokens or body.max_tokens, entry, "messages")
    return [Choice(ids, sampling(body, entry, max_tokens, repeat)) for repeat in range(body.n or 1)]


def text_choices(body: CompletionRequest, entry: ModelEntry, limits: GateSettings) -> list[Choice]:
    """`n` continuations of each prompt, those of the first prompt first."""
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens 0 goes with echo: true", param="max_tokens")
    check_number((body.n or 1) * len(listed(body.prompt)), limits)
    wanted = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    choices = []
    for prompt, ids in zip(listed(body.prompt), prompt_ids(body.prompt, entry, "prompt"), strict=True):
        echo = None
        if body.echo:
            echo = Echo(prompt, 1) if isinstance(prompt, str) else Echo(prompt_text(entry.tokenizer, ids), 0)
        max_tokens = answer_tokens(len(ids), wanted, entry, "prompt")
        choices += [Choice(ids, sampling(body, entry, max_tokens, repeat), echo) for repeat in range(body.n or 1)]
    return choices


def embedding_inputs(body: EmbeddingRequest, entry: ModelEntry) -> list[list[int]]:
    """Token ids of each input."""
    if (count := len(listed(body.input))) > MAX_EMBEDDING_INPUTS:
        raise ApiError(400, f"{count} inputs, at most {MAX_EMBEDDING_INPUTS} at once", param="input")
    inputs = prompt_ids(body.input, entry, "input")
    for ids in inputs:
        answer_tokens(len(ids), 0, entry, "input")
    return inputs


def prompt_ids(prompts: Prompt, entry: ModelEntry, param: str) -> list[list[int]]:
    """Token ids of each prompt: text as training saw a document's begin, ids as they are."""
    tokenizer = entry.tokenizer
    all_ids = [[tokenizer.bos_id, *tokenizer.encode(p)] if isinstance(p, str) else p for p in listed(prompts)]
    if not all_ids or not all(all_ids):
        raise ApiError(400, f"there must be a {param}, and none without tokens", param=param)
    if not all(0 <= token < tokenizer.vocab_size for ids in all_ids for token in ids):
        raise ApiError(400, f"token ids must lie in 0..{tokenizer.vocab_size - 1}", param=param)
    return all_ids


def check_number(num_choices: int, limits: GateSettings) -> None:
    if num_choices > limits.max_choices:
        raise ApiError(400, f"{num_choices} answers asked, at most {limits.max_choices} at once", param="n")


def answer_tokens(prompt_tokens: int, wanted: int | None, entry: ModelEntry, param: str) -> int:
    """How long an answer may become. `wanted` is an upper bound: where the context holds less beside the prompt, the
    answer ends with "length". A prompt that leaves no room at all is an error."""
    context = entry.context_tokens
    if wanted is not None and wanted > context:
        raise ApiError(400, f"max_tokens is {wanted}, the model's context is {context}", param="max_tokens")
    room, least = context - prompt_tokens, 0 if wanted == 0 else 1
    if room < least:
        message = f"the prompt has {prompt_tokens} tokens, the model's context of {context} must hold it and the answer"
        raise ApiError(400, message, code="context_length_exceeded", param=param)
    return room if wanted is None else min(wanted, room)


def sampling(body: ChatRequest | CompletionRequest, entry: ModelEntry, max_tokens: int, repeat: int) -> Sampling:
    """A request's wishes, with OpenAI's defaults for those it leaves out. Repeated answers have seeds of their own."""
    named = ("temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in named if (value := getattr(body, name)) is not None}
    return Sampling(
        max_tokens=max_tokens,
        seed=None if body.seed is None else body.seed + repeat,
        stop=body.stop_texts,
        logprobs=body.num_logprobs,
        json_schema=body.json_schema,
        adapter=body.model if entry.base else None,
        **given,
    )
