"""What stands in Ray Serve's own HTTP proxy, in front of the gate: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.

By itself the proxy obeys some headers, whoever sends them, and drops the connections of a gate that dies.
"""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danube_ray.serve.errors import ApiError
from danube_ray.serve.guard import REQUEST_ID

# Serve's own: not to look whether the client has left (the gate looks too), and to cut its answer off.
ORDERS = (b"x-request-disconnect-disabled", b"x-request-timeout-seconds")


def middlewares() -> list[Middleware]:
    """What Serve asks for when its proxy starts."""
    return [Middleware(Threshold)]


class Threshold:
    """Lets no header in that is an order to Serve, or a request id that the gate would not take as one: Serve would
    answer with it all the same. An answer that the gate could not end, as it died, ends in an error here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun: Message | None = None
        whole = False

        def sending(message: Message) -> Awaitable[None]:
            nonlocal begun, whole
            if message["type"] == "http.response.start":
                begun = message
            else:
                whole = not message.get("more_body", False)
            return send(message)

        headers = [(name, value) for name, value in scope["headers"] if _may_enter(name, value)]
        await self.app({**scope, "headers": headers}, receive, sending)
        lost = ApiError(503, "the gate was lost in the middle of the answer", code="gate_unavailable", retry_after_s=1)
        if begun is None:
            await lost.response(scope, receive, send)
        elif not whole and (b"content-type", b"text/event-stream; charset=utf-8") in map(tuple, begun["headers"]):
            await send({"type": "http.response.body", "body": lost.event})


def _may_enter(name: bytes, value: bytes) -> bool:
    return name not in ORDERS and (name != b"x-request-id" or bool(REQUEST_ID.fullmatch(value)))
