"""What the gate does not take: an OpenAI error before any stream, never a crash, and it answers on."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
from pydantic import ValidationError

from danube_ray.serve.schema import CompletionRequest
from tests.serve.calls import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, JSON, chat, post

DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"properties": {"a": DEEP}}


DOUBLING = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {"type": "null"}}
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(400)} | {"d400": {"type": "null"}}


def schema(definition: Any, **fields: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": definition, **fields}})


BAD_BODIES: list[tuple[bytes | dict[str, Any], int, str | None]] = [
    (b"", 400, None),
    (b"{not json", 400, None),
    (b"[]", 400, None),
    (b"null", 400, None),
    (b'{"model": "tiny", "messages": "\xff\xfe"}', 400, None),
    (json.dumps(chat()).encode("utf-16"), 400, None),
    (b"[" * 100_000, 400, None),
    (b'{"seed": ' + b"9" * 5_000 + b"}", 400, None),
    (b'{"model": "tiny", "model": "short", "messages": [{"role": "user", "content": "Hi"}]}', 400, None),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi", "content": "Ho"}]}', 400, None),
    (chat(**{f"unknown{number}": 1 for number in range(5_000)}), 400, None),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages"),
    (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "Hi"}]}', 400, "model"),
    (b'{"model": "tiny", "stop": "\\ud800", "messages": [{"role": "user", "content": "Hi"}]}', 400, "stop"),
    (b'{"model": "tiny", "\\ud800": 1, "messages": [{"role": "user", "content": "Hi"}]}', 400, None),
    (b'{"model": "tiny", "temperature": 1e400, "messages": [{"role": "user", "content": "Hi"}]}', 400, "temperature"),
    (chat(messages=[{"role": "user", "content": "x" * 300_000}]), 413, None),
    (chat(model="huge"), 404, "model"),
    (chat(model=None), 400, "model"),
    (chat(model=7), 400, "model"),
    ({"model": "tiny"}, 400, "messages"),
    (chat(messages=[]), 400, "messages"),
    (chat(messages="Hi"), 400, "messages"),
    (chat(messages=[{"role": "wizard", "content": "Hi"}]), 400, "messages"),
    (chat(messages=[{"role": "user", "content": None}]), 400, "messages"),
    (chat(messages=[{"role": "user", "content": "  "}]), 400, "messages"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]), 400, "messages"),
    (chat(messages=[*HELLO, *HELLO]), 400, "messages"),
    (chat(messages=[*HELLO, {"role": "assistant", "content": "The Volga"}]), 400, "messages"),
    (chat(messages=[{"role": "system", "content": "Be brief"}]), 400, "messages"),
    (chat(temperature=-1), 400, "temperature"),
    (chat(temperature="hot"), 400, "temperature"),
    (chat(temperature=True), 400, "temperature"),
    (chat(temperature=float("nan")), 400, None),
    (chat(temperature=float("inf")), 400, None),
    (chat(top_p=0), 400, "top_p"),
    (chat(repetition_penalty=0), 400, "repetition_penalty"),
    (chat(max_tokens=0), 400, "max_tokens"),
    (chat(max_tokens=2.5), 400, "max_tokens"),
    (chat(max_tokens=10**9), 400, "max_tokens"),
    (chat(max_completion_tokens=10**9), 400, "max_tokens"),
    (chat(n=0), 400, "n"),
    (chat(n=10**6), 400, "n"),
    (chat(n=10**30), 400, "n"),
    (chat(seed=2**70), 400, "seed"),
    (chat(stop=""), 400, "stop"),
    (chat(stop=["a"] * 5), 400, "stop"),
    (chat(stream="yes"), 400, "stream"),
    (chat(stream=True, stream_options={"more": 1}), 400, "stream_options"),
    (chat(stream=False, stream_options={"include_usage": True}), 400, "stream_options"),
    (chat(logprobs=5), 400, "logprobs"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (chat(top_logprobs=2), 400, "top_logprobs"),
    (chat(min_p=0.1), 400, "min_p"),
    (chat(tools=[{"type": "function"}]), 400, "tools"),
    (chat(tool_choice="auto"), 400, "tool_choice"),
    (chat(functions=[]), 400, "functions"),
    (chat(logit_bias={"5": 1}), 400, "logit_bias"),
    (chat(response_format={"type": "xml"}), 400, "response_format"),
    (chat(response_format={"type": "json_schema"}), 400, "response_format"),
    (schema("no schema"), 400, "response_format"),
    (schema({}, name="two words"), 400, "response_format"),
    (schema(DEEP), 400, "response_format"),
    (schema({"enum": ["x" * 1000] * 100}), 400, "response_format"),
    (schema({"const": "\ud800"}), 400, "response_format"),
    (schema({"maximum": float("inf")}), 400, None),
    (schema({"$defs": DOUBLING, "$ref": "#/$defs/d0"}), 400, "response_format"),
    (schema({"$defs": CHAIN, "$ref": "#/$defs/d0"}), 400, "response_format"),
    (schema({"anyOf": [{"type": "null"}, {"$ref": "#"}]}), 400, "response_format"),
    (schema({"properties": {"a": {"enum": list(range(1_001))}}}), 400, "response_format"),
]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("body", "status", "param"), BAD_BODIES, ids=lambda value: str(value)[:60])
def test_bad_requests_are_told_what_is_wrong(
    url: str, body: bytes | dict[str, Any], status: int, param: str | None, streams: bool
):
    if streams and isinstance(body, dict):
        body = {"stream": True, **body}
    got, headers, answer = post(url + CHAT, body)
    assert (got, headers["content-type"]) == (status, "application/json")
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["param"] == param if param is None else error["param"].split(".")[0] == param


@pytest.mark.parametrize("name", ["best_of", "suffix", "logit_bias"])
def test_what_openai_has_and_this_server_has_not_is_named(url: str, name: str):
    status, _, answer = post(url + COMPLETIONS, {"model": "tiny", "prompt": "Hi", name: "x"})
    assert (status, answer["error"]["param"]) == (400, name)
    assert post(url + COMPLETIONS, {"model": "tiny", "prompt": "Hi", "max_tokens": 1, name: None})[0] == 200


def test_unknown_and_unserved_parameters_have_codes_of_their_own(url: str):
    for field, code in (({"min_p": 0.1}, "unknown_parameter"), ({"tools": [1]}, "unsupported_parameter")):
        error = post(url + CHAT, chat(**field))[2]["error"]
        assert error["code"] == code and error["param"] in error["message"]


@pytest.mark.parametrize("streams", [False, True])
def test_too_long_a_prompt_is_an_error_before_the_stream(client: openai.OpenAI, streams: bool):
    long = "river " * 80
    with pytest.raises(openai.BadRequestError, match="context of 64") as chatted:
        messages: Any = [{"role": "user", "content": long}]
        client.chat.completions.create(model="short", messages=messages, stream=streams)
    with pytest.raises(openai.BadRequestError, match="context of 64") as completed:
        client.completions.create(model="short", prompt=["Hi", long], stream=streams)
    with pytest.raises(openai.BadRequestError, match="context of 64") as embedded:
        client.embeddings.create(model="short", input=long)
    errors = [caught.value for caught in (chatted, completed, embedded)]
    assert {error.code for error in errors} == {"context_length_exceeded"}
    assert [error.param for error in errors] == ["messages", "prompt", "input"]


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [-1], [512], [[1, 2], [10**12]], [1.5], ["a", 1], "\ud800", {}])
def test_bad_prompts(url: str, prompt: object):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    status, _, answer = post(url + COMPLETIONS, body)
    if prompt in ("", [""]):  # bos alone is a prompt: the start of a document
        assert status == 200
    else:
        assert status == 400 and answer["error"]["param"].startswith("prompt")
        status, _, answer = post(url + EMBEDDINGS, {"model": "tiny", "input": prompt})
        assert status == 400 and answer["error"]["param"].startswith("input")


@pytest.mark.parametrize("wrong", [[1.5], ["a", 1], [[0.5]], [{}]], ids=str)
def test_a_long_list_of_wrong_items_is_not_reported_on_item_by_item(wrong: list[Any]):
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "tiny", "prompt": wrong * 1_000})
    assert caught.value.error_count() < 10


def test_nothing_to_draw_needs_an_echo(url: str):
    status, _, answer = post(url + COMPLETIONS, {"model": "tiny", "prompt": "Hi", "max_tokens": 0})
    assert (status, answer["error"]["param"]) == (400, "max_tokens")


def test_too_many_inputs(url: str):
    assert post(url + COMPLETIONS, {"model": "tiny", "prompt": ["Hi"] * 9})[2]["error"]["param"] == "n"
    assert post(url + EMBEDDINGS, {"model": "tiny", "input": ["Hi"] * 2_049})[2]["error"]["param"] == "input"


def test_a_body_of_ten_megabytes_of_unannounced_length_is_counted(url: str):
    request = Request(url + CHAT, iter([b" " * 2**16] * 160), JSON)
    with pytest.raises(HTTPError) as caught:
        urlopen(request)
    assert caught.value.code == 413 and json.load(caught.value)["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_another_content_type_is_named(url: str, kind: str):
    """A page of another origin may send these without asking; JSON it may not."""
    status, _, answer = post(url + CHAT, chat(), {"content-type": kind})
    assert status == 400 and "application/json" in answer["error"]["message"]


def test_unknown_paths_and_methods(url: str):
    status, _, answer = post(f"{url}/v1/images", {})
    assert status == 404 and answer["error"]["message"]
    status, headers, answer = post(f"{url}/health", {})
    assert status == 405 and answer["error"]["message"] and headers["allow"] == "GET"
    with pytest.raises(HTTPError) as caught:
        urlopen(f"{url}/v1/models/none/such")
    assert caught.value.code == 404 and json.load(caught.value)["error"]["code"] == "model_not_found"
