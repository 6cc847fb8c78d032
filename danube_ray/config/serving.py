"""What is served and how: models with their engines' size, and what the gate in front of them lets through."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from danube_ray.config.check import require, require_positive, valid_name

DEFAULT_HOST = "127.0.0.1"  # this machine only, unless somebody says otherwise
DEFAULT_PORT = 8000


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is run, and how far its engine scales.

    Args:
        tokenizer_folder: the tokenizer of the model's training, where it doesn't lie beside the weights.
        adapters: LoRA folders of PEFT by name; each is served as a model of that name.
        context_tokens: what prompt and answer hold together. None takes the model's context, or its sliding window
            where that is shorter: llama.cpp attends to everything, the model never learnt to.
        num_slots: answers that one engine generates at the same time.
        num_threads: CPUs of one engine.
        num_gpus: GPUs of one engine, for vLLM, which spreads a model over them; 0 takes its build for CPUs.
        min_replicas: engines kept; 0 unloads an idle model, and the first request after that waits for it.
        max_replicas: engines under load.
        max_queued: requests that wait for a slot before others are sent away.
        idle_s: seconds without load after which an engine above the minimum goes.
    """

    tokenizer_folder: Path | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    context_tokens: int | None = None
    num_slots: int = 4
    num_threads: int = 2
    num_gpus: int = 0
    min_replicas: int = 1
    max_replicas: int = 1
    max_queued: int = 64
    idle_s: float = 120.0

    def __post_init__(self) -> None:
        require_positive(self, "num_slots", "num_threads", "max_replicas", "max_queued", "idle_s")
        require(self.num_gpus >= 0, "num_gpus", self.num_gpus, "0 or more")
        if self.context_tokens is not None:
            require_positive(self, "context_tokens")
        allowed = f"0 to max_replicas={self.max_replicas}"
        require(0 <= self.min_replicas <= self.max_replicas, "min_replicas", self.min_replicas, allowed)
        for name in self.adapters:
            require(valid_name(name), "adapter name", name, "letters, digits, '.', '_' and '-'")


@dataclass(frozen=True, kw_only=True)
class ServedModel(EngineSettings):
    """One model: `weights` are a GGUF file (llama.cpp, on CPUs), or a Hugging Face folder (vLLM)."""

    weights: Path


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What the gate lets through.

    Args:
        max_body_bytes: the longest request.
        max_choices: answers of one request: `n` times the number of prompts.
        deadline_s: the longest answer, in seconds.
        keys_file: API keys, as `danube keys` makes them; those in DANUBE_API_KEYS count as well. Without any, whoever
            reaches the server may use it.
        cors_origins: web pages of other origins that may ask from a browser; * is every one.
        requests_per_minute: of one key, or of one address where there are no keys.
        concurrent_requests: answers of one key, or address, at the same time.
        log_prompts: let the log of requests hold what was asked and answered.
    """

    max_body_bytes: int = 2**20
    max_choices: int = 8
    deadline_s: float = 600.0
    keys_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        limits = ("requests_per_minute", "concurrent_requests")
        given = [name for name in limits if getattr(self, name) is not None]
        require_positive(self, "max_body_bytes", "max_choices", "deadline_s", *given)
        for origin in self.cors_origins:
            sent = origin == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/,\s]+", origin)
            require(bool(sent), "cors_origins", origin, "scheme://host[:port] as browsers send it, or *")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A whole server: models by the name that clients know them by, the gate, and where it listens."""

    models: dict[str, ServedModel]
    gate: GateSettings = field(default_factory=GateSettings)
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT

    def __post_init__(self) -> None:
        require(bool(self.models), "models", self.models, "at least one model")
        names = [*self.models, *(name for model in self.models.values() for name in model.adapters)]
        for name in names:
            require(valid_name(name), "model name", name, "letters, digits, '.', '_' and '-'")
            require(names.count(name) == 1, "model name", name, "one model or adapter of each name")
        require(0 <= self.port < 2**16, "port", self.port, "0 (any free one) to 65535")
