"""One tiny model, its engine and a live gate over it (no Ray), for every test of this room."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

import openai
import pytest
import uvicorn
from starlette.types import ASGIApp

from danube_ray.config import GateSettings, ServedModel
from danube_ray.serve.engines import Delta, Engine, Sampling, TokenLogprob
from danube_ray.serve.gate import ModelEntry, create_app
from danube_ray.serve.llamacpp_engine import LlamaCppEngine
from danube_ray.serve.models import entry_of
from tests.serve.browser import Browser, headless_chromium
from tests.serve.storyteller import Storyteller
from tests.serve.tiny import tiny_served_model


@dataclass
class RecordingEngine:
    """The real engine, with a memory of what it was asked, and word of answers begun and ended; `idle` is set while
    there is none."""

    engine: Engine
    prompts: list[list[int]] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    idle: threading.Event = field(default_factory=threading.Event)
    running: int = 0

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        self.begun.set(), self.idle.clear()
        self.running += 1
        try:
            async with aclosing(self.engine.generate(prompt, sampling)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self.running -= 1
            self.ended.set()
            if not self.running:
                self.idle.set()

    async def score(self, prompt: Sequence[int], top: int = 0, adapter: str | None = None) -> list[TokenLogprob]:
        return await self.engine.score(prompt, top, adapter)

    async def embed(self, prompt: Sequence[int], adapter: str | None = None) -> list[float]:
        return await self.engine.embed(prompt, adapter)


@contextmanager
def live(app: ASGIApp) -> Iterator[str]:
    """The app behind uvicorn on a free port of this machine; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def entry(served: ServedModel) -> ModelEntry:
    return entry_of(served)


@pytest.fixture(scope="session")
def engine(served: ServedModel, entry: ModelEntry) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(served.weights, entry.context_tokens, served.num_slots, served.num_threads)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def recorder(engine: LlamaCppEngine) -> RecordingEngine:
    return RecordingEngine(engine)


@pytest.fixture(scope="session")
def url(entry: ModelEntry, recorder: RecordingEngine) -> Iterator[str]:
    """A live gate with the model `tiny`, and `short`: the same with room for 64 tokens."""
    models = {"tiny": entry, "short": replace(entry, context_tokens=64)}
    with live(create_app(models, lambda _: recorder, GateSettings(max_body_bytes=2**18))) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for every test: it takes seconds to start."""
    with headless_chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, url: str) -> Browser:
    """The chat page before the real engine, as at a first visit."""
    chromium.visit(url)
    return chromium


@pytest.fixture(scope="session")
def told_url(entry: ModelEntry, _teller: Storyteller) -> Iterator[str]:
    """A live gate whose models say what a test tells them to: `tiny`, its adapter `letters`, and `short`."""
    models = {
        "tiny": replace(entry, context_tokens=4096),
        "letters": replace(entry, context_tokens=4096, base="tiny"),
        "short": replace(entry, context_tokens=64),
    }
    with live(create_app(models, lambda _: _teller)) as url:
        yield url


@pytest.fixture(scope="session")
def _teller() -> Storyteller:
    return Storyteller()


@pytest.fixture
def teller(_teller: Storyteller) -> Iterator[Storyteller]:
    """Who answers at `told`."""
    _teller.tell("Well.")
    yield _teller
    _teller.go.set()  # whatever still waits may end


@pytest.fixture
def told(chromium: Browser, told_url: str, teller: Storyteller) -> Browser:
    """The chat page before a storyteller, as at a first visit."""
    chromium.visit(told_url)
    return chromium
