"""Answers on their way out: deltas become OpenAI's chunks, or one document."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from danube_ray.data.tokenizer import Tokenizer
from danube_ray.serve.engines import Delta, Sampling
from danube_ray.serve.logprobs import TextLogprobTeller, chat_logprobs
from danube_ray.serve.shapes import ChatCompletion, ChatLogprobs, Completion, TextLogprobs, Usage

Kind = Literal["chat", "text"]
DONE = b"data: [DONE]\n\n"

compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # `json.dumps` would make one a call


@dataclass(frozen=True)
class Echo:
    """A prompt that its answer repeats. `start` is where its tokens begin: the bos that is put before a text is no
    part of what the client sent, and would shift whatever it counted."""

    text: str
    start: int


@dataclass(frozen=True)
class Choice:
    """One answer to draw: the prompt's token ids, how, and whether it repeats the prompt."""

    prompt: list[int]
    sampling: Sampling
    echo: Echo | None = None


class Reply:
    """The envelope that every chunk of one answer shares, and what must be known from chunk to chunk.

    A stream has thousands of chunks a second to write, so their constant parts are made once and the rest is put in
    between; the text is encoded as JSON, nothing else needs it.
    """

    def __init__(
        self, kind: Kind, model: str, choices: Sequence[Choice], tokenizer: Tokenizer, *, chunk_usage: bool = False
    ) -> None:
        self.kind: Kind = kind
        chat = kind == "chat"
        self._name = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._voices = [_Voice(kind, choice, tokenizer) for choice in choices]
        chunk_name = {**self._name, "object": "chat.completion.chunk"} if chat else self._name
        self._head = f'data: {compact(chunk_name)[:-1]},"choices":['
        self._tail = '}],"usage":null}\n\n' if chunk_usage else "}]}\n\n"

    def chunk(self, index: int, delta: Delta) -> bytes:
        """One event of a stream; a chat answer's first names the role."""
        voice = self._voices[index]
        first, text = voice.at_start, compact(voice.text(delta))
        if self.kind == "chat":
            role = '"role":"assistant",' if first else ""
            said = f'"delta":{{{role}"content":{text}}}'
        else:
            said = f'"text":{text}'
        logprobs = compact(told) if (told := voice.logprobs(delta)) else "null"
        reason = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        choice = f'{{"index":{index},{said},"logprobs":{logprobs},"finish_reason":{reason}'
        return f"{self._head}{choice}{self._tail}".encode()

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event that `stream_options.include_usage` asks for, after the last choice has ended."""
        return f'{self._head}],"usage":{compact(usage)}}}\n\n'.encode()

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> ChatCompletion | Completion:
        """The answer in one piece, from everything that each choice said as one delta."""
        choices: list[dict[str, Any]] = []
        for index, (voice, delta) in enumerate(zip(self._voices, deltas, strict=True)):
            text = voice.text(delta)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(
                {
                    "index": index,
                    **(said if self.kind == "chat" else {"text": text}),
                    "logprobs": voice.logprobs(delta),
                    "finish_reason": delta.finish_reason,
                }
            )
        return {**self._name, "choices": choices, "usage": usage}  # type: ignore[return-value]


class _Voice:
    """One choice: what its deltas say, given those before."""

    def __init__(self, kind: Kind, choice: Choice, tokenizer: Tokenizer) -> None:
        self.at_start = True
        self._drops_space = kind == "chat"
        self._tokenizer = tokenizer
        self._asked = choice.sampling.logprobs is not None
        echoed = choice.prompt[choice.echo.start :] if choice.echo else []
        self._teller = None if kind == "chat" else TextLogprobTeller(tokenizer, next(iter(echoed), None))
        self._to_tell = max(0, len(echoed) - 1)  # tokens beside those drawn; nothing is known of the first one

    def text(self, delta: Delta) -> str:
        """A chat answer's without the first space: sentencepiece marks the start of a word, the first word's too, and
        its decoder drops that one."""
        self.at_start = False
        if self._drops_space and delta.text:
            self._drops_space = False
            return delta.text.removeprefix(" ")
        return delta.text

    def logprobs(self, delta: Delta) -> ChatLogprobs | TextLogprobs | None:
        if not self._asked:
            return None
        if self._teller is None:
            return chat_logprobs(self._tokenizer, delta.logprobs)
        self._to_tell -= len(delta.logprobs)
        return self._teller.tell(delta.logprobs, self._to_tell + delta.num_tokens if delta.finish_reason else 0)
