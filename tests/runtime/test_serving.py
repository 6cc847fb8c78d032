"""The served model as its users meet it: the official client and a browser against the live Ray Serve application."""

from __future__ import annotations

import os
import signal
import socket
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import openai
import pytest

from danube_ray.config import ConfigError, ServeConfig, ServedModel
from danube_ray.inference.http import chat
from danube_ray.runtime.serving import serving
from tests.serve.browser import headless_chromium
from tests.serve.tiny import tiny_served_model

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
    typed = replace(served, weights=relative(served.weights), tokenizer_folder=relative(served.tokenizer_folder))
    with serving(ServeConfig(models={"tiny": typed, doomed: narrow}, port=0)) as url:
        yield Live(url, doomed)


def relative(path: Path) -> Path:
    """A path as a user types it: replicas run in folders of their own."""
    return Path(os.path.relpath(path))


@pytest.mark.ray
def test_the_official_client_chats(app: Live, served: ServedModel):
    assert [model.id for model in app.client.models.list()] == ["tiny", app.doomed]
    whole = app.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, temperature=0)
    *chunks, last = app.client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=200, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content == chat(app.url, "tiny", QUESTION, max_tokens=200)
    assert len(chunks) > 1 and chunks[-1].choices[0].finish_reason == "length"
    assert whole.usage and last.usage and whole.usage.completion_tokens == last.usage.completion_tokens == 200


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
    os.kill(replica_of(app.doomed), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="was lost in the middle") as caught:
        list(stream)
    assert caught.value.code == "engine_unavailable"
    assert list(beside)[-1].choices[0].finish_reason == "length", "other models never noticed"
    assert chat(app.url, app.doomed, QUESTION, max_tokens=4), (
        "Serve started another replica, and the request waited for it"
    )


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


def replica_of(model: str) -> int:
    """The process of a model's engine: Serve puts the deployment into its title, and the name here is unique."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"engine-{model}".encode() in process.read_bytes():
                return int(process.parent.name)
        except OSError:  # it ended while we looked
            continue
    raise AssertionError(f"no process serves {model}")


def test_what_cannot_be_served_is_one_clear_error(served: ServedModel, tmp_path: Path):
    """Before Ray starts: a port in use, no model, a bad name, a bad file."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"port is {port}"),
            serving(ServeConfig(models={"tiny": served}, port=port)),
        ):
            pass
    nameless = {"": served, "a/b": served, ".hidden": served}
    for models in ({}, *({name: model} for name, model in nameless.items())):
        with pytest.raises(ConfigError, match="model"), serving(ServeConfig(models=models, port=0)):
            pass
    missing = replace(served, weights=tmp_path / "missing.gguf")
    with pytest.raises(ConfigError, match=r"missing\.gguf"), serving(ServeConfig(models={"tiny": missing}, port=0)):
        pass
