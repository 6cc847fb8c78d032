"""Joint projections: the same numbers and gradients as separate ones, on the same parameters, whatever moves those."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danube_ray.config import ConfigError
from danube_ray.model.projections import (
    JointProjection,
    fuse,
    join,
    lay_end_to_end,
    lie_end_to_end,
    products,
    replace_linears,
)
from danube_ray.model.transformer import Transformer
from tests.models import SMALL

MODEL = dataclasses.replace(SMALL, initializer_range=0.2)
TOKENS = torch.arange(40).view(2, 20) % 61

TOLERANCE = 1e-5  # fp32, absolute and relative: one joint product sums in another order than separate ones


def pair() -> tuple[Transformer, Transformer]:
    """The same model with separate and with joint projections."""
    torch.manual_seed(0)
    separate = Transformer(MODEL)
    joint = copy.deepcopy(separate)
    fuse(joint)
    return separate, joint


def attention_weights(model: nn.Module) -> list[Tensor]:
    attention = model.get_submodule("model.layers.1.self_attn")
    return [attention.get_parameter(f"{name}_proj.weight") for name in "qkv"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS).logsumexp(-1).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one(TOKENS), other(TOKENS), atol=TOLERANCE, rtol=TOLERANCE)
    ours, theirs = gradients(one), gradients(other)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=TOLERANCE, rtol=TOLERANCE)


def test_joint_weights_are_a_view_with_gradients_in_parts():
    weights = [nn.Parameter(torch.randn(rows, 8)) for rows in (4, 2, 3)]
    values = torch.cat([weight.detach() for weight in weights])
    assert not lie_end_to_end(weights)
    lay_end_to_end(weights)
    whole = join(weights)
    assert lie_end_to_end(weights) and whole.data_ptr() == weights[0].data_ptr() and torch.equal(whole, values)
    gradient = torch.randn(9, 8)
    whole.backward(gradient)
    for weight, part in zip(weights, gradient.split([4, 2, 3]), strict=True):
        assert weight.grad is not None and torch.equal(weight.grad, part)


def test_weights_that_do_not_lie_end_to_end_are_copied():
    whole = torch.randn(9, 8)
    apart = [whole[:4], whole[5:]]
    swapped = [whole[4:], whole[:4]]
    mixed = [whole[:4], whole[4:].double()]
    strided = [whole[:4, :4], whole[4:, :4]]
    for weights in (apart, swapped, mixed, strided):
        assert not lie_end_to_end(weights)
        assert torch.equal(join(weights), torch.cat(weights))


def test_joint_projections_compute_what_separate_ones_do():
    separate, joint = pair()
    assert [name for name, _ in products(joint)] == [
        f"model.layers.{layer}.{module}.project" for layer in (0, 1) for module in ("self_attn", "mlp")
    ]
    assert_alike(separate, joint)
    assert list(separate.state_dict()) == list(joint.state_dict())
    assert sum(1 for _ in joint.parameters()) == len(joint.state_dict())


def test_an_optimizer_updates_the_joint_weight():
    separate, joint = pair()
    before = joint(TOKENS)
    for model in (separate, joint):
        gradients(model)
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert lie_end_to_end(attention_weights(joint))
    assert (joint(TOKENS) - before).abs().max() > 0.01
    assert_alike(separate, joint)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign: bool):
    _, joint = pair()
    other = Transformer(dataclasses.replace(MODEL))
    joint.load_state_dict(other.state_dict(), assign=assign)
    assert lie_end_to_end(attention_weights(joint)) is not assign  # assigned: other tensors, wherever they lie
    assert_alike(other, joint)


def test_a_copy_or_a_cast_keeps_computing_alike():
    separate, joint = pair()
    assert_alike(separate, copy.deepcopy(joint))
    assert_alike(separate.double(), joint.double())


def test_joint_weights_are_saved_each_for_itself(tmp_path: Path):
    separate, joint = pair()
    save_file(joint.state_dict(), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in separate.state_dict().items())


def test_activation_checkpointing_gives_the_same_gradients():
    _, joint = pair()
    exact = gradients(joint)
    for layer in joint.model.layers:
        forward = layer.forward
        layer.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
    for name, gradient in gradients(joint).items():
        assert torch.equal(gradient, exact[name]), name


def test_adapters_keep_their_linears_apart():
    for fuse_first in (True, False):
        torch.manual_seed(0)
        model = Transformer(MODEL)
        if fuse_first:
            fuse(model)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))  # type: ignore[arg-type]
        fuse(adapted)
        joined = [holder for _, holder in products(adapted) if isinstance(holder, JointProjection)]
        assert bool(joined) is fuse_first
        found = gradients(adapted)
        assert len(found) == 2 * 2 * MODEL.num_layers
        assert all(found[name].abs().max() > 0 for name in found if "lora_B" in name)


def test_only_linears_of_attention_and_mlp_get_a_product():
    model = get_peft_model(Transformer(MODEL), LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    weights: list[Tensor] = []

    def make(weight: Tensor):
        weights.append(weight)
        return torch.nn.functional.linear

    replace_linears(model, make)
    names = [name.removeprefix("base_model.model.model.layers.") for name, _ in products(model)]
    assert [name for name in names if name.startswith("1.")] == [
        "1.self_attn.q_proj.base_layer",
        "1.self_attn.k_proj",
        "1.self_attn.v_proj",
        "1.self_attn.o_proj",
        "1.mlp.gate_proj",
        "1.mlp.up_proj",
        "1.mlp.down_proj",
    ]
    assert len(names) == len(weights) == 7 * MODEL.num_layers
    model.get_submodule("base_model.model.model.layers.0.mlp").up_proj = nn.Linear(32, 48)
    with pytest.raises(ConfigError, match="up_proj is 'present', allowed is no bias"):
        replace_linears(model, make)
