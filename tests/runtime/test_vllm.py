"""vLLM's replica over vLLM's and Ray's own classes; in the place of the GPU stands a script. Needs the extra `vllm`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs danube-ray[vllm]")

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.serve.llm.openai_api_models import CompletionRequest, CompletionResponse, ErrorResponse
from vllm.entrypoints.openai.completion.protocol import (
    CompletionLogProbs,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)

from danube_ray.config import ServedModel
from danube_ray.runtime.deployments import engine
from danube_ray.runtime.vllm import VllmReplica, llm_config
from danube_ray.serve.engines import Delta, EngineRejected, Sampling, TokenLogprob
from danube_ray.serve.vllm_format import completion, scoring
from tests.models import tiny_model


class ScriptedEngine:
    """Says the prompt back, a token a chunk, as vLLM's server would."""

    def __init__(self, config: Any) -> None:
        self.loaded: list[str] = []

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    async def resolve_lora(self, adapter: Any) -> None:
        self.loaded.append(adapter.model_id)

    async def completions(self, request: CompletionRequest, _: Any = None) -> AsyncGenerator[Any, None]:
        assert isinstance(request.prompt, list)
        if request.prompt[0] == 0:
            yield ErrorResponse(error=ErrorInfo(message="too long", type="BadRequestError", code=400))
            return
        if not request.stream:
            places = [None, *({token: {"logprob": -0.5}} for token in request.prompt[1:])]
            choice = {"index": 0, "text": "", "prompt_logprobs": places}
            usage = {"prompt_tokens": 1, "total_tokens": 1}
            yield CompletionResponse(model="m", choices=[choice], usage=usage)  # type: ignore[arg-type]
            return
        for number, token in enumerate(request.prompt, start=1):
            reason = "length" if number == len(request.prompt) else None
            name = f"token_id:{token}"
            logprobs = CompletionLogProbs(tokens=[name], token_logprobs=[-1.0], top_logprobs=[{name: -1.0}])
            choice = CompletionResponseStreamChoice(
                index=0, text=f"{token} ", token_ids=[token], finish_reason=reason, logprobs=logprobs
            )
            yield f"data: {CompletionStreamResponse(model='m', choices=[choice]).model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmReplica:
    monkeypatch.setenv("RAYLLM_VLLM_ENGINE_CLS", f"{__name__}.ScriptedEngine")
    model = ServedModel(weights=tiny_model(tmp_path / "model"), num_gpus=1)
    replica = VllmReplica.__new__(VllmReplica)
    asyncio.run(replica.__init__(llm_config("m", model, 64, {}), {"polite": tmp_path}))  # type: ignore[func-returns-value]
    return replica


def test_an_answer_streams(replica: VllmReplica):
    async def ask() -> list[Delta]:
        return [delta async for delta in replica.generate([4, 5], Sampling(max_tokens=2, logprobs=1))]

    first, last = asyncio.run(ask())
    assert first == Delta("4 ", 1, None, (TokenLogprob(4, -1.0, ((4, -1.0),)),))
    assert (last.text, last.num_tokens, last.finish_reason) == ("5 ", 2, "length")
    assert replica._server.engine.loaded == ["polite"]  # type: ignore[union-attr]


def test_a_prompt_is_scored(replica: VllmReplica):
    assert asyncio.run(replica.score([4, 5], 1, None)) == [TokenLogprob(5, -0.5, ((5, -0.5),))]


def test_a_refusal_is_a_refusal(replica: VllmReplica):
    async def ask() -> None:
        async for _ in replica.generate([0], Sampling(max_tokens=1)):
            pass

    with pytest.raises(EngineRejected, match="too long"):
        asyncio.run(ask())


def test_every_field_that_is_sent_is_one_of_vllms():
    """Its requests take unknown fields without a word."""
    wide = Sampling(max_tokens=1, logprobs=2, seed=1, json_schema="{}", stop=("a",))
    for sent in (completion([1], wide, "m"), scoring([1, 2], 1, "m")):
        assert sent.keys() <= CompletionRequest.model_fields.keys()
        CompletionRequest(**sent)


def test_the_script_speaks_rays_protocol():
    assert {"start", "completions", "resolve_lora"} <= set(dir(LLMEngine))


@pytest.mark.ray
def test_a_folder_is_deployed_with_its_gpus_and_a_file_without(ray_session: None, tmp_path: Path):
    folder = ServedModel(weights=tiny_model(tmp_path / "model"), num_gpus=2, num_threads=3)
    deployment = engine("m", folder, 64, {})._bound_deployment
    assert deployment.func_or_class is VllmReplica
    bundles = deployment._replica_config.placement_group_bundles
    assert sum(bundle.get("GPU", 0) for bundle in bundles) == 2 and bundles[0]["CPU"] >= 3
