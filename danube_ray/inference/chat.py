"""One answer of a chat model, whatever runs it."""

from __future__ import annotations

from collections.abc import Sequence

from danube_ray.data.chat import Message, render
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.inference.protocol import LanguageModel

REPETITION_PENALTY = 1.1  # with temperature 0: how the reports evaluate chat (Danube 1.8B, section 4)


def answer(model: LanguageModel, tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int = 256) -> str:
    """The model's likeliest answer to a conversation that ends with the user; "" where the prompt fills the context."""
    prompt, _ = render(messages, tokenizer, add_generation_prompt=True)
    return tokenizer.decode(model.generate(prompt, max_tokens, repetition_penalty=REPETITION_PENALTY))
