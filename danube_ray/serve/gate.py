"""The gate: OpenAI requests in, token ids to an engine, OpenAI answers out. Ray is not needed for any of it.

A request is read (`bodies`, `schema`), becomes token ids and wishes (`prompts`), an engine draws for as long as
somebody waits (`answers`), and what it says goes out as chunks or in one piece (`replies`). Everything that can be
refused is refused before a stream starts: after that an error is an event in it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from danube_ray.config import GateSettings
from danube_ray.serve import errors, guard
from danube_ray.serve.answers import EventStream, collect, draw, events, while_wanted
from danube_ray.serve.bodies import BodyLimit, StrictRoute
from danube_ray.serve.embeddings import embed
from danube_ray.serve.engines import Engine
from danube_ray.serve.errors import ApiError
from danube_ray.serve.prompts import ModelEntry, chat_choices, embedding_inputs, text_choices
from danube_ray.serve.replies import Choice, Reply
from danube_ray.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from danube_ray.serve.shapes import (
    ChatCompletion,
    Completion,
    EmbeddingList,
    Health,
    Model,
    ModelList,
    described,
)

__all__ = ["ModelEntry", "create_app"]

CHAT_PAGE = Path(__file__).with_name("chat.html")


def create_app(
    models: Mapping[str, ModelEntry],
    engine_for: Callable[[str], Engine],
    settings: GateSettings | None = None,
    *,
    answer_request_id: bool = True,
) -> FastAPI:
    """The whole HTTP surface over `models`; `engine_for(name)` is asked for an engine at each request, with the name
    of a base model for its adapters. `answer_request_id` is as in `guard.install`."""
    limits = settings or GateSettings()
    app = FastAPI(title="danube_ray", docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    errors.install(app)
    gate = _Endpoints(models, engine_for, limits)
    page = CHAT_PAGE.read_text()
    page_headers = guard.page_headers(page)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

    app.get("/health", responses=described(Health))(gate.health)
    app.head("/health", include_in_schema=False)(gate.health)  # as load balancers ask
    app.get("/v1/models", responses=described(ModelList))(gate.list_models)
    app.get("/v1/models/{name:path}", responses=described(Model))(gate.show_model)
    app.post("/v1/chat/completions", responses=described(ChatCompletion, streams=True))(gate.chat)
    app.post("/v1/completions", responses=described(Completion, streams=True))(gate.complete)
    app.post("/v1/embeddings", responses=described(EmbeddingList))(gate.embed)
    guard.install(app, limits, models, answer_request_id=answer_request_id)
    return app


@dataclass(frozen=True)
class _Endpoints:
    """What the paths answer."""

    models: Mapping[str, ModelEntry]
    engine_for: Callable[[str], Engine]
    limits: GateSettings

    async def health(self) -> Response:
        return JSONResponse({"status": "ok", "models": list(self.models)})

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.models]})

    async def show_model(self, name: str) -> Response:
        return JSONResponse(self._described(name))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        choices = await asyncio.to_thread(chat_choices, body, self._entry(body.model), self.limits)
        return await self._answer(request, body, choices)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        choices = await asyncio.to_thread(text_choices, body, self._entry(body.model), self.limits)
        return await self._answer(request, body, choices)

    async def embed(self, body: EmbeddingRequest, request: Request) -> Response:
        entry, record = self._entry(body.model), request.state.record
        inputs = await asyncio.to_thread(embedding_inputs, body, entry)
        record.model, record.prompt_tokens = body.model, sum(map(len, inputs))
        engine, adapter = self._engine(body.model), body.model if entry.base else None
        async with while_wanted(request.receive, self.limits.deadline_s):
            return JSONResponse(await embed(body, engine, inputs, adapter, self.limits.max_choices))

    async def _answer(self, request: Request, body: ChatRequest | CompletionRequest, choices: list[Choice]) -> Response:
        limits, record = self.limits, request.state.record
        record.model, record.stream = body.model, bool(body.stream)
        record.prompt_tokens = sum(len(choice.prompt) for choice in choices[:: body.n or 1])
        if limits.log_prompts:
            record.prompt = json.dumps(body.asked, ensure_ascii=False)
        tokenizer = self.models[body.model].tokenizer
        reply = Reply(body.kind, body.model, choices, tokenizer, chunk_usage=body.wants_usage)
        drawn = draw(self._engine(body.model), choices, record, limits.log_prompts)
        if body.stream:
            return EventStream(events(reply, drawn, record, body.wants_usage), limits.deadline_s, record)
        async with while_wanted(request.receive, limits.deadline_s):
            return JSONResponse(await collect(reply, drawn, len(choices), record))

    def _entry(self, name: str) -> ModelEntry:
        if name not in self.models:
            served = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name!r}: {served}", code="model_not_found", param="model")
        return self.models[name]

    def _engine(self, name: str) -> Engine:
        return self.engine_for(self.models[name].base or name)

    def _described(self, name: str) -> Model:
        entry = self._entry(name)
        return {
            "id": name,
            "object": "model",
            "created": entry.created,
            "owned_by": "danube_ray",
            "root": entry.base or name,
            "parent": entry.base,
            "max_model_len": entry.context_tokens,
        }
