"""The gate and its engines on Ray Serve: one deployment each, so that models scale apart and a dead engine stays out
of the gate. Nothing about HTTP, chat or llama.cpp is decided here; that is `danube_ray.serve`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import LoggingConfig

from danube_ray.config import GateSettings, ServeConfig, ServedModel, require
from danube_ray.runtime.session import session
from danube_ray.serve.engines import Delta, EngineBusy, EngineError, LlamaCppEngine, Sampling
from danube_ray.serve.gate import ModelEntry, create_app
from danube_ray.serve.models import entries

APPLICATION = "danube"
DRAIN_S = 30.0  # how long a replica that must go may finish its answers
DRAIN_POLL_S = 0.1  # and how often it looks whether it has
LOOK_BACK_S, MEASURE_S = 2.0, 1.0  # load is judged by its mean over this, measured so often
HEALTH_CHECK_S = 1.0  # a dead engine is replaced when the next check finds it so; Serve's default is 10


class EngineReplica:
    """A deployment's replica: one llama.cpp, fed through Serve."""

    def __init__(self, gguf: Path, context_tokens: int, num_slots: int, num_threads: int) -> None:
        self._engine = LlamaCppEngine(gguf, context_tokens, num_slots, num_threads)

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """As the engine has it; Serve cancels this when the gate lets go of the stream."""
        async with aclosing(self._engine.generate(prompt, sampling)) as deltas:
            async for delta in deltas:
                yield delta


class RemoteEngine:
    """An `Engine` behind a deployment handle. A replica that dies before it said anything is asked again, once."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(method_name="generate", stream=True)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        for last_try in (False, True):
            begun = False
            try:
                response = cast(DeploymentResponseGenerator[Delta], self._handle.remote(list(prompt), sampling))
                try:
                    async for delta in response:
                        begun = True
                        yield delta
                except (GeneratorExit, asyncio.CancelledError):
                    response.cancel()
                    raise
                return
            except RayActorError:
                if begun or last_try:
                    raise EngineError("the engine's process was lost in the middle of the answer") from None
            except (RayError, RayServeException) as error:
                raise engine_error(error) from None


def engine_error(error: RayError | RayServeException) -> EngineError:
    """What went wrong on the way to an engine or in it, without Ray's words for it."""
    if isinstance(error, BackPressureError):
        return EngineBusy("every slot of this model is taken and its queue is full")
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, EngineError) else EngineError("the engine failed")
    return EngineError(f"the engine can't be reached ({type(error).__name__})")


@ray_serve.ingress()
class Gate:
    """The ingress: `danube_ray.serve.gate` over remote engines."""

    def __init__(
        self, entries: dict[str, ModelEntry], settings: GateSettings, handles: dict[str, DeploymentHandle]
    ) -> None:
        self._entries, self._settings = entries, settings
        self._engines = {name: RemoteEngine(handle) for name, handle in handles.items()}

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's name for it
        return create_app(self._entries, self._engines.__getitem__, self._settings)


def application(
    models: Mapping[str, ServedModel], known: dict[str, ModelEntry], settings: GateSettings
) -> ray_serve.Application:
    """The Serve application: the gate, and one engine deployment a model."""
    engines: dict[str, Any] = {}
    for name, model in models.items():
        deployment = ray_serve.deployment(
            name=f"engine-{name}",
            ray_actor_options={"num_cpus": model.num_threads},
            max_ongoing_requests=model.num_slots,
            max_queued_requests=model.max_queued,
            graceful_shutdown_timeout_s=DRAIN_S,
            graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
            health_check_period_s=HEALTH_CHECK_S,
            autoscaling_config=AutoscalingConfig(
                min_replicas=model.min_replicas,
                max_replicas=model.max_replicas,
                target_ongoing_requests=model.num_slots,
                upscale_delay_s=0.5,
                look_back_period_s=LOOK_BACK_S,
                metrics_interval_s=MEASURE_S,
                downscale_delay_s=model.idle_s,
            ),
        )(EngineReplica)
        engines[name] = deployment.bind(
            model.weights.resolve(), known[name].context_tokens, model.num_slots, model.num_threads
        )
    gate = ray_serve.deployment(
        name="gate",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1_000,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
    )(Gate)
    return gate.bind(known, settings, engines)


def build(args: dict[str, Any]) -> ray_serve.Application:
    """The application of a Serve configuration file: `args["models"]` holds the fields of a `ServedModel` by name."""
    models = {
        name: ServedModel(
            **{**fields, "weights": Path(fields["weights"]), "tokenizer_folder": Path(fields["tokenizer_folder"])}
        )
        for name, fields in args["models"].items()
    }
    config = ServeConfig(models=models)
    return application(models, entries(config), config.gate)


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serve while the block runs; gives the base URL. Port 0 takes a free one.

    `ConfigError` before anything starts: a file that can't be served, a port in use, more threads than CPUs.
    """
    known = entries(config)
    port = free_port(config.host, config.port)
    with session():
        deploy(replace(config, port=port), known)
        try:
            yield f"http://{config.host}:{port}"
        finally:
            ray_serve.delete(APPLICATION)  # after its answers have ended; Serve itself goes with the cluster


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM."""
    with serving(config) as url:
        print(f"{', '.join(config.models)}: chat at {url}, OpenAI API at {url}/v1. Ctrl+C stops.", flush=True)
        stopped = threading.Event()
        for stop_signal in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop_signal, lambda *_: stopped.set())
        stopped.wait()


def free_port(host: str, port: int) -> int:
    """`port` if nobody listens there, or any free one for 0. Serve itself would share a port with another Serve."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            allowed = f"a port of {host} that is free ({error.strerror})"
            require(False, "port", port, allowed, "choose another one, or stop what listens there")
        return probe.getsockname()[1]


def deploy(config: ServeConfig, known: dict[str, ModelEntry]) -> None:
    """Start Serve where it is not yet, and run the application on it. Returns when every engine has loaded."""
    wanted = sum(model.min_replicas * model.num_threads for model in config.models.values())
    cpus = int(ray.cluster_resources().get("CPU", 0))
    elastic = "RAY_ADDRESS" in os.environ  # a cluster of somebody's may grow on demand; ours can't, and would wait
    require(elastic or wanted <= cpus, "num_threads", wanted, f"at most {cpus} over all engines", "give each fewer")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = ray_serve.status()
    if running.proxies and not running.applications:
        ray_serve.shutdown()  # one that stayed from before would keep its own port
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    # Serve's own time-out would cut long answers in the middle; the gate has a deadline instead.
    http = HTTPOptions(host=config.host, port=config.port, request_timeout_s=None)
    ray_serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=quiet)
    served = application(config.models, known, config.gate)
    ray_serve.run(served, name=APPLICATION, route_prefix="/", logging_config=quiet)
