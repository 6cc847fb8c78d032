"""Requests of the OpenAI API as they may come in.

They are strict: a wrong type, an unknown field or one that would have to be ignored is an error, never a guess. Lists
fail at their first wrong item: a report on each of a million would hold up every other answer for seconds.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from danube_ray.serve.json_schemas import bounded

MAX_LOGPROBS = 20  # OpenAI's bound for chat
MAX_EMBEDDING_INPUTS = 2_048  # OpenAI's as well


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text: `ValueError` here instead of a crash further in."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
Prompt = Text | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)]  # text or token ids, one or several
NotServed = Annotated[None, Field(description="Not served: anything but null is an error.")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # padding against eavesdroppers, which there is none of


class TextFormat(_Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Strict):
    """A schema with a name. It always constrains the answer, whatever `strict` says."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    definition: Annotated[dict[str, Any], AfterValidator(bounded)] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(_Strict):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class GenerationRequest(_Strict):
    """What chat and plain completions have in common; null means the default, as with OpenAI."""

    model: Text
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Clients send these; they have no meaning here and change nothing.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    logit_bias: NotServed = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @field_validator("stream_options")
    @classmethod
    def _need_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("goes with stream: true")
        return options


class TextPart(BaseModel):
    """One text of a message given in parts."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn. Other fields are let through: clients send back the messages they got, with fields of their own."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def speaker(self) -> str:
        return "system" if self.role == "developer" else self.role  # OpenAI's newer name for the same thing

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    kind: ClassVar[Literal["chat"]] = "chat"

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: NotServed = None
    tool_choice: NotServed = None
    parallel_tool_calls: NotServed = None
    functions: NotServed = None
    function_call: NotServed = None
    modalities: NotServed = None
    audio: NotServed = None
    prediction: NotServed = None
    reasoning_effort: NotServed = None
    verbosity: NotServed = None
    web_search_options: NotServed = None

    @property
    def asked(self) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.text} for turn in self.messages]

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def json_schema(self) -> str | None:
        """The schema as JSON text; "{}" is any object."""
        match self.response_format:
            case JsonObjectFormat():
                return "{}"
            case JsonSchemaFormat(json_schema=schema):
                return json.dumps(schema.definition)
        return None

    @field_validator("top_logprobs")
    @classmethod
    def _need_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and not info.data.get("logprobs"):
            raise ValueError("goes with logprobs: true")
        return count


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: text or token ids, one prompt or several, continued as they stand.

    With `echo` the prompt is part of the answer, with `logprobs` also its log-probabilities. `max_tokens` 0 with it
    gives the prompt's alone.
    """

    kind: ClassVar[Literal["text"]] = "text"

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Literal[1] | None = None
    suffix: NotServed = None

    @property
    def asked(self) -> Prompt:
        return self.prompt

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def json_schema(self) -> str | None:
        return None


class EmbeddingRequest(_Strict):
    """`POST /v1/embeddings`: text or token ids, one input or several."""

    model: Text
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


def listed(prompt: Prompt) -> list[str | list[int]]:
    """One prompt or several, as a list of them."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]
