"""The part of the OpenAI API that is served: requests as they may come in, answers as they go out.

Requests are strict: a wrong type, an unknown field or one that would have to be ignored is an error, never a guess.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from danube_ray.serve.engines import FinishReason


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text: `ValueError` here instead of a crash further in."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool = False


class ResponseFormat(_Strict):
    """Free text is the only form so far."""

    type: Literal["text"]


class GenerationRequest(_Strict):
    """What chat and plain completions have in common; null means the default, as with OpenAI."""

    model: Text
    max_tokens: int | None = Field(None, ge=1)
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

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    """One text of a message given in parts."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn. Other fields are let through: clients send back the messages they got, with fields of their own."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def speaker(self) -> str:
        return "system" if self.role == "developer" else self.role  # OpenAI's newer name for the same thing

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: text or token ids, one prompt or several, continued as they stand."""

    prompt: Text | list[int] | list[Text] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The envelope that every chunk of one answer shares."""

    kind: Literal["chat", "text"]
    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def chunk(self, index: int, text: str, reason: FinishReason | None, *, first: bool) -> dict[str, Any]:
        """One event of a stream; a chat answer's first names the role."""
        if self.kind == "chat":
            role = {"role": "assistant"} if first else {}
            choice = {"index": index, "delta": {**role, "content": text}, "logprobs": None, "finish_reason": reason}
        else:
            choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        return self._envelope([choice], "chat.completion.chunk")

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The event that `stream_options.include_usage` asks for, after the last choice has ended."""
        return {**self._envelope([], "chat.completion.chunk"), "usage": self.usage(completion_tokens)}

    def whole(self, texts: list[str], reasons: list[FinishReason], completion_tokens: int) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {"index": index, "logprobs": None, "finish_reason": reason, **self._content(text)}
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._envelope(choices, "chat.completion"), "usage": self.usage(completion_tokens)}

    def _content(self, text: str) -> dict[str, Any]:
        if self.kind == "chat":
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"text": text}

    def _envelope(self, choices: list[dict[str, Any]], chat_object: str) -> dict[str, Any]:
        chat = self.kind == "chat"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": chat_object if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
