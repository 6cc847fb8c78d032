"""Drawing answers from an engine, for as long as somebody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from danube_ray.serve.engines import Delta, Engine
from danube_ray.serve.errors import ApiError, api_error
from danube_ray.serve.record import RequestRecord
from danube_ray.serve.replies import DONE, Choice, Reply
from danube_ray.serve.shapes import ChatCompletion, Completion, Usage

Drawn = AsyncGenerator[tuple[int, Delta], None]  # (index of the choice, what it says next)

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody reads it
FAREWELL_S = 1.0  # for a client to take the last event, whose buffers may be full


async def draw(engine: Engine, choices: Sequence[Choice], record: RequestRecord, log: bool = False) -> Drawn:
    """All choices at once: `(index, delta)` in order of arrival; leaving early closes every one of them.

    Keeps the record's counts, and with `log` the text of the answers.
    """
    tokens, texts = [0] * len(choices), [[] for _ in choices]
    streams = [_drawn(engine, index, choice) for index, choice in enumerate(choices)]
    deltas = streams[0] if len(streams) == 1 else _merged(streams)
    try:
        async with aclosing(deltas):
            async for index, delta in deltas:
                if delta.num_tokens > tokens[index]:
                    record.saw_first_token()
                    record.completion_tokens += delta.num_tokens - tokens[index]
                    tokens[index] = delta.num_tokens
                if log:
                    texts[index].append(delta.text)
                yield index, delta
    finally:
        if log:
            record.answer = "\n".join("".join(pieces) for pieces in texts)


async def _drawn(engine: Engine, index: int, choice: Choice) -> Drawn:
    """The prompt where it is to be repeated, then the answer."""
    prompt, sampling = choice.prompt, choice.sampling
    if echo := choice.echo:
        scored = []
        if sampling.logprobs is not None and len(prompt) > 1:
            scored = await engine.score(prompt, sampling.logprobs, sampling.adapter)
        yield index, Delta(echo.text, 0, None if sampling.max_tokens else "length", tuple(scored[echo.start :]))
    if sampling.max_tokens:
        async with aclosing(engine.generate(prompt, sampling)) as deltas:
            async for delta in deltas:
                yield index, delta


async def _merged(streams: Sequence[Drawn]) -> Drawn:
    """Several streams as one. Nobody reads ahead of the client by more than a delta each."""
    arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(len(streams))

    async def pump(stream: Drawn) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await arrived.put(item)
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(pumps)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def collect(reply: Reply, drawn: Drawn, num_choices: int, record: RequestRecord) -> ChatCompletion | Completion:
    """The answer in one piece."""
    said: list[list[Delta]] = [[] for _ in range(num_choices)]
    async with aclosing(drawn):
        async for index, delta in drawn:
            said[index].append(delta)
    return reply.whole([_joined(deltas) for deltas in said], usage(record))


def _joined(deltas: Sequence[Delta]) -> Delta:
    text = "".join(delta.text for delta in deltas)
    return replace(deltas[-1], text=text, logprobs=tuple(told for delta in deltas for told in delta.logprobs))


async def events(reply: Reply, drawn: Drawn, record: RequestRecord, wants_usage: bool) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    async with aclosing(drawn):
        async for index, delta in drawn:
            yield reply.chunk(index, delta)
    if wants_usage:
        yield reply.usage_chunk(usage(record))
    yield DONE


def usage(record: RequestRecord) -> Usage:
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
    }


@asynccontextmanager
async def while_wanted(receive: Receive, deadline_s: float) -> AsyncIterator[None]:
    """Cancels the block when the client leaves or the deadline passes, and ends in the `ApiError` that says so."""
    limit, gone = asyncio.timeout(deadline_s), False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        limit.reschedule(0)  # long past: the block ends at once

    try:
        async with limit:
            watcher = asyncio.create_task(watch())
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if not limit.expired():
            raise
        if gone:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client left", code="client_closed_request") from None
        raise ApiError(504, f"the answer took longer than {deadline_s:g} s", code="deadline_exceeded") from None


class EventStream(StreamingResponse):
    """Events as they are drawn. Until there is a first one nothing is sent, so what fails before has its own status;
    a failure after it is an event, and no `[DONE]` follows.

    The events are closed as soon as the client leaves or the deadline passes, also while a client that doesn't read
    holds up the sending: its slot is free then, and no more than a socket's buffer was kept for it.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], deadline_s: float, record: RequestRecord) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, 200, headers, "text/event-stream")
        self._events, self._deadline_s, self._record = events, deadline_s, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async with while_wanted(receive, self._deadline_s), aclosing(self._events):
                async for chunk in self._events:
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            if not begun:
                raise
            failure = api_error(error)
            self._record.error_code = failure.code
            with contextlib.suppress(OSError):  # out of time, or the connection is broken
                async with asyncio.timeout(FAREWELL_S):
                    await send({"type": "http.response.body", "body": failure.event, "more_body": True})
                    await send({"type": "http.response.body", "body": b""})
