"""The one place where a conversation becomes token ids, for training, evaluation and serving alike.

Danube's format, as text:

    <s><|prompt|> What is the Danube?</s><|answer|> A river.</s>

The two markers are ordinary text, several pieces each, not added tokens. Ids are made segment by segment, each encoded
by itself as H2O LLM Studio encodes an answer, so that it begins with sentencepiece's usual space piece:

    bos · marker · content · eos · marker · content · eos ...

No piece of a sentencepiece vocabulary goes on past a space, so encoding the string above in one go (`CHAT_TEMPLATE` in
transformers, vLLM or llama.cpp) gives the same ids: hence the space behind each marker. They differ only where content
spells a control token or a marker. There `render` is the law: it can't be made to emit either from content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from danube_ray.data.tokenizer import Tokenizer

PROMPT_MARKER = "<|prompt|>"
ANSWER_MARKER = "<|answer|>"
MARKER = re.compile(r"<(?=\|(?:prompt|answer)\|>)")  # the bracket that opens a marker

# The template below and `render` are the same rule twice; a test holds them together.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' and loop.first %}
{%- set system.text = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '<|prompt|> ' + system.text + message['content'] + eos_token }}
{%- set system.text = '' %}
{%- elif message['role'] == 'assistant' %}
{{- '<|answer|>' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{%- else %}
{{- raise_exception('roles are an optional first system, then user and assistant in turn') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|answer|>' }}
{%- endif %}"""


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def conversation_problem(messages: Sequence[object]) -> str | None:
    """Why these are not a conversation (an optional system turn, then user and assistant in turn), or None."""
    role, expected = None, ("system", "user")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"message {number} is not an object"
        role, content = message.get("role"), message.get("content")
        if role not in expected:
            return f"message {number} has role {role!r} where {' or '.join(expected)} belongs"
        if not isinstance(content, str) or not content.strip():
            return f"message {number} has no text"
        if any("\ud800" <= character <= "\udfff" for character in content):
            return f"message {number} is not valid Unicode"
        expected = ("assistant",) if role == "user" else ("user",)
    return "there is no user message" if role in (None, "system") else None


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether training learns it: an assistant's content and its eos.

    A system message is put before the first user message. With `add_generation_prompt` the ids end where the model's
    answer begins. Raises `ValueError` when the messages are not a conversation.
    """
    problem = conversation_problem(messages)
    if problem is None and add_generation_prompt and messages[-1]["role"] != "user":
        problem = "the last message is not the user's, so there is nothing to answer"
    if problem is not None:
        raise ValueError(problem)
    ids, trained, system = [tokenizer.bos_id], [False], ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
            continue
        learns = message["role"] == "assistant"
        marker = tokenizer.encode(ANSWER_MARKER if learns else PROMPT_MARKER)
        content = [*encode_content(system + message["content"], tokenizer), tokenizer.eos_id]
        ids += marker + content
        trained += [False] * len(marker) + [learns] * len(content)
        system = ""
    if add_generation_prompt:
        marker = tokenizer.encode(ANSWER_MARKER)
        ids += marker
        trained += [False] * len(marker)
    return ids, trained


def encode_content(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of what somebody wrote, which decode to it exactly and never contain a control token or a marker's ids.

    Sentencepiece reads control tokens such as `</s>` as text. A marker is broken by spelling its bracket as a byte
    piece: the same text, in ids that no marker has.
    """
    first, *rest = MARKER.split(text)
    if rest and tokenizer.encode_continuation("<") == [tokenizer.byte_id(ord("<"))]:
        raise ValueError("this tokenizer spells '<' as a byte, so a role marker in a text would be a real one")
    ids = tokenizer.encode(first) if first else [tokenizer.space_id]
    for continuation in rest:
        ids += [tokenizer.byte_id(ord("<")), *tokenizer.encode_continuation(continuation)]
    return ids
