"""The official client against the live gate, in its synchronous and its asynchronous form."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from danube_ray.serve.engines import Delta, EngineBusy, EngineError
from danube_ray.serve.gate import ModelEntry, create_app
from tests.models import TEXT
from tests.serve.calls import HELLO, ScriptedEngine
from tests.serve.conftest import live


class Bank(Enum):
    LEFT = "left"
    RIGHT = "right"


class City(BaseModel):
    name: Literal["Vienna", "Budapest"]
    bank: Bank


class River(BaseModel):
    name: Literal["Danube", "Volga"]
    is_long: bool
    city: City


def test_models(client: openai.OpenAI):
    listed = client.models.list().data
    assert [(model.id, model.object, model.owned_by) for model in listed] == [
        ("tiny", "model", "danube_ray"),
        ("short", "model", "danube_ray"),
    ]
    assert client.models.retrieve("tiny") == listed[0]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other': tiny, short"):
        client.models.retrieve("other")


def test_chat_with_log_probabilities(client: openai.OpenAI):
    for (
        text
    ) in TEXT:  # until one is answered in words: random weights draw bytes now and then, of which engines tell less
        message: Any = {"role": "user", "content": text}
        answer = client.chat.completions.create(
            model="tiny", messages=[message], max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
        )
        (choice,) = answer.choices
        assert choice.logprobs and choice.logprobs.content and choice.finish_reason == "length"
        told = choice.logprobs.content
        if len(told) == 8:
            break
    assert len(told) == 8 and all(len(token.top_logprobs) == 3 for token in told)
    for token in told:
        assert token.logprob <= 0 and token.token == token.top_logprobs[0].token, "the likeliest was taken"
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-4)
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
    said = b"".join(bytes(token.bytes or ()) for token in told).decode("utf-8", "replace")
    assert said.removeprefix(" ").rstrip("\ufffd").startswith((choice.message.content or "").rstrip("\ufffd"))


def test_a_chat_stream_has_usage_and_the_same_log_probabilities(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    text, told, usage = "", [], None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            told += choice.logprobs.content or [] if choice.logprobs else []
        assert usage is None, "the chunk with the usage is the last"
        usage = chunk.usage
    assert (text, usage) == (whole.choices[0].message.content, whole.usage)
    assert whole.choices[0].logprobs and whole.choices[0].logprobs.content
    assert [token.token for token in told] == [token.token for token in whole.choices[0].logprobs.content]


def test_the_clients_stream_helper_parses_as_it_goes(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "seed": 1}
    with client.chat.completions.stream(**asked, response_format=City) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "content.done"} <= kinds and isinstance(message.parsed, City)


def test_completions_with_echo_and_log_probabilities(client: openai.OpenAI):
    answer = client.completions.create(
        model="tiny", prompt=["The Danube", "The Volga"], echo=True, logprobs=2, max_tokens=3, n=2, seed=1
    )
    assert [choice.text[:9] for choice in answer.choices] == ["The Danub"] * 2 + ["The Volga"] * 2
    for choice in answer.choices:
        told = choice.logprobs
        assert told and told.tokens and told.token_logprobs and told.text_offset
        assert told.tokens[0] == " The" and told.token_logprobs[0] is None and told.text_offset[0] == 0
        assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    assert answer.usage and answer.usage.completion_tokens == 12


def test_a_completion_stream(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "prompt": "The Danube", "max_tokens": 12, "temperature": 0}
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert streamed == client.completions.create(**asked).choices[0].text


@pytest.mark.parametrize("seed", range(3))
def test_a_pydantic_model_constrains_the_answer(client: openai.OpenAI, seed: int):
    """The weights are random: nothing but the schema could make them answer so."""
    answer = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=River, max_tokens=400, seed=seed
    )
    (choice,) = answer.choices
    assert isinstance(choice.message.parsed, River) and choice.finish_reason == "stop"


def test_a_json_object_is_one(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=8, seed=1
    )
    assert (answer.choices[0].message.content or "").startswith("{")


def test_embeddings(client: openai.OpenAI):
    coded = client.embeddings.create(model="tiny", input=["The Danube", "The Volga"])  # in base64: its default
    plain = client.embeddings.create(model="tiny", input=["The Danube", "The Volga"], encoding_format="float")
    assert [item.index for item in coded.data] == [0, 1] and coded.usage.total_tokens == plain.usage.total_tokens > 4
    for one, other in zip(coded.data, plain.data, strict=True):
        assert len(one.embedding) == 128
        assert one.embedding == pytest.approx(other.embedding, abs=1e-5)


def test_the_asynchronous_client(url: str):
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}

    async def ask() -> tuple[str | None, str, str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole, stream, parsed = await asyncio.gather(
                client.chat.completions.create(**asked),
                client.chat.completions.create(**asked, stream=True),
                client.chat.completions.parse(**{**asked, "max_tokens": 400}, response_format=City),
            )
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            city = parsed.choices[0].message.parsed
            return whole.choices[0].message.content, streamed, city and city.name

    whole, streamed, name = asyncio.run(ask())
    assert whole == streamed and name in ("Vienna", "Budapest")


# ---- errors ----


@pytest.mark.parametrize(
    ("asked", "kind", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": -1}, openai.BadRequestError, None, "temperature"),
        ({"n": 10**6}, openai.BadRequestError, None, "n"),
        ({"model": "short", "messages": [{"role": "user", "content": "river " * 80}]}, openai.BadRequestError,
         "context_length_exceeded", "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError,
         "unsupported_parameter", "tools"),
        ({"extra_body": {"min_p": 0.1}}, openai.BadRequestError, "unknown_parameter", "min_p"),
        ({"messages": [{"role": "user", "content": "x" * 300_000}]}, openai.APIStatusError, None, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streams", [False, True])
def test_error_classes(
    client: openai.OpenAI,
    asked: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: Any,
    param: Any,
    streams: bool,
):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": streams, **asked})
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.fixture
def flaky(entry: ModelEntry) -> Iterator[tuple[openai.OpenAI, list[Any]]]:
    engines: list[Any] = []
    with live(create_app({"tiny": entry}, lambda _: engines.pop(0))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2), engines


def test_a_retry_waits_as_long_as_it_is_told(flaky: tuple[openai.OpenAI, list[Any]], monkeypatch: pytest.MonkeyPatch):
    client, engines = flaky
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    engines += [ScriptedEngine(EngineBusy("full")), ScriptedEngine(EngineError("gone"))]
    engines += [ScriptedEngine(Delta(" Yes", 1, "stop"))]
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "Yes"
    assert waits == [1, 5]


def test_a_server_that_stays_busy_and_a_stream_that_breaks_are_errors(flaky: tuple[openai.OpenAI, list[Any]]):
    client, engines = flaky
    client = client.with_options(max_retries=0)
    engines += [ScriptedEngine(EngineBusy("full")), ScriptedEngine(Delta(" Yes", 1), EngineError("lost"))]
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_busy")
    said = []
    with pytest.raises(openai.APIError, match="lost"):
        for chunk in client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
            said.append(chunk.choices[0].delta.content)
    assert said == ["Yes"]
