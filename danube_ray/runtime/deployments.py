"""The gate and its engines on Ray Serve: one deployment each, so that models scale apart and a dead engine stays out
of the gate. Nothing about HTTP, chat or llama.cpp is decided here; that is `danube_ray.serve`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from importlib import metadata
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray._private.state import available_resources_per_node
from ray.exceptions import RayActorError, RayError
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from ray.serve.schema import LoggingConfig
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from danube_ray.artifacts import content_hash
from danube_ray.config import GateSettings, ServeConfig, ServedModel
from danube_ray.runtime.llamacpp import LlamaCppReplica
from danube_ray.serve import guard
from danube_ray.serve.engines import Delta, EngineBusy, EngineError, Sampling, TokenLogprob
from danube_ray.serve.gate import ModelEntry, create_app
from danube_ray.serve.keys import ENVIRONMENT

DRAIN_MARGIN_S = 10.0  # beyond the longest answer, for a replica that must go
DRAIN_POLL_S = 0.1  # how often it looks whether its answers have ended
LOOK_BACK_S, MEASURE_S = 2.0, 1.0  # load is judged by its mean over this, measured so often
MEASURE_UNLOADED_S = 0.1  # the same of a model that may be unloaded: who asks then waits for a measurement
UPSCALE_DELAY_S = 0.5
QUEUE_POLL_S = 0.05  # how often, at least, a request that waits looks for a free slot; Serve's default is 0.5
HEALTH_CHECK_S = 1.0  # a dead replica is replaced when the next check finds it so; Serve's default is 10
LOG_BYTES = 64 * 2**20
LOAD_TRIES = 2  # Serve would try a model that can't be loaded 20 times
PACKAGE = metadata.version("danube-ray")  # another one is another version of every deployment
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class RemoteEngine:
    """An `Engine` behind a deployment handle. A replica that dies before it said anything is asked again, once."""

    def __init__(self, handle: DeploymentHandle) -> None:
        # Over gRPC, which Serve has between replicas: as Ray objects, messages cost about three times as much.
        handle = handle.options(_by_reference=False)
        self._generate = handle.options(method_name="generate", stream=True)
        self._score = handle.options(method_name="score")
        self._embed = handle.options(method_name="embed")

    @property
    def has_loaded(self) -> bool:
        """Whether there has been a replica since this process began."""
        return self._generate.running_replicas_populated()

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        for last_try in (False, True):
            begun = False
            response = cast(DeploymentResponseGenerator[Delta], self._generate.remote(list(prompt), sampling))
            try:
                async for delta in response:
                    begun = True
                    yield delta
                return
            except (GeneratorExit, asyncio.CancelledError):
                response.cancel()
                raise
            except Exception as error:  # an engine's own come as they are
                if begun or last_try or not isinstance(error, RayActorError):
                    raise engine_error(error) from None

    async def score(self, prompt: Sequence[int], top: int = 0, adapter: str | None = None) -> list[TokenLogprob]:
        return await self._ask(self._score, list(prompt), top, adapter)

    async def embed(self, prompt: Sequence[int], adapter: str | None = None) -> list[float]:
        return await self._ask(self._embed, list(prompt), adapter)

    async def _ask(self, method: DeploymentHandle, *arguments: object) -> Any:
        for last_try in (False, True):
            response = cast(DeploymentResponse[Any], method.remote(*arguments))
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                if last_try or not isinstance(error, RayActorError):
                    raise engine_error(error) from None


def engine_error(error: Exception) -> EngineError:
    """What went wrong on the way to an engine or in it, without Ray's words for it."""
    if isinstance(error, EngineError):
        return error
    if isinstance(error, BackPressureError):
        return EngineBusy("every slot of this model is taken and its queue is full")
    if isinstance(error, RayActorError):
        return EngineError("the engine's process was lost in the middle of the answer")
    if isinstance(error, RayError | RayServeException):
        return EngineError(f"the engine can't be reached ({type(error).__name__})")
    return EngineError("the engine failed")


@ray_serve.ingress()
class Gate:
    """The ingress: `danube_ray.serve.gate` over remote engines.

    One replica: it alone counts what each key has asked for, and it runs no code that a model could bring down.
    """

    def __init__(
        self,
        entries: dict[str, ModelEntry],
        settings: GateSettings,
        handles: dict[str, DeploymentHandle],
        kept: list[str],
        keys: str | None,
    ) -> None:
        if keys is not None:  # those of whoever deploys it: this process may have the environment of another node
            os.environ[ENVIRONMENT] = keys
        self._entries, self._settings, self._kept = entries, settings, kept
        self._engines = {name: RemoteEngine(handle) for name, handle in handles.items()}

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's name for it
        # Serve's proxy adds the header x-request-id to every answer, also to one that has it.
        app = create_app(self._entries, self._engines.__getitem__, self._settings, answer_request_id=False)
        app.add_middleware(Readiness, engines=[self._engines[name] for name in self._kept])
        log_requests_to(Path(get_serve_logs_dir()) / f"requests-{os.getpid()}.jsonl")
        return app


def log_requests_to(file: Path) -> None:
    """The access log's place: beside Serve's own logs, where the dashboard and log collectors look. A gate that ends
    its answers and the one that follows it have a file each."""
    for handler in guard.access.handlers[:]:
        guard.access.removeHandler(handler)
    guard.access.addHandler(RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8"))
    guard.access.setLevel(logging.INFO)
    guard.access.propagate = False


class Readiness:
    """`GET /health` is 503 until each of `engines`, those that are always kept, has loaded."""

    def __init__(self, app: ASGIApp, engines: list[RemoteEngine]) -> None:
        self.app, self.engines = app, engines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") == "/health" and not all(engine.has_loaded for engine in self.engines):
            await JSONResponse({"status": "loading"}, 503, {"retry-after": "1"})(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def application(config: ServeConfig, entries: dict[str, ModelEntry]) -> ray_serve.Application:
    """The Serve application: the gate, and one engine deployment a model."""
    drain_s = config.gate.deadline_s + DRAIN_MARGIN_S
    shared: dict[str, Any] = {
        "graceful_shutdown_timeout_s": drain_s,
        "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
        "health_check_period_s": HEALTH_CHECK_S,
        "max_constructor_retry_count": LOAD_TRIES,
        "logging_config": QUIET,
    }
    surge = {"max_surge_percent": 100 if room_beside(config) else 0}
    engines: dict[str, Any] = {
        name: engine(name, model, entries[name].context_tokens, shared | surge) for name, model in config.models.items()
    }
    known = {name: (entry.base, entry.context_tokens, entry.tokenizer.sha256) for name, entry in entries.items()}
    kept = [name for name, model in config.models.items() if model.min_replicas > 0]
    keys = os.environ.get(ENVIRONMENT)
    gate = ray_serve.deployment(
        name="gate", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1_000, max_surge_percent=100, **shared
    )(Gate)
    keys_file = config.gate.keys_file
    settings = replace(config.gate, keys_file=keys_file and keys_file.resolve())
    versioned = gate.options(version=content_hash((PACKAGE, known, repr(settings), kept, keys)), _internal=True)
    return versioned.bind(entries, settings, engines, kept, keys)


def engine(name: str, model: ServedModel, context_tokens: int, shared: dict[str, Any]) -> ray_serve.Application:
    """A model's deployment. Its version is all that a replica is made of; the rest changes while replicas run."""
    model = resolved(model)
    place: dict[str, Any] = {"ray_actor_options": {"num_cpus": model.num_threads}}
    replica, arguments = LlamaCppReplica, (model, context_tokens)
    if model.weights.is_dir():
        from danube_ray.runtime import vllm  # an extra, and seconds of imports

        config = vllm.llm_config(name, model, context_tokens, place)
        place = vllm.LLMServer.get_deployment_options(config)
        replica, arguments = vllm.VllmReplica, (config, model.adapters)
    deployment = ray_serve.deployment(
        name=f"engine-{name}",
        max_ongoing_requests=model.num_slots,
        max_queued_requests=model.max_queued,
        autoscaling_config=autoscaling(model),
        request_router_config={"max_backoff_s": QUEUE_POLL_S},
        **place,
        **shared,
    )(replica)
    files = (identity(model.weights), {name: identity(folder) for name, folder in model.adapters.items()})
    size = (context_tokens, model.num_slots, model.num_threads, model.num_gpus)
    versioned = deployment.options(version=content_hash((PACKAGE, files, size)), _internal=True)
    return versioned.bind(*arguments)


def autoscaling(model: ServedModel) -> AutoscalingConfig:
    """Engines by load: one more when every slot is taken, one less when that would have done for `idle_s`."""
    delay_s = max(0.0, model.idle_s - LOOK_BACK_S)  # load is 0 once all that is looked back on was idle
    return AutoscalingConfig(
        min_replicas=model.min_replicas,
        max_replicas=model.max_replicas,
        target_ongoing_requests=model.num_slots,
        upscale_delay_s=UPSCALE_DELAY_S,
        look_back_period_s=LOOK_BACK_S,
        metrics_interval_s=MEASURE_S if model.min_replicas else MEASURE_UNLOADED_S,
        downscale_delay_s=delay_s,
        downscale_to_zero_delay_s=delay_s,
    )


def room_beside(config: ServeConfig) -> bool:
    """Whether some node has room for one more of the largest engine, so that a new version can load before the old one
    goes. Where there is none the old one ends its answers first, and requests wait for the new one."""
    if not ray.is_initialized():
        return False
    cpus = max(model.num_threads for model in config.models.values())
    gpus = max(model.num_gpus for model in config.models.values())
    nodes = available_resources_per_node().values()
    return any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes)


def resolved(model: ServedModel) -> ServedModel:
    """`model` with absolute paths: replicas run in folders of their own."""
    adapters = {name: folder.resolve() for name, folder in model.adapters.items()}
    tokenizer = model.tokenizer_folder and model.tokenizer_folder.resolve()
    return replace(model, weights=model.weights.resolve(), tokenizer_folder=tokenizer, adapters=adapters)


def identity(path: Path) -> list[Any]:
    """Path, size and time of change of a file, or of each file of a folder: what tells a new version from an old."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
