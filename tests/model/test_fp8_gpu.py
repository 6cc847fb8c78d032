"""FP8 on a GPU of Hopper or later: transformer-engine and torchao against exact arithmetic, bf16 and the emulation.

Skipped where the machine or its installation can't compute the precision at hand; the reason is what `convert` says.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danube_ray.config import FP8_SCALINGS, ConfigError, Fp8Scaling, ModelConfig, Precision
from danube_ray.model.fp8 import EmulatedProduct
from danube_ray.model.precision import (
    autocast,
    check_precision,
    convert,
    fp8_product,
    load_scaling_state,
    plain,
    products,
    scaling_state,
)
from danube_ray.model.projections import Product
from danube_ray.model.transformer import Transformer

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    context_length=128,
    initializer_range=0.05,
)
TOKENS = torch.randint(0, 256, (2, 129), generator=torch.Generator().manual_seed(0))

# Relative errors (L2) of products of Gaussian matrices. From below, so that nothing computed in bf16 passes.
OUTPUT_ERROR = (0.015, 0.05)  # e4m3: 3 bits of mantissa
GRADIENT_ERROR = (0.015, 0.08)  # e5m2's 2 bits, or e4m3 (block, rowwise)
EMULATION_ERROR = 0.01  # bf16's rounding, and the shorter sums of Hopper's fast accumulation
LOGITS_ERROR = (0.005, 0.15)
MODEL_GRADIENT_ERROR = (0.01, 0.4)

RECIPES = [(name, scaling) for name in ("fp8-te", "fp8-torchao") for scaling in FP8_SCALINGS[name]]
every_recipe = pytest.mark.parametrize(("precision", "scaling"), RECIPES, ids=["-".join(recipe) for recipe in RECIPES])


@pytest.fixture(autouse=True)
def _possible(request: pytest.FixtureRequest) -> None:
    """Skip what this machine can't compute, before a test begins."""
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    try:
        check_precision(parameters.get("precision", "fp8-te"), GPU)
    except ConfigError as error:
        pytest.skip(str(error))


def operands() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(256, 512, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(384, 512, device=GPU)).requires_grad_()
    return x, weight, 1e-3 * torch.randn(256, 384, device=GPU, dtype=torch.bfloat16)


def use(
    product: Product,
    x: Tensor,
    weight: Tensor,
    gradient: Tensor,
    recipe: tuple[Precision, Fp8Scaling],
    first: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of one use of a product."""
    x.grad = weight.grad = None
    with autocast(recipe[0], GPU, recipe[1], first_micro_batch=first):
        y = product(x, weight)
    y.backward(gradient)
    assert x.grad is not None and weight.grad is not None
    return y.detach().clone(), x.grad.clone(), weight.grad.clone()


def use_twice(
    product: Product, x: Tensor, weight: Tensor, gradient: Tensor, recipe: tuple[Precision, Fp8Scaling]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of a second use, at which delayed scales have seen the tensors."""
    use(product, x, weight, gradient, recipe, None)
    return use(product, x, weight, gradient, recipe, None)


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@every_recipe
def test_a_product_errs_as_fp8_does(precision, scaling):
    x, weight, gradient = operands()
    product = fp8_product(precision)(weight, scaling)
    y, dx, dweight = use_twice(product, x, weight, gradient, (precision, scaling))
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert OUTPUT_ERROR[0] < relative(y, x.double() @ weight.double().t()) < OUTPUT_ERROR[1]
    low, high = GRADIENT_ERROR
    assert low < relative(dx, gradient.double() @ weight.double()) < high
    assert low < relative(dweight, gradient.double().t() @ x.double()) < high


@pytest.mark.parametrize(
    ("precision", "scaling"), [("fp8-te", "current"), ("fp8-te", "delayed"), ("fp8-torchao", "current")]
)
def test_the_emulation_computes_what_the_library_does(precision, scaling):
    x, weight, gradient = operands()
    theirs, ours = fp8_product(precision)(weight, scaling), EmulatedProduct(weight, scaling)
    found = use_twice(theirs, x, weight, gradient, (precision, scaling))
    emulated = use_twice(ours, x, weight, gradient, ("fp8-emulated", scaling))
    for part, expected in zip(found, emulated, strict=True):
        assert relative(part, expected) < EMULATION_ERROR


@every_recipe
def test_kept_casts_give_the_numbers_of_new_ones(precision, scaling):
    x, weight, gradient = operands()
    other = torch.randn_like(x).requires_grad_()
    kept, anew = (fp8_product(precision)(weight, scaling) for _ in range(2))
    recipe = (precision, scaling)
    for product in (kept, anew):  # settle delayed scales
        for each in (x, other, x):
            use(product, each, weight, gradient, recipe, None)
    for each, first in ((x, True), (other, False), (x, False)):
        with_kept = use(kept, each, weight, gradient, recipe, first)
        with_new = use(anew, each, weight, gradient, recipe, None)
        assert all(torch.equal(a, b) for a, b in zip(with_kept, with_new, strict=True))


@pytest.mark.parametrize(("precision", "scaling"), [("fp8-te", "current"), ("fp8-torchao", "current")])
def test_weights_are_cast_at_a_steps_first_micro_batch_alone(precision, scaling):
    x, weight, gradient = operands()
    product = fp8_product(precision)(weight, scaling)

    def output(first: bool | None) -> Tensor:
        return use(product, x, weight, gradient, (precision, scaling), first)[0]

    before = output(True)
    with torch.no_grad():
        weight.mul_(0.5)
    assert torch.equal(output(False), before)
    assert not torch.equal(output(True), before)


@pytest.mark.parametrize(("precision", "scaling"), [recipe for recipe in RECIPES if recipe != ("fp8-te", "delayed")])
@pytest.mark.parametrize("first", [None, True])
def test_activation_checkpointing_repeats_a_product_to_the_bit(precision, scaling, first):
    x, weight, gradient = operands()
    product = fp8_product(precision)(weight, scaling)
    exact = use(product, x, weight, gradient, (precision, scaling), first)

    def repeated(x: Tensor, weight: Tensor) -> Tensor:
        y = checkpoint(lambda x, weight: product(x, weight).square(), x, weight, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    direct = use(lambda x, weight: product(x, weight).square(), x, weight, gradient, (precision, scaling), first)
    found = use(repeated, x, weight, gradient, (precision, scaling), first)
    assert not torch.equal(direct[0], exact[0])
    assert all(torch.equal(a, b) for a, b in zip(found, direct, strict=True))


def logits_and_gradients(model: nn.Module, precision: Precision, scaling: Fp8Scaling | None) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of all weights, after a first pass that delayed scales learn from."""
    tokens = TOKENS.to(GPU)

    def logits_and_backward() -> Tensor:
        model.zero_grad()
        with autocast(precision, GPU, scaling):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return logits

    logits_and_backward()
    logits = logits_and_backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits.detach(), torch.cat(gradients)


@every_recipe
def test_a_model_is_near_bf16(precision, scaling):
    base = Transformer(MODEL, attention="sdpa").to(GPU)
    exact = logits_and_gradients(copy.deepcopy(base), "bf16", None)
    model = convert(copy.deepcopy(base), precision, scaling)
    assert list(model.state_dict()) == list(base.state_dict()) and len(list(products(model))) == 9 * MODEL.num_layers
    found = logits_and_gradients(model, precision, scaling)
    assert LOGITS_ERROR[0] < relative(found[0], exact[0]) < LOGITS_ERROR[1]
    assert MODEL_GRADIENT_ERROR[0] < relative(found[1], exact[1]) < MODEL_GRADIENT_ERROR[1]
    assert not any(name.endswith("_extra_state") for name in model.state_dict())


@every_recipe
def test_a_model_learns_and_can_compute_in_bf16_between(precision, scaling):
    tokens = TOKENS.to(GPU)
    model = convert(Transformer(MODEL, attention="sdpa").to(GPU), precision, scaling)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True), []
    for _ in range(40):
        for part in range(2):
            with autocast(precision, GPU, scaling, first_micro_batch=part == 0):
                logits = model(tokens[part : part + 1, :-1])
                loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[part, 1:])
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad(), plain(model), autocast("bf16", GPU):
            model(tokens[:, :7])  # a number of tokens that FP8 refuses
    assert losses[-1] < 0.5 * losses[0]


def test_delayed_scales_go_on_where_a_checkpoint_left_them(tmp_path: Path):
    model = convert(Transformer(MODEL, attention="sdpa").to(GPU), "fp8-te", "delayed")
    assert scaling_state(model) == {}
    logits_and_gradients(model, "fp8-te", "delayed")
    save_file(scaling_state(model), tmp_path / "fp8.safetensors")
    state = load_file(tmp_path / "fp8.safetensors")
    assert "model.layers.1.mlp.down_proj.scaling_bwd.amax_history" in state
    resumed = convert(Transformer(MODEL, attention="sdpa").to(GPU), "fp8-te", "delayed")
    resumed.load_state_dict(model.state_dict())
    load_scaling_state(resumed, {name: tensor.to(GPU) for name, tensor in state.items()})
    tokens = TOKENS.to(GPU)
    with autocast("fp8-te", GPU, "delayed"):
        exact, found = model(tokens[:, :-1]), resumed(tokens[:, :-1])
    assert torch.equal(exact, found)


@pytest.mark.parametrize(("precision", "scaling"), [("fp8-torchao", "current"), ("fp8-torchao", "rowwise")])
def test_compiled_layers_are_near_eager_ones(precision, scaling):
    model = convert(Transformer(MODEL, attention="sdpa").to(GPU), precision, scaling)
    exact = logits_and_gradients(model, precision, scaling)
    for layer in model.model.layers:
        layer.compile()
    found = logits_and_gradients(model, precision, scaling)
    assert relative(found[0], exact[0]) < LOGITS_ERROR[1]
    assert relative(found[1], exact[1]) < MODEL_GRADIENT_ERROR[1]
