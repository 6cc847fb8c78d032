"""What is handed to vLLM, and what is refused before: any vLLM will do, no engine is started."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs danube-ray[vllm]")

from ray.serve.llm.openai_api_models import CompletionRequest
from vllm.config.lora import LoRAConfig
from vllm.platforms import current_platform

from danube_ray.config import ConfigError, ServedModel
from danube_ray.runtime.deployments import engine
from danube_ray.runtime.vllm import VllmReplica, check, llm_config
from danube_ray.serve.engines import Sampling
from danube_ray.serve.vllm_format import completion, scoring
from tests.adapters import tiny_adapter
from tests.models import tiny_model


def test_every_field_that_is_sent_is_one_of_vllms():
    """Its requests take unknown fields without a word."""
    wide = Sampling(max_tokens=1, logprobs=2, seed=1, json_schema="{}", stop=("a",))
    for sent in (completion([1], wide, "m"), scoring([1, 2], 1, "m")):
        assert sent.keys() <= CompletionRequest.model_fields.keys()
        CompletionRequest(**sent)


@pytest.mark.ray
@pytest.mark.parametrize("num_gpus", [0, 2])
def test_a_folder_is_deployed_with_its_gpus_and_cpus(ray_session: None, tmp_path: Path, num_gpus: int):
    folder = ServedModel(weights=tiny_model(tmp_path), num_gpus=num_gpus, num_threads=3)
    deployment = engine("m", folder, 64, {})._bound_deployment
    assert deployment.func_or_class is VllmReplica
    bundles = deployment._replica_config.placement_group_bundles
    assert bundles and sum(bundle.get("GPU", 0) for bundle in bundles) == num_gpus
    assert bundles[0]["CPU"] == sum(bundle.get("CPU", 0) for bundle in bundles) == 3


def test_an_adapters_rank_is_one_that_vllm_has(tmp_path: Path):
    """Danube's DPO has rank 4; vLLM knows 1 and 8."""
    adapter = tiny_adapter(tiny_model(tmp_path), tmp_path / "adapter", seed=1)
    model = ServedModel(weights=tmp_path, num_gpus=1, adapters={"polite": adapter})
    arguments = llm_config("m", model, 64, {}).engine_kwargs
    assert arguments["max_lora_rank"] == 8
    LoRAConfig(max_lora_rank=arguments["max_lora_rank"])


def test_an_adapter_of_which_vllm_would_take_a_half_is_refused(tmp_path: Path):
    adapter = tiny_adapter(tiny_model(tmp_path), tmp_path / "adapter", seed=1, alpha_pattern={"q_proj": 2})
    model = ServedModel(weights=tmp_path, num_gpus=1, adapters={"polite": adapter})
    with pytest.raises(ConfigError, match="alpha_pattern"):
        check(model)


def test_head_dims_that_its_cpu_kernels_lack_are_refused(tmp_path: Path):
    """Danube3 4B's among them: such a model would load, and fail at the first request."""
    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not built for CPUs")
    with pytest.raises(ConfigError, match="head_dim"):
        check(ServedModel(weights=tiny_model(tmp_path, hidden_size=480, head_dim=120)))


def test_without_gpus_it_must_be_built_for_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    with pytest.raises(ConfigError, match="not built for CPUs"):
        check(ServedModel(weights=tmp_path))
