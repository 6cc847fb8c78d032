"""Everything that goes wrong leaves in one shape: OpenAI's `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from danube_ray.serve.engines import EngineBusy, EngineError, EngineRejected

logger = logging.getLogger(__name__)

PLAIN_NAME = re.compile(r"[\w-]+")
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
    def type(self) -> str:
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        # A client's own text may stand in the message; half a surrogate pair in it can't be encoded.
        message = self.message.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)

    @property
    def event(self) -> bytes:
        """The same in a stream that has begun."""
        return f"data: {json.dumps(self.body)}\n\n".encode()


def api_error(error: Exception) -> ApiError:
    """What a failure means to the client. One that nobody foresaw is logged, and tells nothing of itself."""
    match error:
        case ApiError():
            return error
        case EngineRejected():
            return ApiError(400, str(error), code="engine_rejected")
        case EngineBusy():
            return ApiError(503, str(error), code="engine_busy", retry_after_s=1)
        case EngineError():
            return ApiError(503, str(error), code="engine_unavailable", retry_after_s=5)
        case RequestValidationError():
            return from_validation(error.errors())
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why", code="internal_error")


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first problem of a request that doesn't fit the schema."""
    first = errors[0]
    path = takewhile(PLAIN_NAME.fullmatch, map(str, first["loc"][1:]))  # further in stand pydantic's names of types
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        message = f"{param or 'a field of the body'} is not a parameter that this server knows"
        return ApiError(400, message, param=param, code="unknown_parameter")
    if first["type"] == "none_required":
        return ApiError(400, f"{param} is not served here", param=param, code="unsupported_parameter")
    message = first["msg"].removeprefix("Value error, ")  # pydantic's, before our own
    return ApiError(400, f"{param or 'the body'}: {message}", param=param)


def install(app: FastAPI) -> None:
    """Answer in OpenAI's shape whatever is raised to be told; the guard answers for what nobody foresaw."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        failure = api_error(error)
        request.state.record.error_code = failure.code or failure.type
        return failure.response

    def http_answer(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"there is no {request.url.path} here",
            405: f"{request.url.path} does not take {request.method}",
            413: "the body is larger than this server takes",
        }
        response = answer(request, ApiError(error.status_code, messages.get(error.status_code, str(error.detail))))
        response.headers.update(error.headers or {})  # which methods are allowed
        return response

    for kind in (ApiError, EngineError, RequestValidationError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, http_answer)
