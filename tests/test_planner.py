"""The planner's arithmetic against the reports' figures and against what autograd really keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from danube_ray.config import ConfigError
from danube_ray.model.transformer import Transformer
from danube_ray.planner import H100, activation_bytes_per_token, memory, plan
from danube_ray.presets import danube3_4b, danube3_500m, danube_1_8b, nano


def test_the_danube_reports_speed_comes_out_of_its_mfu():
    stage = plan(danube_1_8b()).stages[0]
    assert stage.tokens_per_s == pytest.approx(292_700, rel=0.002)  # Danube report: 8 H100s in FP8 at 2,048
    assert stage.flops_per_token == pytest.approx(11.25e9, rel=0.001)
    assert stage.days == pytest.approx(700e9 / 292_700 / 86_400, rel=0.002)


def test_a_plan_adds_up_and_prints():
    priced = plan(danube_1_8b())
    assert priced.days == pytest.approx(sum(stage.days for stage in priced.stages))
    assert priced.gpu_hours == pytest.approx(priced.days * 24 * 8)
    lines = str(priced).splitlines()
    assert len(lines) == 1 + len(danube_1_8b().stages)
    assert "1,831,201,280 parameters on 8 x H100" in lines[0]
    assert all(line.endswith(": fits") for line in lines[1:])


def test_the_4b_model_needs_its_optimizer_sharded():
    assert not plan(danube3_4b()).fits
    assert plan(danube3_4b(), optimizer_shards=8).fits
    assert plan(danube3_500m()).fits
    with pytest.raises(ConfigError, match="optimizer_shards is 3, allowed is a divisor of num_workers=8"):
        plan(danube3_4b(), optimizer_shards=3)
    with pytest.raises(ConfigError, match=r"Hardware\.mfu is 1\.5"):
        dataclasses.replace(H100, mfu=1.5)


def test_static_memory_is_sixteen_bytes_a_parameter():
    model = danube_1_8b().model
    needed = memory(model, 0, half=False)
    assert needed.total_bytes == 16 * model.num_parameters
    assert memory(model, 0, half=False, shards=8).total_bytes == 9 * model.num_parameters


def test_activations_are_what_autograd_keeps():
    """In fp32 on a CPU, whose RMSNorm also keeps its normalised input (on a GPU it is one kernel that does not)."""
    torch.set_num_threads(1)
    model, saved = nano().model, {}
    transformer = Transformer(model)
    weights = {weight.untyped_storage().data_ptr() for weight in transformer.parameters()}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # holding it, so that no other storage gets its address
        return tensor

    tokens = torch.randint(0, model.vocab_size, (4, 256))
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        transformer.model(tokens)
    kept = sum(storage.nbytes() for storage in saved.values()) / tokens.numel()
    normalised_inputs = 2 * model.num_layers * model.hidden_size * 4
    last_norm = 2 * model.hidden_size * 4
    assert kept == pytest.approx(activation_bytes_per_token(model, 4) + normalised_inputs + last_norm, rel=0.01)
