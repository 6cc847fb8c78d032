"""Everything that goes wrong leaves in one shape: OpenAI's `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danube_ray.serve.engines import EngineBusy, EngineError, EngineRejected

logger = logging.getLogger(__name__)

TYPES = {404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200: its status, what to tell the client, and the parameter at fault."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {"retry-after": str(retry_after_s)} if retry_after_s else {}

    @property
    def body(self) -> dict[str, Any]:
        # A client's own text may stand in the message; half a surrogate pair in it can't be encoded.
        message = self.message.encode("utf-8", "replace").decode()
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


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


def from_engine(error: EngineError) -> ApiError:
    """What an engine's failure means to the client."""
    if isinstance(error, EngineRejected):
        return ApiError(400, str(error), code="engine_rejected")
    if isinstance(error, EngineBusy):
        return ApiError(503, str(error), code="engine_busy", retry_after_s=1)
    return ApiError(503, str(error), code="engine_unavailable", retry_after_s=5)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first problem of a request that doesn't fit the schema."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at byte {first['loc'][-1]}")
    path = [str(part) for part in first["loc"][1:]]
    param = ".".join(path).encode("utf-8", "replace").decode() or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param} is not a parameter that this server knows", param=param, code="unknown_parameter"
        )
    return ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param)


def install(app: FastAPI) -> None:
    """Answer every exception of `app` in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(EngineError)
    async def _(_: Request, error: EngineError) -> JSONResponse:
        return from_engine(error).response

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: f"there is no {request.url.path} here",
            405: f"{request.url.path} does not take {request.method}",
            413: "the body is larger than this server takes",
        }
        return ApiError(error.status_code, messages.get(error.status_code, str(error.detail))).response

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed to answer; its log says why").response
