"""A small instruction set made from names, signatures and summaries: conversations, preference pairs and questions.

Everything is chosen by stable hashes of names, so the same Python gives the same rows. What the multiple-choice
questions ask about is held out: no conversation or pair is about it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from danube_ray.demo.docstrings import Symbol

NUM_QUESTIONS = 100
MAX_CONVERSATIONS = 3_000
MAX_PAIRS = 320
NUM_CHOICES = 4

SUMMARY_PROMPTS = (
    "What does {name} do?",
    "What is {name} for?",
    "Describe {name}.",
    "Explain {name} in one sentence.",
    "Tell me what {name} does.",
)
CALL_PROMPTS = ("What arguments does {name} take?", "How do I call {name}?", "Show me the signature of {name}.")
NAME_PROMPTS = ("Which part of Python is this? {summary}", "Name what fits this description: {summary}")

Row = dict[str, Any]


def stable_number(text: str) -> int:
    """64 bits of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def instruction_sets(symbols: Iterable[Symbol]) -> tuple[list[Row], list[Row], list[Row]]:
    """Conversations (`messages`), preference pairs (`prompt`, `chosen`, `rejected`) and questions of these symbols.

    A question has `question`, 4 `choices` and `answer`, the index of the right one. Symbols that share a name or a
    summary with another are left out: they would have two right answers.
    """
    usable = _unambiguous(symbols)
    held_out, known = usable[:NUM_QUESTIONS], usable[NUM_QUESTIONS:]
    conversations = [row for symbol in known for row in _conversations(symbol)]
    return conversations[:MAX_CONVERSATIONS], _pairs(known)[:MAX_PAIRS], _questions(held_out)


def _unambiguous(symbols: Iterable[Symbol]) -> list[Symbol]:
    """Symbols of one name and one summary, shuffled by name."""
    ordered = sorted(symbols, key=lambda symbol: stable_number(symbol.name))
    names = Counter(symbol.name for symbol in ordered)
    summaries = Counter(symbol.summary for symbol in ordered)
    return [symbol for symbol in ordered if names[symbol.name] == summaries[symbol.summary] == 1]


def _pick(options: tuple[str, ...], symbol: Symbol) -> str:
    return options[stable_number(f"{symbol.name} {options[0]}") % len(options)]


def _conversations(symbol: Symbol) -> list[Row]:
    turns = [(_pick(SUMMARY_PROMPTS, symbol).format(name=symbol.name), symbol.summary)]
    if symbol.signature is not None:
        turns.append((_pick(CALL_PROMPTS, symbol).format(name=symbol.name), symbol.signature))
    if stable_number(symbol.summary) % 3 == 0:
        turns.append((_pick(NAME_PROMPTS, symbol).format(summary=symbol.summary), symbol.name))
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in turns
    ]


def _pairs(symbols: list[Symbol]) -> list[Row]:
    """The right summary against a worse answer: another's summary, one that breaks off, or one that repeats itself."""
    pairs = []
    for symbol, other in pairwise(symbols):
        words = symbol.summary.split()
        worse = (
            other.summary,
            " ".join(words[: len(words) // 2]),
            " ".join([*words[:3]] * 5),
        )
        prompt = _pick(SUMMARY_PROMPTS, symbol).format(name=symbol.name)
        rejected = worse[stable_number(f"worse {symbol.name}") % len(worse)]
        pairs.append({"prompt": prompt, "chosen": symbol.summary, "rejected": rejected})
    return pairs


def _questions(symbols: list[Symbol]) -> list[Row]:
    """Each symbol's summary among those of the three after it."""
    questions = []
    for index, symbol in enumerate(symbols):
        others = [symbols[(index + step) % len(symbols)].summary for step in range(1, NUM_CHOICES)]
        answer = stable_number(f"answer {symbol.name}") % NUM_CHOICES
        choices = [*others[:answer], symbol.summary, *others[answer:]]
        questions.append({"question": f"What does {symbol.name} do?", "choices": choices, "answer": answer})
    return questions
