"""What Prometheus is told about the gate. Labels are bounded: a served model, a known route, a status, a reason."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Collection
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from danube_ray.serve.record import RequestRecord

Rejection = Literal["auth", "host", "rate", "concurrency", "busy"]

# From a cache hit on a small model to a queue in front of a large one; an answer's end, up to the default deadline; and
# one token's time, from a toy to less than reading speed.
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DURATION_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)


class Metrics:
    """One gate's numbers, in a registry of their own: another gate in the process doesn't meet them, nor a library."""

    def __init__(self, models: Collection[str]) -> None:
        self._models = models
        self._live: dict[int, RequestRecord] = {}
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "danube_requests", "Requests by how they ended.", ("model", "path", "status"), registry=registry
        )
        self._rejected = Counter(
            "danube_rejected_requests", "Requests sent away before an engine had them.", ("reason",), registry=registry
        )
        self._prompt_tokens = Counter("danube_prompt_tokens", "Tokens read.", ("model",), registry=registry)
        self._completion_tokens = Counter("danube_completion_tokens", "Tokens written.", ("model",), registry=registry)
        self._in_flight = Gauge("danube_requests_in_flight", "Answers under way.", ("model",), registry=registry)
        self._duration = Histogram(
            "danube_request_duration_seconds",
            "From a request's head to its answer's end.",
            ("model", "path"),
            buckets=DURATION_S,
            registry=registry,
        )
        self._first_token = Histogram(
            "danube_time_to_first_token_seconds",
            "From a request's head to its first token.",
            ("model",),
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self._token_time = Histogram(
            "danube_time_per_output_token_seconds",
            "Mean time between the tokens of an answer, after the first.",
            ("model",),
            buckets=TOKEN_S,
            registry=registry,
        )
        for reason in get_args(Rejection):  # from zero: a first one that jumps into being is no increase to Prometheus
            self._rejected.labels(reason)

    def rejected(self, reason: Rejection) -> None:
        self._rejected.labels(reason).inc()

    def begin(self, record: RequestRecord) -> None:
        """The request is under way; its model shows as soon as the gate knows it."""
        self._live[id(record)] = record

    def end(self, record: RequestRecord, path: str, status: int) -> float:
        """Count a request that has ended, however it did. Gives its duration in seconds."""
        del self._live[id(record)]
        duration_s = time.monotonic() - record.started
        model = record.model if record.model in self._models else None
        self._requests.labels(model or "", path, str(status)).inc()
        if record.error_code == "engine_busy":
            self.rejected("busy")
        if model is not None:
            self._prompt_tokens.labels(model).inc(record.prompt_tokens)
            self._completion_tokens.labels(model).inc(record.completion_tokens)
            self._duration.labels(model, path).observe(duration_s)
            if record.first_token_s is not None:
                self._first_token.labels(model).observe(record.first_token_s)
                if record.completion_tokens > 1:
                    after_first_s = duration_s - record.first_token_s
                    self._token_time.labels(model).observe(after_first_s / (record.completion_tokens - 1))
        return duration_s

    def text(self) -> bytes:
        """The exposition format, as of now."""
        under_way = Tally(record.model for record in list(self._live.values()))
        for model in self._models:
            self._in_flight.labels(model).set(under_way[model])
        return generate_latest(self._registry)
