"""FP8 models on the CPU: what is converted, what stays, when weights are cast, and how bf16 comes back."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danube_ray.config import ConfigError, Fp8Scaling, LoraConfig, Precision
from danube_ray.model.precision import (
    autocast,
    check_precision,
    check_shapes,
    convert,
    load_scaling_state,
    plain,
    products,
    scaling_state,
    to_bf16,
)
from danube_ray.model.projections import JointProjection, Projection
from danube_ray.model.transformer import Head, Transformer
from danube_ray.posttrain.lora import add_adapters, merge
from tests.models import SMALL

CPU = torch.device("cpu")
Recipe = tuple[Precision, Fp8Scaling]
RECIPES: list[Recipe] = [
    ("fp8-emulated", "current"),
    ("fp8-emulated", "delayed"),
    ("fp8-torchao", "current"),
    ("fp8-torchao", "rowwise"),
]
every_recipe = pytest.mark.parametrize(("precision", "scaling"), RECIPES, ids=["-".join(recipe) for recipe in RECIPES])

# Relative distance (L2) of an FP8 model's logits from bf16's: casts to 3 bits of mantissa, through two layers.
LOGITS_ERROR = (0.02, 0.12)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    batch = tokens(seed)
    return nn.functional.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())


def train(
    model: nn.Module, recipe: Recipe, steps: int, parts: int = 2, keep_casts: bool = True, lr: float = 0.1
) -> list[float]:
    """Steps of SGD, each over `parts` micro-batches; the losses."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for step in range(steps):
        for part in range(parts):
            first = part == 0 if keep_casts else None
            with autocast(recipe[0], CPU, recipe[1], first_micro_batch=first):
                value = loss(model, seed=step * parts + part)
            value.backward()
            losses.append(value.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).float().norm() / exact.float().norm()).item()


@every_recipe
def test_attention_and_mlp_are_converted_and_nothing_else(precision, scaling):
    model = Transformer(SMALL)
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    assert convert(model, precision, scaling) is model
    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Projection)}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum(isinstance(holder, Projection) for _, holder in products(model)) == 7 * SMALL.num_layers
    assert sum(isinstance(holder, JointProjection) for _, holder in products(model)) == 2 * SMALL.num_layers
    assert type(model.lm_head) is Head and type(model.model.embed_tokens) is nn.Embedding
    # The same parameters under the same names, fp32, and nothing beside them.
    assert list(model.state_dict()) == state
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@every_recipe
def test_logits_are_near_bf16s(precision, scaling):
    model = Transformer(SMALL)
    with autocast("bf16", CPU):
        exact = model(tokens()[:, :-1])
    convert(model, precision, scaling)
    with autocast(precision, CPU, scaling):
        found = model(tokens()[:, :-1])
    assert found.dtype == torch.bfloat16
    assert LOGITS_ERROR[0] < relative(found, exact) < LOGITS_ERROR[1]


@every_recipe
def test_a_model_learns(precision, scaling):
    model = convert(Transformer(SMALL), precision, scaling)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with autocast(precision, CPU, scaling, first_micro_batch=True):
            value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[0] == pytest.approx(math.log(SMALL.vocab_size), rel=0.1) and losses[-1] < 0.5


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe[1] != "delayed"], ids="-".join)
def test_kept_casts_give_the_numbers_of_new_ones(recipe: Recipe):
    model = convert(Transformer(SMALL), *recipe)
    other = copy.deepcopy(model)
    assert train(model, recipe, 4, parts=3) == train(other, recipe, 4, parts=3, keep_casts=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_kept_casts_give_the_numbers_of_new_ones_once_delayed_scales_have_settled():
    """Delayed scales see weights one use later: a kept cast keeps its scale for a step, a new one may get another."""
    recipe: Recipe = ("fp8-emulated", "delayed")
    model = convert(Transformer(SMALL), *recipe)
    for settled in (False, True):
        other = copy.deepcopy(model)
        kept, anew = (train(each, recipe, 2, lr=0.0, keep_casts=keep) for each, keep in ((model, True), (other, False)))
        assert (kept == anew) is settled


@pytest.mark.parametrize("recipe", [("fp8-emulated", "current"), ("fp8-torchao", "current")], ids="-".join)
def test_weights_are_cast_at_a_steps_first_micro_batch_alone(recipe: Recipe):
    model = convert(Transformer(SMALL), *recipe)

    def losses(*first_micro_batches: bool | None) -> Iterator[float]:
        for first in first_micro_batches:
            with torch.no_grad():
                for _, holder in products(model):
                    if isinstance(holder, Projection):
                        holder.weight.mul_(0.5)
            with autocast(recipe[0], CPU, recipe[1], first_micro_batch=first):
                yield loss(model).item()

    # The weights shrink before each; only a new cast sees it.
    first, second, third, anew = losses(True, False, False, None)
    assert first == second == third != anew


@every_recipe
def test_plain_is_bf16_to_the_bit_and_ends(precision, scaling):
    model = Transformer(SMALL)
    with autocast("bf16", CPU):
        exact = model(tokens())
    convert(model, precision, scaling)
    with pytest.raises(ZeroDivisionError), plain(model), autocast("bf16", CPU):
        # Joint products sum alike on the CPU; any number of tokens will do.
        torch.testing.assert_close(model(tokens()), exact, atol=0.02, rtol=0)
        raise ZeroDivisionError
    with autocast(precision, CPU, scaling):
        assert not torch.equal(model(tokens()[:, :-1]), exact[:, :-1])


def test_bf16_for_good_keeps_training_the_same_parameters():
    model = convert(Transformer(SMALL), "fp8-emulated", "delayed")
    train(model, ("fp8-emulated", "delayed"), steps=2)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    to_bf16(model)
    assert scaling_state(model) == {} and all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    plain_model = Transformer(SMALL)
    plain_model.load_state_dict(state)
    with autocast("bf16", CPU):
        torch.testing.assert_close(loss(model), loss(plain_model), atol=1e-3, rtol=0)
        loss(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_recipe
def test_activation_checkpointing_repeats_the_forward_pass_to_the_bit(precision, scaling):
    model = convert(Transformer(SMALL), precision, scaling)
    train(model, (precision, scaling), steps=1)  # so that delayed scales have something to move on with
    again = copy.deepcopy(model)
    for layer in again.model.layers:
        forward = layer.forward
        layer.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
    for part in range(2):
        for each in (model, again):
            with autocast(precision, CPU, scaling, first_micro_batch=part == 0):
                value = loss(each, seed=part)
            value.backward()
    for (name, parameter), repeated in zip(model.named_parameters(), again.parameters(), strict=True):
        assert parameter.grad is not None and repeated.grad is not None
        assert torch.equal(parameter.grad, repeated.grad), name


def test_delayed_scales_go_on_where_a_checkpoint_left_them(tmp_path: Path):
    recipe: Recipe = ("fp8-emulated", "delayed")
    model = convert(Transformer(SMALL), *recipe)
    assert scaling_state(model) == {}
    train(model, recipe, steps=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_file(scaling_state(model), tmp_path / "fp8.safetensors")
    state = load_file(tmp_path / "fp8.safetensors")
    names = {name.rpartition(".")[0] for name in state}
    assert "model.layers.0.self_attn.project.gradient" in names and "model.layers.1.mlp.down_proj.input" in names
    assert len(names) == 3 * 4 * SMALL.num_layers  # three tensors of four products a layer

    expected = train(model, recipe, steps=2)
    for with_scales in (True, False):
        resumed = convert(Transformer(SMALL), *recipe)
        resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
        if with_scales:
            load_scaling_state(resumed, state)
            found = scaling_state(resumed)
            assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
        assert (train(resumed, recipe, steps=2) == expected) is with_scales


def test_evaluation_moves_no_scales():
    model = convert(Transformer(SMALL), "fp8-emulated", "delayed")
    train(model, ("fp8-emulated", "delayed"), steps=2)
    scales = {name: value.clone() for name, value in scaling_state(model).items() if name.endswith("scale")}
    with torch.no_grad(), autocast("fp8-emulated", CPU, "delayed"):
        loss(model, seed=9)
        loss(model, seed=10)
    assert all(torch.equal(scaling_state(model)[name], value) for name, value in scales.items())


def test_adapters_train_on_an_fp8_base():
    base = Transformer(SMALL)
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = convert(add_adapters(base, LoraConfig(rank=4)), "fp8-emulated")  # rank 4 is no size for FP8: left alone
    assert all(name.endswith("_proj.base_layer") for name, _ in products(model))
    with autocast("fp8-emulated", CPU):
        value = loss(model)
    value.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == 2 * 7 * SMALL.num_layers and all("lora_" in name for name in found)
    trained = {name: torch.ones_like(gradient) for name, gradient in found.items()}
    merged = merge(model, trained)
    assert list(merged) == list(state)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(merged[name], state[name] + 4 * 16 / 4)  # B @ A of ones, times alpha / rank


@pytest.mark.slow
def test_compiled_layers_compute_what_eager_ones_do():
    """Casts kept over two micro-batches: the losses to the bit, the gradients but for how FP8 rounds.

    Compiled sums differ in the last bit; where one decides a tensor's scale, all of its numbers are rounded anew.
    """
    model, exact = convert(Transformer(SMALL), "fp8-torchao"), Transformer(SMALL)
    exact.load_state_dict(model.state_dict())
    compiled = copy.deepcopy(model)
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager")

    def trained(model: nn.Module, precision: Precision, scaling: Fp8Scaling | None) -> tuple[list[float], torch.Tensor]:
        losses = []
        for part in range(2):
            with autocast(precision, CPU, scaling, first_micro_batch=part == 0):
                value = loss(model, seed=part)
            value.backward()
            losses.append(value.item())
        return losses, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    losses, expected = trained(model, "fp8-torchao", "current")
    found_losses, found = trained(compiled, "fp8-torchao", "current")
    _, in_bf16 = trained(exact, "bf16", None)
    assert found_losses == losses
    assert (found - expected).norm() < (in_bf16 - expected).norm()


def test_what_cannot_compute_is_refused_with_its_reason():
    with pytest.raises(ConfigError, match="precision is 'fp8-te on cpu', allowed is a GPU of Hopper or later"):
        convert(Transformer(SMALL), "fp8-te")
    with pytest.raises(ConfigError, match="precision is 'fp4', allowed is one of fp32, bf16, fp8-te, fp8-torchao"):
        check_precision("fp4", CPU)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fp8_scaling of precision fp8-torchao is 'block', allowed is one of current"):
        check_precision("fp8-torchao", CPU, "block")
    with pytest.raises(ConfigError, match="fp8_scaling of precision bf16 is 'current', allowed is None without FP8"):
        check_precision("bf16", CPU, "current")
    for precision, scaling in RECIPES:
        check_precision(precision, CPU, scaling)


@pytest.mark.parametrize(
    ("changes", "sequence_length", "message"),
    [
        ({"hidden_size": 40}, 64, "ModelConfig.hidden_size is 40, allowed is a multiple of 16 in precision fp8-te"),
        ({"intermediate_size": 50}, 64, "ModelConfig.intermediate_size is 50"),
        ({"num_heads": 3, "num_kv_heads": 1}, 64, r"num_heads \* head_dim is 24"),
        ({"num_kv_heads": 1}, 64, r"num_kv_heads \* head_dim is 8"),
        ({}, 60, "sequence_length is 60, allowed is a multiple of 16"),
    ],
)
def test_shapes_that_fp8_kernels_refuse_are_refused_before_there_is_a_device(changes, sequence_length, message):
    config = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ConfigError, match=message):
        check_shapes("fp8-te", config, sequence_length)
    check_shapes("bf16", config, sequence_length)
    check_shapes("fp8-te", SMALL, 64)
