"""The gate: OpenAI requests in, token ids to an engine, OpenAI chunks out. Ray is not needed for any of it.

The template is rendered and tokenized here, by the functions that made the training data, so served token ids equal
trained ones. Everything that can be refused is refused before a stream starts: after that an error is an event in it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from danube_ray.config import GateSettings, require_positive
from danube_ray.data.chat import Message, render
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.serve import errors
from danube_ray.serve.engines import Delta, Engine, EngineError, FinishReason, Sampling
from danube_ray.serve.errors import ApiError
from danube_ray.serve.schema import ChatRequest, CompletionRequest, GenerationRequest, Reply

T = TypeVar("T")
CHAT_PAGE = Path(__file__).with_name("chat.html")
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody reads it


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model as the gate knows it. `context_tokens` bounds prompt and answer together; `base` is the model that an
    adapter belongs to, whose engine answers for it."""

    tokenizer: Tokenizer
    context_tokens: int
    base: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        require_positive(self, "context_tokens")


@dataclass(frozen=True)
class Choice:
    """One answer to draw: the prompt's token ids, and how."""

    prompt: list[int]
    sampling: Sampling


def create_app(
    models: Mapping[str, ModelEntry], engine_for: Callable[[str], Engine], settings: GateSettings | None = None
) -> FastAPI:
    """The whole HTTP surface over `models`; `engine_for(name)` is asked for an engine at each request."""
    limits = settings or GateSettings()
    app = FastAPI(title="danube_ray", docs_url=None, redoc_url=None)
    app.add_middleware(errors.BodyLimit, max_bytes=limits.max_body_bytes)
    errors.install(app)
    page = CHAT_PAGE.read_text()

    def find(name: str) -> ModelEntry:
        if name not in models:
            served = ", ".join(models)
            raise ApiError(404, f"there is no model {name!r}: {served}", code="model_not_found", param="model")
        return models[name]

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": "default-src 'self' 'unsafe-inline' data:"})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(models)}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(name, entry) for name, entry in models.items()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        return describe(name, find(name))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        entry = find(body.model)
        prompt = await asyncio.to_thread(chat_prompt, body, entry.tokenizer)
        max_tokens = body.max_completion_tokens or body.max_tokens
        choices = plan(body, [prompt], max_tokens, entry, limits)
        reply = Reply(kind="chat", model=body.model, prompt_tokens=len(prompt))
        return await answer(request, body, reply, engine_for(body.model), choices, limits)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        entry = find(body.model)
        prompts = await asyncio.to_thread(text_prompts, body, entry.tokenizer)
        choices = plan(body, prompts, body.max_tokens or 16, entry, limits)  # 16 is OpenAI's default here
        reply = Reply(kind="text", model=body.model, prompt_tokens=sum(map(len, prompts)))
        return await answer(request, body, reply, engine_for(body.model), choices, limits)

    return app


def describe(name: str, entry: ModelEntry) -> dict[str, Any]:
    """A model as `/v1/models` lists it; `max_model_len` is vLLM's word for the context."""
    return {
        "id": name,
        "object": "model",
        "created": entry.created,
        "owned_by": "danube_ray",
        "max_model_len": entry.context_tokens,
    }


def chat_prompt(body: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation, ready for the assistant's turn."""
    messages = [cast(Message, {"role": turn.speaker, "content": turn.text}) for turn in body.messages]
    try:
        ids, _ = render(messages, tokenizer, add_generation_prompt=True)
    except ValueError as error:  # an order of roles that the template has no words for
        raise ApiError(400, str(error), param="messages") from None
    return ids


def text_prompts(body: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each prompt: text as training saw a document's begin, ids as they are."""
    prompts = []
    for prompt in body.prompts:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        if not all(0 <= token < tokenizer.vocab_size for token in ids):
            raise ApiError(400, f"token ids must lie in 0..{tokenizer.vocab_size - 1}", param="prompt")
        prompts.append(ids)
    if not prompts or not all(prompts):
        raise ApiError(400, "there must be a prompt, and none without tokens", param="prompt")
    return prompts


def plan(
    body: GenerationRequest, prompts: list[list[int]], max_tokens: int | None, entry: ModelEntry, limits: GateSettings
) -> list[Choice]:
    """The answers to draw, in the order of their index. What does not fit is an error.

    `max_tokens` is an upper bound: where the context holds less beside the prompt, the answer ends with "length".
    """
    context, repeats = entry.context_tokens, body.n or 1
    if max_tokens is not None and max_tokens > context:
        raise ApiError(400, f"max_tokens is {max_tokens}, the model's context is {context}", param="max_tokens")
    if repeats * len(prompts) > limits.max_choices:
        raise ApiError(400, f"{repeats * len(prompts)} answers asked, at most {limits.max_choices} at once", param="n")
    if (longest := max(map(len, prompts))) >= context:
        message = f"the prompt has {longest} tokens, the model's context of {context} must hold it and an answer"
        raise ApiError(400, message, code="context_length_exceeded", param="messages")
    choices = []
    for prompt in prompts:
        room = context - len(prompt)
        for repeat in range(repeats):
            seed = None if body.seed is None else body.seed + repeat
            choices.append(Choice(prompt, sampling(body, min(max_tokens or room, room), seed)))
    return choices


def sampling(body: GenerationRequest, max_tokens: int, seed: int | None) -> Sampling:
    """A request's wishes, with OpenAI's defaults for those it leaves out."""
    named = ("temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in named if (value := getattr(body, name)) is not None}
    return Sampling(max_tokens=max_tokens, seed=seed, stop=body.stop_texts, **given)


async def answer(
    request: Request, body: GenerationRequest, reply: Reply, engine: Engine, choices: list[Choice], limits: GateSettings
) -> Response:
    """Stream or collect. A stream begins once the engine has, so that one which can't has its proper status."""
    deltas = draw(engine, choices, reply.kind, limits.deadline_s)
    if not body.stream:
        return JSONResponse(await while_connected(request, collect(reply, deltas, len(choices))))
    first = await while_connected(request, anext(deltas))  # type: ignore[arg-type]
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events(reply, first, deltas, include_usage), 200, headers, "text/event-stream")


async def draw(
    engine: Engine, choices: list[Choice], kind: str, deadline_s: float
) -> AsyncGenerator[tuple[int, Delta], None]:
    """All choices at once: `(index, delta)` in order of arrival; leaving early closes every one of them."""
    deadline = time.monotonic() + deadline_s
    streams = [engine.generate(choice.prompt, choice.sampling) for choice in choices]
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    at_start = {index for index in range(len(choices)) if kind == "chat"}
    try:
        while waiting:
            left_s = max(0.0, deadline - time.monotonic())
            done, _ = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise ApiError(504, f"the answer took longer than {deadline_s:g} s", code="deadline_exceeded")
            for task in done:
                delta, index = task.result(), waiting.pop(task)
                if delta.text and index in at_start:
                    # sentencepiece marks the start of a word, the first word's too, and its decoder drops that one
                    at_start.remove(index)
                    delta = replace(delta, text=delta.text.removeprefix(" "))
                if delta.finish_reason is None:
                    waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)


async def collect(reply: Reply, deltas: AsyncGenerator[tuple[int, Delta], None], num_choices: int) -> dict[str, Any]:
    """The answer in one piece."""
    texts, tokens = [""] * num_choices, [0] * num_choices
    reasons: list[FinishReason] = ["stop"] * num_choices
    async with aclosing(deltas):
        async for index, delta in deltas:
            texts[index] += delta.text
            tokens[index] = delta.num_tokens
            reasons[index] = delta.finish_reason or "stop"
    return reply.whole(texts, reasons, sum(tokens))


async def events(
    reply: Reply, first: tuple[int, Delta], rest: AsyncGenerator[tuple[int, Delta], None], include_usage: bool
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events. A failure on the way is an error event, and no `[DONE]` follows it."""
    tokens: dict[int, int] = {}
    async with aclosing(rest):
        try:
            index, delta = first
            while True:
                chunk = reply.chunk(index, delta.text, delta.finish_reason, first=index not in tokens)
                tokens[index] = delta.num_tokens
                yield event(chunk)
                index, delta = await anext(rest)
        except StopAsyncIteration:
            if include_usage:
                yield event(reply.usage_chunk(sum(tokens.values())))
            yield "data: [DONE]\n\n"
        except EngineError as error:
            yield event(errors.from_engine(error).body)
        except ApiError as error:
            yield event(error.body)


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which ends at once when the client has left: nobody would read what it makes."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client left")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
