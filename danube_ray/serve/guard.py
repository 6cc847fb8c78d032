"""What stands around the gate's routes: who may come in and how often, what is told about it, and what a browser may
do with the answers. Plain ASGI, so that a stream stays a stream: a chunk on its way out costs two function calls."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import logging
import os
import re
import uuid
from collections import Counter
from collections.abc import Awaitable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danube_ray.config import GateSettings, require
from danube_ray.serve.answers import CLIENT_CLOSED_REQUEST
from danube_ray.serve.errors import ApiError, api_error
from danube_ray.serve.keys import ENVIRONMENT, Keys
from danube_ray.serve.limits import RateLimit
from danube_ray.serve.metrics import Metrics, Rejection
from danube_ray.serve.record import RequestRecord

logger = logging.getLogger(__name__)
access = logging.getLogger("danube_ray.serve.access")  # a line a request, at INFO, for whoever gives it a place

# Open to everybody: the page holds no secret, it asks its user for the key, and who watches over a server has none.
# `/metrics` is not: how much each model is used is its owner's business, and Prometheus can send a bearer token.
OPEN_PATHS = {"/", "/health"}
REQUEST_ID = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)
EXPOSED = ("x-request-id", "retry-after", *(f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset")))


def load_keys(settings: GateSettings) -> Keys:
    """The keys of the settings' file and of the environment. `ConfigError` when they can't be read."""
    return Keys(settings.keys_file, os.environ.get(ENVIRONMENT))


def check_bind(host: str, settings: GateSettings) -> None:
    """`ConfigError` unless there are keys, or `host` is reached from this machine only; also when keys can't be read.
    A name other than localhost may mean any address, and counts as public."""
    remedy = f"make a key with `danube keys NAME --file FILE`, and give FILE as keys_file or its lines as {ENVIRONMENT}"
    allowed = "a loopback address while there are no API keys: anybody could use the models"
    require(load_keys(settings).required or _is_loopback(host), "host", host, allowed, remedy)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def install(app: FastAPI, settings: GateSettings, models: Collection[str], *, answer_request_id: bool = True) -> None:
    """Put the guard around `app`, and `/metrics` into it.

    answer_request_id: whether answers carry `x-request-id`. Ray Serve's proxy adds the header itself, to what is there.
    """
    metrics, keys = Metrics(models), load_keys(settings)

    @app.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    # The last one added is the outermost.
    app.add_middleware(Admission, keys=keys, settings=settings, metrics=metrics)
    app.add_middleware(Rescue)
    if settings.cors_origins:  # outside of what refuses: a page must be able to read why
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # OpenAI's JavaScript client sends a dozen; no cookies are allowed
            allow_private_network=True,
            expose_headers=EXPOSED,
        )
    app.add_middleware(Observer, metrics=metrics, answer_request_id=answer_request_id)


class Observer:
    """Names each request, and tells the log and the metrics how it ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, answer_request_id: bool) -> None:
        self.app, self.metrics, self.answer_request_id = app, metrics, answer_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = RequestRecord(request_id=_request_id(scope))
        scope.setdefault("state", {})["record"] = record
        headers = [(b"x-content-type-options", b"nosniff")]
        if self.answer_request_id:
            headers.append((b"x-request-id", record.request_id.encode()))
        whole = False

        def sending(message: Message) -> Awaitable[None]:  # not async: a stream passes here with every token
            nonlocal whole
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *headers]
            else:
                whole = not message.get("more_body", False)
            return send(message)

        self.metrics.begin(record)
        try:
            await self.app(scope, receive, sending)
        finally:
            if not whole and record.error_code is None:
                record.error_code = "client_closed_request"
            status = record.status or CLIENT_CLOSED_REQUEST
            seconds = self.metrics.end(record, _route(scope), status)
            if access.isEnabledFor(logging.INFO):
                access.info(json.dumps(_told(scope, record, status, seconds), ensure_ascii=False))


class Rescue:
    """Answers for what breaks inside. An answer that has begun can only be broken off: the server does that."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception as error:
            record: RequestRecord | None = scope.get("state", {}).get("record")
            if record is None or record.status is not None:
                raise
            logger.error("request %s failed", record.request_id)
            failure = api_error(error)  # which logs how
            record.error_code = failure.code
            await failure.response(scope, receive, send)


@dataclass(frozen=True)
class Caller:
    """Whose request it is, and their limits."""

    name: str
    requests_per_minute: int | None
    concurrent_requests: int | None


class Admission:
    """Lets in who has a key, no oftener than agreed. An answer is under way until it has ended, however it did."""

    def __init__(self, app: ASGIApp, keys: Keys, settings: GateSettings, metrics: Metrics) -> None:
        self.app, self.keys, self.settings, self.metrics = app, keys, settings, metrics
        self._rate = RateLimit()
        self._under_way: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self.app(scope, receive, send)
        record: RequestRecord = scope["state"]["record"]
        generates = scope["method"] == "POST" and scope["path"].startswith("/v1/")
        try:
            caller = self._identify(scope)
            record.caller = caller.name
            headers = self._admit(caller) if generates else {}
        except ApiError as error:
            record.error_code = error.code
            return await error.response(scope, receive, send)
        if not generates:
            return await self.app(scope, receive, send)
        self._under_way[caller.name] += 1
        try:
            await self.app(scope, receive, _adding(headers, send) if headers else send)
        finally:
            self._under_way[caller.name] -= 1
            if not self._under_way[caller.name]:
                del self._under_way[caller.name]  # or every address would stay

    def _identify(self, scope: Scope) -> Caller:
        """Who calls: a key's owner, or an address where there are no keys."""
        settings, headers = self.settings, dict(scope["headers"])
        if not self.keys.required:
            if not _is_own_name(headers.get(b"host", b"").decode("latin-1")):
                message = "without API keys this server answers under localhost or an address, not under another name"
                raise self._refusal("host", 403, message, "host_not_allowed")
            address = (scope.get("client") or ("unknown",))[0]
            return Caller(address, settings.requests_per_minute, settings.concurrent_requests)
        scheme, _, secret = headers.get(b"authorization", b"").partition(b" ")
        key = self.keys.find(secret.strip()) if scheme.lower() == b"bearer" else None
        if key is None:
            message = "this API key is not known here" if secret else "an API key is needed: Authorization: Bearer KEY"
            refusal = self._refusal("auth", 401, message, "invalid_api_key")
            refusal.headers["www-authenticate"] = "Bearer"
            raise refusal
        per_minute = key.requests_per_minute or settings.requests_per_minute
        return Caller(key.name, per_minute, key.concurrent_requests or settings.concurrent_requests)

    def _admit(self, caller: Caller) -> dict[str, str]:
        """Hold a request against its caller's limits; gives headers that tell what is left. What the limit on answers
        refuses doesn't count as one of the minute's."""
        most = caller.concurrent_requests
        if most is not None and self._under_way[caller.name] >= most:
            message = f"{most} answers are under way, as many as you may have"
            raise self._refusal("concurrency", 429, message, wait_s=1)  # nobody knows when one of them ends
        if caller.requests_per_minute is None:
            return {}
        allowance = self._rate.take(caller.name, caller.requests_per_minute)
        if allowance.retry_after_s:
            message = f"{caller.requests_per_minute} requests a minute is your limit"
            refusal = self._refusal("rate", 429, message, wait_s=allowance.retry_after_s)
            refusal.headers.update(allowance.headers)
            raise refusal
        return allowance.headers

    def _refusal(
        self, reason: Rejection, status: int, message: str, code: str = "rate_limit_exceeded", wait_s: int = 0
    ) -> ApiError:
        self.metrics.rejected(reason)
        return ApiError(status, message, code=code, retry_after_s=wait_s)


def _adding(headers: dict[str, str], send: Send) -> Send:
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]

    def sending(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *encoded]
        return send(message)

    return sending


def _is_own_name(host: str) -> bool:
    """Whether no stranger can own the name that a request was sent to. A page of theirs may have its own name resolve
    to this machine (DNS rebinding), and its visitor's browser then takes our answers for that page's; an address can't
    be made to mean another one, and names without a dot are not sold."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        return "." not in name or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _request_id(scope: Scope) -> str:
    """The client's own name for its request, if it is one that a log can hold."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _route(scope: Scope) -> str:
    """The path as the app declares it. What was refused never reached its router; unknown paths are one."""
    if route := scope.get("route"):
        return route.path
    known = scope["path"] in {getattr(one, "path", None) for one in scope["app"].routes}
    return scope["path"] if known else "other"


def _told(scope: Scope, record: RequestRecord, status: int, seconds: float) -> dict[str, Any]:
    """The access log's line. What was asked and answered is in the record only where the settings say so."""
    told = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "caller": record.caller,
        "method": scope["method"],
        "path": scope["path"][:256],
        "status": status,
        "model": record.model,
        "stream": record.stream,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "seconds": round(seconds, 4),
        "first_token_s": record.first_token_s and round(record.first_token_s, 4),
        "error": record.error_code,
    }
    texts = {"prompt": record.prompt, "answer": record.answer}
    return told | {name: text for name, text in texts.items() if text is not None}


def page_headers(page: str) -> dict[str, str]:
    """Headers of an HTML page that needs nothing from elsewhere: its own scripts and styles run, known by their hashes,
    and nothing that somebody writes into it; it talks to this server only; no other page may frame it."""
    allowed = {}
    for tag in ("script", "style"):
        hashes = [hashlib.sha256(text.encode()).digest() for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)]
        allowed[tag] = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes) or "'none'"
    policy = {
        "default-src": "'none'",
        "script-src": allowed["script"],
        "style-src": allowed["style"],
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
    }
