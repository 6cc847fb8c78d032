"""Answers of the OpenAI API: what goes out, and what the server's own description of itself says of it."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic, which describes these, wants this one on Python 3.11

from danube_ray.serve.engines import FinishReason


class Usage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LikelyToken(TypedDict):
    """A token that could have stood at some place."""

    token: str
    logprob: float
    bytes: list[int]


class ToldToken(LikelyToken):
    """A token of an answer, and the likeliest ones at its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(TypedDict):
    """Log-probabilities (nats) beside a message."""

    content: list[ToldToken]
    refusal: None


class TextLogprobs(TypedDict):
    """The same beside a completion, as four lists of one length. Nothing stands before a prompt's first token, so it
    has none; `text_offset` counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Message(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One of `n` answers."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The answer of `/v1/chat/completions` in one piece."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(TypedDict):
    """One of `n` continuations of a prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class Completion(TypedDict):
    """The answer of `/v1/completions` in one piece."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(TypedDict):
    """One input's vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens of an embedding request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    """The answer of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(TypedDict):
    """A model or an adapter. `parent` is the model that an adapter belongs to and `root` the one that answers, as in
    vLLM, whose word for the context `max_model_len` is too."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """The answer of `/health`."""

    status: Literal["ok"]
    models: list[str]


class Problem(TypedDict):
    """What went wrong, and the parameter at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """Every answer but 200."""

    error: Problem


def described(answer: type[Any] | None = None, *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What an endpoint may answer, for its description: `answer`, perhaps as a stream of it, or an error."""
    statuses = {
        400: "The request can't be served as it is.",
        401: "No API key, or a wrong one.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too many requests; `retry-after` says when to come again.",
        503: "Every slot is taken or the engine was lost; `retry-after` says when to come again.",
        "default": "Anything else that went wrong.",
    }
    errors = {status: {"model": ErrorBody, "description": text} for status, text in statuses.items()}
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # OpenAPI 3.2's way
    stream = {"content": {"text/event-stream": {"itemSchema": event}}} if streams else {}
    return {200: {"description": "The answer.", "model": answer, **stream}, **errors}
