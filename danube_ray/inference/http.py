"""A model behind an OpenAI-compatible URL, by the official client."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from danube_ray.config import ConfigError, require

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError

    from danube_ray.data.chat import Message

KEY_VARIABLE = "OPENAI_API_KEY"
# Fields that this project's server and vLLM take beyond OpenAI's own; the client sends them where it is told to.
EXTRA_FIELDS = ("top_k", "repetition_penalty")


@dataclass
class Usage:
    """Tokens of one answer, as the server counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None


@dataclass
class ChatServer:
    """A server at `url`, with or without /v1. The key is the environment's OPENAI_API_KEY unless one is given.

    Every method raises `ConfigError` with the server's own words when it refuses a request or can't be reached.
    """

    url: str
    api_key: str | None = None
    timeout_s: float = 120.0
    _client: OpenAI = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from openai import OpenAI  # a second of imports: paid by who chats

        key = self.api_key or os.environ.get(KEY_VARIABLE) or "none"  # the client insists on one
        base_url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1"
        self._client = OpenAI(base_url=base_url, api_key=key, timeout=self.timeout_s)

    def models(self) -> list[str]:
        """The names it serves."""
        from openai import OpenAIError

        try:
            return [model.id for model in self._client.models.list()]
        except OpenAIError as error:
            raise self._explain(error) from None

    def model(self, name: str | None) -> str:
        """`name`, or the first model where it is None; `ConfigError` for one that isn't served."""
        served = self.models()
        chosen = name or next(iter(served), "")
        require(chosen in served, "model", chosen, f"one that {self.url} serves: {', '.join(served) or 'none'}")
        return chosen

    def stream(
        self, model: str, messages: Sequence[Message], usage: Usage | None = None, **settings: Any
    ) -> Iterator[str]:
        """Pieces of the answer to `messages`. Closing the iterator stops the answer; `usage` is filled at its end.

        `settings` are the API's: temperature, max_tokens, seed, top_p, top_k, repetition_penalty, ...
        """
        from openai import OpenAIError

        usage = usage or Usage()
        extra = {name: settings.pop(name) for name in EXTRA_FIELDS if name in settings}
        request: dict[str, Any] = {"model": model, "messages": list(messages), "stream": True, **settings}
        try:
            chunks = self._client.chat.completions.create(
                **request, stream_options={"include_usage": True}, extra_body=extra
            )
            with chunks:
                for chunk in chunks:
                    if chunk.usage:
                        usage.prompt_tokens = chunk.usage.prompt_tokens
                        usage.completion_tokens = chunk.usage.completion_tokens
                    for choice in chunk.choices:
                        usage.finish_reason = choice.finish_reason or usage.finish_reason
                        if choice.delta.content:
                            yield choice.delta.content
        except OpenAIError as error:
            raise self._explain(error) from None

    def _explain(self, error: OpenAIError) -> ConfigError:
        """What went wrong, in a line: the server's own message where it has sent one."""
        from openai import APIError, AuthenticationError

        if isinstance(error, AuthenticationError):
            return ConfigError("API key", "refused", f"one that {self.url} knows", f"--key or {KEY_VARIABLE}")
        body = error.body if isinstance(error, APIError) else None
        if isinstance(body, dict) and body.get("message"):
            return ConfigError("url", self.url, "a server that answers", f"it said: {body['message']}")
        cause = error.__cause__ or error
        return ConfigError("url", self.url, "a server that can be reached", str(cause))


def chat(
    url: str,
    model: str,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    api_key: str | None = None,
    timeout_s: float = 120.0,
) -> str:
    """The answer of `model` at `url` (without /v1) to one user message; errors as `ChatServer` raises them."""
    pieces = ChatServer(url, api_key, timeout_s).stream(
        model, [{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=temperature
    )
    return "".join(pieces)
