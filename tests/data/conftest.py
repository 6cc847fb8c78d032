"""Texts that try a tokenizer, and tokenizers to try: one trained here, Llama 2's and Mistral's where they are."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path

import pytest

from danube_ray.data.tokenizer import Tokenizer, import_tokenizer, train_tokenizer

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # three emoji joined by zero-width joiners
SNIPPETS = [
    "hello", "Hello, World!", "The Danube is a river.", "1234567890", "3.14159", "naïve café", "日本語のテキスト", "Ж",
    "\U0001f600", FAMILY, "\U0001f1ed\U0001f1fa", "\t", "\n", "\r\n", "    return x", "a_b__c", "<|", "|>", "</p>",
    "<unk", "== != >=", "...", "\u2014", "\u00a0", "\u200b", "x" * 40, "\ufb01", "\U0001d518", "e\u0301", "\\n", "\x07",
    "https://example.org/a?b=c&d=%20", '{"k": [1, 2]}', "don't", "</", "/s>",
]  # fmt: skip


def make_texts(count: int) -> list[str]:
    """Random joins of `SNIPPETS` with runs of spaces, tabs and line breaks between, before and behind them."""
    generator = random.Random(11)
    gaps = ["", " ", "  ", "   ", "       ", "\t", " \t ", "\n", "\n\n", " \n  "]

    def text() -> str:
        parts = [generator.choice(gaps) + generator.choice(SNIPPETS) for _ in range(generator.randint(1, 12))]
        return "".join(parts) + generator.choice(gaps)

    return [*SNIPPETS, " ", "  ", *(text() for _ in range(count))]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(500)


@pytest.fixture(scope="session")
def training_texts() -> list[str]:
    """English and code that every Python has."""
    modules = (inspect, json, random, pytest)
    code = [inspect.getsource(module) for module in modules]
    return [*code, *(inspect.getdoc(value) or "" for module in modules for value in vars(module).values())]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, training_texts: list[str]) -> Tokenizer:
    return train_tokenizer(training_texts, tmp_path_factory.mktemp("trained"), 1_000)


@pytest.fixture(scope="session", params=["trained", "llama2", "mistral_v1"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "trained":
        return request.getfixturevalue("trained")
    shared_data: Path = request.getfixturevalue("shared_data")
    model_file = shared_data / "tokenizers" / f"{request.param}_tokenizer.model"
    return import_tokenizer(model_file, tmp_path_factory.mktemp(request.param))
