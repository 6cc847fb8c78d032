"""The served model as its users meet it: the official client and a browser against the live Ray Serve application."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from select import select
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from danube_ray.config import ServeConfig, ServedModel
from danube_ray.inference.http import chat
from danube_ray.runtime.deployments import Readiness
from danube_ray.runtime.serving import serving
from tests.adapters import tiny_adapter
from tests.runtime.replicas import replica
from tests.serve.browser import headless_chromium
from tests.serve.tiny import tiny_served_model
from tests.waiting import wait_for

LONG_TOKENS = 6_000  # seconds of reading for the tiny model
QUESTION = "Which river is longer?"
HELLO = [{"role": "user", "content": QUESTION}]


@dataclass(frozen=True)
class Live:
    url: str
    doomed: str  # the name of a model whose process a test may kill

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def app(ray_session: None, served: ServedModel) -> Iterator[Live]:
    doomed = f"doomed-{uuid.uuid4().hex}"
    narrow = replace(served, num_slots=1, max_queued=1)
    adapters = {"poet": tiny_adapter(served.weights.parent, served.weights.parent / "poet", seed=1)}
    typed = replace(served, weights=relative(served.weights), tokenizer_folder=None, adapters=adapters)
    sleepy = replace(served, min_replicas=0, idle_s=0.5)
    with serving(ServeConfig(models={"tiny": typed, doomed: narrow, "sleepy": sleepy}, port=0)) as url:
        yield Live(url, doomed)


def relative(path: Path) -> Path:
    """A path as a user types it: replicas run in folders of their own."""
    return Path(os.path.relpath(path))


@pytest.mark.ray
def test_the_official_client_chats(app: Live, served: ServedModel):
    assert [model.id for model in app.client.models.list()] == ["tiny", "poet", app.doomed, "sleepy"]
    whole = app.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, temperature=0)
    *chunks, last = app.client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=200, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content == chat(app.url, "tiny", QUESTION, max_tokens=200)
    assert len(chunks) > 1 and chunks[-1].choices[0].finish_reason == "length"
    assert whole.usage and last.usage and whole.usage.completion_tokens == last.usage.completion_tokens == 200


@pytest.mark.ray
def test_scores_embeddings_and_adapters_come_through(app: Live):
    create = app.client.completions.create
    scores = {}
    for model in ("tiny", "poet"):
        (choice,) = create(model=model, prompt="The Danube", echo=True, logprobs=0, max_tokens=1).choices
        assert choice.logprobs and choice.logprobs.token_logprobs
        nothing_before_it, scores[model], _ = choice.logprobs.token_logprobs
        assert nothing_before_it is None
    assert scores["tiny"] != scores["poet"], "the adapter speaks"
    (embedding,) = app.client.embeddings.create(model="tiny", input="The Danube").data
    assert sum(value * value for value in embedding.embedding) == pytest.approx(1, abs=1e-3)


@pytest.mark.ray
def test_the_official_client_gets_proper_errors(app: Live):
    create = app.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no model 'huge'"):
        create(model="huge", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        create(model="tiny", messages=HELLO, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="the model's context is 65536"):
        create(model="tiny", messages=HELLO, max_tokens=10**6, stream=True)


@pytest.mark.ray
def test_more_requests_than_places_are_told_so(app: Live):
    """One slot, one place in the queue, three more requests: one waits its turn, two are sent away at once."""
    holds = app.client.chat.completions.create(model=app.doomed, messages=HELLO, max_tokens=60_000, stream=True)
    next(iter(holds))
    with ThreadPoolExecutor(3) as threads:
        others = [threads.submit(chat, app.url, app.doomed, QUESTION, max_tokens=4) for _ in range(3)]
        sent_away = list(islice(as_completed(others), 2))
        holds.close()
    assert all("queue is full" in str(other.exception()) for other in sent_away)
    assert sum(other.exception() is None for other in others) == 1


@pytest.mark.ray
def test_leaving_a_stream_frees_its_slot(app: Live):
    """Four streams of minutes are left one after the other; the model has two slots."""
    for _ in range(4):
        stream = app.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=60_000, stream=True)
        next(iter(stream))
        stream.close()
    assert chat(app.url, "tiny", QUESTION, max_tokens=4)


@pytest.mark.ray
def test_a_killed_engine_ends_its_stream_in_an_error_event(app: Live):
    stream = app.client.chat.completions.create(model=app.doomed, messages=HELLO, max_tokens=60_000, stream=True)
    beside = app.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=500, stream=True)
    next(iter(stream))
    os.kill(replica(f"engine-{app.doomed}"), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="was lost in the middle") as caught:
        list(stream)
    assert caught.value.code == "engine_unavailable"
    assert list(beside)[-1].choices[0].finish_reason == "length", "other models never noticed"
    assert chat(app.url, app.doomed, QUESTION, max_tokens=4), (
        "Serve started another replica, and the request waited for it"
    )


@pytest.mark.ray
def test_a_request_whose_engine_dies_before_it_said_anything_is_asked_again(app: Live):
    """The engine is killed while it reads a long prompt; the client gets its answer from the next one."""
    process = psutil.Process(replica(f"engine-{app.doomed}"))
    spent_s = process.cpu_times().user
    complete = app.client.completions.create
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(complete, model=app.doomed, prompt=[300] * LONG_TOKENS, max_tokens=4)
        wait_for(lambda: process.cpu_times().user > spent_s + 0.2)
        process.kill()
        assert asked.result().usage.completion_tokens == 4
    assert replica(f"engine-{app.doomed}") != process.pid


@pytest.mark.ray
def test_a_client_that_leaves_the_queue_gives_its_place_back(app: Live):
    """One slot and one place in the queue, both taken; who waits leaves, and the next may wait."""
    holds = app.client.chat.completions.create(model=app.doomed, messages=HELLO, max_tokens=60_000, stream=True)
    next(iter(holds))
    one, other = ask(app), ask(app)
    refused, _, _ = select([one.sock, other.sock], [], [])
    waits = other if refused == [one.sock] else one
    waits.close()
    tries: list[float] = []
    with ThreadPoolExecutor(1) as thread:
        follows = thread.submit(ask_until_let_in, app, tries)
        wait_for(lambda: bool(tries) and time.monotonic() - tries[-1] > 1)  # a refusal comes in milliseconds
        holds.close()
        assert follows.result()


def ask(app: Live) -> HTTPConnection:
    """A request under way, nothing read of its answer yet."""
    connection = HTTPConnection(app.url.removeprefix("http://"))
    body = json.dumps({"model": app.doomed, "messages": HELLO, "max_tokens": 4})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    return connection


def ask_until_let_in(app: Live, tries: list[float]) -> bool:
    """Ask again while the queue is full; `tries` gets the time of each try."""
    while True:
        tries.append(time.monotonic())
        response = ask(app).getresponse()
        if response.status == 200:
            return True
        assert response.status == 503 and response.headers["retry-after"]


@pytest.mark.ray
@pytest.mark.slow
def test_an_idle_model_is_unloaded_and_comes_back(app: Live):
    for _ in range(2):
        assert chat(app.url, "sleepy", QUESTION, max_tokens=4)
        engine = replica("engine-sleepy")
        wait_for(lambda: not psutil.pid_exists(engine))  # noqa: B023


@pytest.mark.ray
def test_a_killed_gate_ends_its_streams_and_comes_back(app: Live):
    """What it had under way ends in an error event; requests from then on wait for the next gate and are answered."""
    stream = app.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=60_000, stream=True)
    next(iter(stream))
    os.kill(replica("gate"), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the gate was lost") as caught:
        list(stream)
    assert caught.value.code == "gate_unavailable"
    assert chat(app.url, "tiny", QUESTION, max_tokens=4)


@pytest.mark.ray
def test_a_browser_sends_a_message_and_reads_the_streamed_answer(app: Live):
    with headless_chromium() as page:
        page.open(app.url)
        page.send(QUESTION)
        first = page.wait(lambda: any(page.text(".turn.model .body")) and page.text(".turn.model .body")[0])
        page.wait(lambda: len(page.text(".turn.model .body")[0]) > len(first))  # it grows as it comes
        page.one("#send").click()
        assert len(page.answered()) > len(first)
        assert page.text(".stats") == ["stopped"] and page.complaints() == []


@pytest.mark.parametrize(("loaded", "status"), [([], 200), ([True, True], 200), ([True, False], 503)])
def test_health_waits_for_every_engine_that_is_kept(loaded: list[bool], status: int):
    """As a load balancer asks: not ready yet is 503; all else passes."""
    engines: list[Any] = [SimpleNamespace(has_loaded=one) for one in loaded]
    client = TestClient(Readiness(Starlette(routes=[Route("/{any}", lambda _: Response())]), engines))
    assert client.get("/health").status_code == status
    assert client.get("/else").status_code == 200
