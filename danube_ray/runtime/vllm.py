"""vLLM: Ray's LLM server, with the methods that every engine has. Importing it needs the extra `vllm`."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from math import ceil
from pathlib import Path
from typing import Any, get_args

import torch
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig  # no public name for a local adapter
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionResponse, ErrorResponse
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import CompletionRequest  # its answers are of the classes above, not of these
from vllm.config.lora import MaxLoRARanks
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from danube_ray.artifacts import read_json
from danube_ray.config import ModelConfig, ServedModel, require
from danube_ray.model.huggingface import load_config
from danube_ray.quantize.adapter import lora_settings
from danube_ray.serve.engines import Delta, EngineError, EngineRejected, Sampling, TokenLogprob
from danube_ray.serve.vllm_format import completion, delta, failure, scores, scoring

# What xgrammar can't hold an answer to is refused; and no model can fill its answer with spaces.
JSON = {"backend": "xgrammar", "disable_any_whitespace": True}
RANKS = get_args(MaxLoRARanks)  # the sizes it has room for, smallest first
CPU_BLOCK_TOKENS = 128  # of vLLM's cache on CPUs
COALESCE_MS = 20  # as llama.cpp's pieces are: a message through Ray costs about 0.2 ms, whatever is in it


class VllmReplica:
    """A deployment's replica, as `LlamaCppReplica` is one of llama.cpp: token ids in, deltas out."""

    async def __init__(self, config: LLMConfig, adapters: dict[str, Path]) -> None:  # Serve awaits it
        began = time.perf_counter()
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # as many as Ray says, not every core's
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # a server tells nobody what it runs unless asked to
        self._name, self._server = config.model_id, LLMServer.sync_init(config)
        await self._server.start()
        assert self._server.engine is not None
        for number, (name, folder) in enumerate(adapters.items(), start=1):
            await self._server.engine.resolve_lora(
                DiskMultiplexConfig(
                    model_id=name, max_total_tokens=None, local_path=str(folder), lora_assigned_int_id=number
                )
            )
        self._load_s = time.perf_counter() - began

    async def check_health(self) -> None:
        """Serve's probe: a dead engine is replaced."""
        await self._server.check_health()

    async def load_s(self) -> float:
        """How long loading took."""
        return self._load_s

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        num_tokens, ended = 0, False
        async with aclosing(self._ask(completion(prompt, sampling, self._name))) as parts:
            async for part in parts:
                events = part if isinstance(part, list) else [part]
                if said := delta((text_of(event) for event in events), num_tokens, sampling.logprobs):
                    num_tokens, ended = said.num_tokens, said.finish_reason is not None
                    yield said
        if not ended:
            raise EngineError("the engine stopped without an end of the answer")

    async def score(self, prompt: list[int], top: int, adapter: str | None) -> list[TokenLogprob]:
        async for answer in self._ask(scoring(prompt, top, adapter or self._name)):
            if isinstance(answer, CompletionResponse):
                (choice,) = answer.model_dump()["choices"]
                return scores(prompt, choice, top)
            text_of(answer)
        raise EngineError("the engine gave no scores")

    async def embed(self, prompt: list[int], adapter: str | None) -> list[float]:
        raise EngineRejected("vLLM has no embeddings of a model that generates; serve its GGUF file for them")

    async def _ask(self, request: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """What comes of a completion request: an answer, or lists of events."""
        try:
            async with aclosing(await self._server.completions(CompletionRequest(**request))) as parts:
                async for part in parts:
                    yield part
        except EngineDeadError:  # no gate should need vLLM to know what it is
            raise EngineError("vLLM's own process has died") from None


def text_of(event: Any) -> str:
    """A server-sent event as it is; Ray's error object is raised as what it means."""
    if isinstance(event, ErrorResponse):
        raise failure(event.error.model_dump())
    return event


def check(model: ServedModel) -> None:
    """`ConfigError` where this vLLM can't run `model`."""
    for folder in model.adapters.values():
        _, rank = lora_settings(folder)
        require(rank <= RANKS[-1], f"rank of {folder}", rank, f"at most {RANKS[-1]}", "merge it into its model")
    if model.num_gpus == 0:
        remedy = "give it GPUs, or let `danube quantize` make a GGUF file of it for CPUs"
        allowed = "at least 1: this vLLM is not built for CPUs"
        require(current_platform.is_cpu(), f"num_gpus of {model.weights}", 0, allowed, remedy)
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # where it is built for them

        head_dim, sizes = shape(model).head_dim, CPUAttentionBackend.get_supported_head_sizes()
        require(head_dim in sizes, f"head_dim of {model.weights}", head_dim, f"vLLM's on CPUs: {sizes}", remedy)


def shape(model: ServedModel) -> ModelConfig:
    return load_config(model.weights, any_rope=True, quantized=True)


def llm_config(name: str, model: ServedModel, context_tokens: int, deployment_options: dict[str, Any]) -> LLMConfig:
    """Ray's configuration of one model: its weights spread over the GPUs of an engine, nothing fetched from a hub."""
    adapters: dict[str, Any] = {}
    if model.adapters:
        needed = max(lora_settings(folder)[1] for folder in model.adapters.values())
        most = min(rank for rank in RANKS if rank >= needed)
        adapters = {"enable_lora": True, "max_loras": len(model.adapters), "max_lora_rank": most}
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(model.weights)},
        engine_kwargs={
            "tokenizer": str(model.tokenizer_folder or model.weights),
            "max_model_len": context_tokens,
            "max_num_seqs": model.num_slots,
            "tensor_parallel_size": max(1, model.num_gpus),
            "max_logprobs": 20,
            "generation_config": "vllm",  # not the folder's: the gate says how to draw
            "structured_outputs_config": JSON,
            **adapters,
            **({} if model.num_gpus else cpu_settings(model, context_tokens)),
        },
        deployment_config=deployment_options,
        # Without GPUs in it Ray runs vLLM on CPUs; the replica has them already.
        placement_group_config=None if model.num_gpus else {"bundles": [{"CPU": 0}]},
        experimental_configs={"stream_batching_interval_ms": COALESCE_MS},
        log_engine_metrics=False,
    )


def cpu_settings(model: ServedModel, context_tokens: int) -> dict[str, Any]:
    """Weights as they lie in the folder, where vLLM would make float32 bfloat16, and a cache that holds a whole context
    a slot, where it would take nearly all of the machine's memory."""
    config, values = shape(model), read_json(model.weights / "config.json")
    dtype = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * getattr(torch, dtype).itemsize
    blocks = model.num_slots * (ceil(context_tokens / CPU_BLOCK_TOKENS) + 1) + 1  # with one to spare for each, and one
    return {"dtype": dtype, "kv_cache_memory_bytes": blocks * CPU_BLOCK_TOKENS * token_bytes}
