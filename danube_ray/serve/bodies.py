"""Bodies as they come in: bounded in size, and JSON in the strict sense."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_MEMBERS = 4_096  # of one object; every unknown one would be reported on


class BodyLimit:
    """Refuses a body over `max_bytes`. The rest of it is read and dropped first: a client that is still sending would
    see a broken connection, not the answer."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        come_in = 0

        async def counted() -> Message:
            nonlocal come_in
            message = await receive()
            come_in += len(message.get("body", b""))
            if come_in > self.max_bytes:
                while message.get("more_body"):
                    message = await receive()
                raise HTTPException(413)
            return message

        await self.app(scope, counted, send)


class StrictRoute(APIRoute):
    """A route whose body must be JSON by its content type and by its letter."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise HTTPException(400, "send JSON, with content-type: application/json")
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse(await self.body())


def parse(body: bytes) -> Any:
    """JSON by RFC 8259, with no key twice and no huge object: `HTTPException` for all else that `json.loads` takes."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise HTTPException(400, f"the body is not valid JSON: {problem}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        raise ValueError(f"an object has more than {MAX_MEMBERS} members")
    members = dict(pairs)
    if len(members) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return members


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
