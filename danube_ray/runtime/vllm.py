"""vLLM on GPUs: Ray's LLM server, with the methods that every engine has. Importing it needs the extra `vllm`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig  # no public name for a local adapter
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import CompletionRequest, CompletionResponse, ErrorResponse

from danube_ray.artifacts import read_json
from danube_ray.config import ServedModel
from danube_ray.serve.engines import Delta, EngineError, EngineRejected, Sampling, TokenLogprob
from danube_ray.serve.vllm_format import completion, deltas, failure, scores, scoring

COALESCE_MS = 20  # as llama.cpp's pieces are: a message through Ray costs about 0.2 ms, whatever is in it


class VllmReplica:
    """A deployment's replica, as `EngineReplica` is one of llama.cpp: token ids in, deltas out."""

    async def __init__(self, config: LLMConfig, adapters: dict[str, Path]) -> None:  # Serve awaits it
        began = time.perf_counter()
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
        request = CompletionRequest(**completion(prompt, sampling, self._name))
        async with aclosing(await self._server.completions(request)) as parts:
            async for part in parts:
                events = part if isinstance(part, list) else [part]
                for delta in deltas((text_of(event) for event in events), num_tokens):
                    num_tokens, ended = delta.num_tokens, delta.finish_reason is not None
                    yield delta
        if not ended:
            raise EngineError("the engine stopped without an end of the answer")

    async def score(self, prompt: list[int], top: int, adapter: str | None) -> list[TokenLogprob]:
        request = CompletionRequest(**scoring(prompt, top, adapter or self._name))
        async for answer in await self._server.completions(request):
            if isinstance(answer, CompletionResponse):
                (choice,) = answer.model_dump()["choices"]
                return scores(prompt, choice["prompt_logprobs"], top)
            text_of(answer)
        raise EngineError("the engine gave no scores")

    async def embed(self, prompt: list[int], adapter: str | None) -> list[float]:
        raise EngineRejected("vLLM has no embeddings of a model that generates; serve its GGUF file for them")


def text_of(event: Any) -> str:
    """A server-sent event as it is; Ray's error object is raised as what it means."""
    if isinstance(event, ErrorResponse):
        raise failure(event.error.model_dump())
    return event


def llm_config(name: str, model: ServedModel, context_tokens: int, deployment_options: dict[str, Any]) -> LLMConfig:
    """Ray's configuration of one model: its weights spread over the GPUs of an engine, nothing fetched from a hub."""
    adapters: dict[str, Any] = {}
    if model.adapters:
        ranks = [read_rank(folder) for folder in model.adapters.values()]
        adapters = {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": max(ranks)}
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(model.weights)},
        engine_kwargs={
            "tokenizer": str(model.tokenizer_folder or model.weights),
            "max_model_len": context_tokens,
            "max_num_seqs": model.num_slots,
            "tensor_parallel_size": max(1, model.num_gpus),
            "max_logprobs": 20,
            "generation_config": "vllm",  # not the folder's: the gate says how to draw
            **adapters,
        },
        deployment_config=deployment_options,
        experimental_configs={"stream_batching_interval_ms": COALESCE_MS},
        log_engine_metrics=False,
    )


def read_rank(adapter: Path) -> int:
    return int(read_json(adapter / "adapter_config.json")["r"])
