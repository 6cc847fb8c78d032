"""The FP8 recipe's arithmetic against values worked out by hand, exact arithmetic, and torchao."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from danube_ray.config import ConfigError
from danube_ray.model import fp8
from danube_ray.model.fp8 import BACKWARD, FORWARD, CurrentScale, DelayedScale, EmulatedProduct, cast, scale_for

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)
INF, NAN = float("inf"), float("nan")

# Relative error (L2) of a product of Gaussian matrices: e4m3 rounds to 3 bits of mantissa, e5m2 to 2. Bounded from
# below too: an error under it would mean that nothing was cast.
OUTPUT_ERROR = (0.025, 0.045)
GRADIENT_ERROR = (0.045, 0.075)
BF16_STEP = 2**-8  # half a unit in bf16's last place, relative


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def operands(tokens: int = 64, in_size: int = 96, out_size: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, in_size, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(out_size, in_size)).requires_grad_()
    return x, weight, 1e-4 * torch.randn(tokens, out_size, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("amax", "form", "scale"),
    [
        (3.5, FORWARD, 128.0),  # 448 / 3.5
        (3.5, BACKWARD, 16_384.0),  # 57,344 / 3.5
        (896.0, FORWARD, 0.5),
        (0.0, FORWARD, 7.0),  # nothing to scale by: as before
        (INF, FORWARD, 7.0),
        (NAN, FORWARD, 7.0),
        (1e-37, FORWARD, torch.finfo(torch.float32).max),  # 448 / amax is past fp32
    ],
)
def test_a_scale_moves_the_largest_magnitude_onto_the_formats(amax: float, form: torch.dtype, scale: float):
    assert scale_for(torch.tensor(amax), form, otherwise=torch.tensor(7.0)).item() == scale


def test_casts_round_to_the_format_and_saturate():
    x = torch.tensor([0.3, 100.0, 300.0, 2**-9, 2**-11, 500.0, -1e6, INF, -INF])
    # Spacing of e4m3: 1/32 at 0.3, 8 at 100 (a tie, to the even 96), 32 at 300; 2^-9 is its smallest number.
    expected = [0.3125, 96.0, 288.0, 2**-9, 0.0, 448.0, -448.0, 448.0, -448.0]
    assert cast(x, ONE, FORWARD).tolist() == expected
    # Spacing of e5m2: 1/16 at 0.3, 16 at 100, 64 at 300 (288 is a tie, to the even 256).
    expected = [0.3125, 96.0, 320.0, 2**-9, 2**-11, 512.0, -57_344.0, 57_344.0, -57_344.0]
    assert cast(x, ONE, BACKWARD).tolist() == expected
    assert cast(torch.tensor([NAN]), ONE, FORWARD).isnan().all()


def test_current_scaling_takes_the_tensor_at_hand():
    values, factor = CurrentScale(FORWARD, CPU)(torch.tensor([-3.5, 1.0, 0.0]))
    assert values.tolist() == [-448.0, 128.0, 0.0] and factor.item() == 1 / 128
    values, factor = CurrentScale(FORWARD, CPU)(torch.zeros(3))
    assert values.tolist() == [0.0, 0.0, 0.0] and factor.item() == 1
    values, factor = CurrentScale(BACKWARD, CPU)(torch.tensor([INF, 2.0]))
    assert values.tolist() == [57_344.0, 2.0] and factor.item() == 1


def test_delayed_scaling_follows_the_largest_of_its_history(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "AMAX_HISTORY", 3)
    delayed = DelayedScale(FORWARD, CPU)
    scales = []
    for amax in (2.0, 1.0, 1.0, 1.0, 0.0, NAN, 0.0, 0.0, 3.5, 0.5):
        delayed(torch.tensor([-amax, amax / 2]))
        scales.append(delayed.scale.item())
        delayed.advance()
    # A use is seen one region later, and for three. Where all three say nothing, the scale stays.
    assert scales == [1.0, 224.0, 224.0, 224.0, 448.0, 448.0, 448.0, 448.0, 448.0, 128.0]


def test_delayed_scaling_gathers_the_uses_of_a_region_and_saturates_what_outgrows_them():
    delayed = DelayedScale(FORWARD, CPU)
    for amax in (1.0, 2.0, 0.5):
        delayed(torch.tensor([amax]))
    delayed.advance()
    values, factor = delayed(torch.tensor([1.0, 2.0, 4.0]))
    assert (values * factor).tolist() == [1.0, 2.0, 2.0]


def test_an_infinite_amax_leaves_the_delayed_scale_until_it_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "AMAX_HISTORY", 3)
    delayed, scales = DelayedScale(FORWARD, CPU), []
    for amax in (2.0, INF, 4.0, 4.0, 4.0, 4.0):
        values, factor = delayed(torch.tensor([amax, 1.0]))
        scales.append(delayed.scale.item())
        if amax == INF:
            assert (values * factor).tolist() == [2.0, 1.0]
        delayed.advance()
    assert scales == [1.0, 224.0, 224.0, 224.0, 224.0, 112.0]


def test_the_emulated_product_errs_as_fp8_does():
    x, weight, gradient = operands(256, 512, 384)
    y = EmulatedProduct(weight, "current")(x, weight)
    y.backward(gradient)
    assert x.grad is not None and weight.grad is not None
    exact = x.double() @ weight.double().t()
    assert OUTPUT_ERROR[0] < relative_error(y, exact) < OUTPUT_ERROR[1]
    low, high = GRADIENT_ERROR
    assert low < relative_error(x.grad, gradient.double() @ weight.double()) < high
    assert low < relative_error(weight.grad, gradient.double().t() @ x.double()) < high
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_gradients_are_those_of_the_cast_operands():
    """Straight through: the casts change what is multiplied, and otherwise count as if they weren't there."""
    x, weight, gradient = operands()
    y = EmulatedProduct(weight, "current")(x[None], weight)
    y.backward(gradient[None])
    cast_x, cast_weight, cast_gradient = (
        values.double() * factor.double()
        for values, factor in (
            CurrentScale(FORWARD, CPU)(x),
            CurrentScale(FORWARD, CPU)(weight),
            CurrentScale(BACKWARD, CPU)(gradient),
        )
    )
    assert x.grad is not None and weight.grad is not None
    assert relative_error(y[0], cast_x @ cast_weight.t()) < BF16_STEP
    assert relative_error(x.grad, cast_gradient @ cast_weight) < BF16_STEP
    assert relative_error(weight.grad, cast_gradient.t() @ cast_x) < BF16_STEP


def test_delayed_scaling_needs_a_region_to_see_gradients():
    """With a scale of 1, gradients of 1e-6 are below e5m2's smallest number; once seen, they are whole."""
    x, weight, gradient = operands(256, 512, 384)
    gradient = gradient / 100
    product = EmulatedProduct(weight, "delayed")
    errors = []
    for _ in range(2):
        fp8.REGION.number += 1
        weight.grad = None
        product(x, weight).backward(gradient)
        assert weight.grad is not None
        errors.append(relative_error(weight.grad, gradient.double().t() @ x.double()))
    assert errors[0] == 1.0 and GRADIENT_ERROR[0] < errors[1] < GRADIENT_ERROR[1]


def test_what_needs_no_gradient_gets_none():
    x, weight, gradient = operands()
    product = EmulatedProduct(weight, "current")
    product(x, weight.detach()).backward(gradient)
    assert x.grad is not None and weight.grad is None
    product(x.detach(), weight).backward(gradient)
    assert weight.grad is not None


@pytest.mark.parametrize("scaling", ["current", "rowwise"])
def test_torchao_computes_what_the_emulation_does(scaling):
    from danube_ray.model.fp8_torchao import TorchaoProduct

    x, weight, gradient = operands(256, 512, 384)
    results = []
    for product in (EmulatedProduct(weight, "current"), TorchaoProduct(weight, scaling)):
        x.grad = weight.grad = None
        y = product(x, weight)
        y.backward(gradient)
        assert x.grad is not None and weight.grad is not None
        results.append((y.double(), x.grad.double(), weight.grad.double()))
    # Rowwise has scales of its own and e4m3 for gradients: near, not equal.
    tolerance = BF16_STEP if scaling == "current" else 2 * GRADIENT_ERROR[1]
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < tolerance


def test_a_number_of_tokens_that_a_gpu_refuses_is_refused():
    _, weight, _ = operands()
    product = EmulatedProduct(weight, "current")
    assert product(torch.randn(2, 8, 96), weight).shape == (2, 8, 48)
    with pytest.raises(ConfigError, match=r"tokens of a batch in FP8 is 24, allowed is a multiple of 16; pad"):
        product(torch.randn(3, 8, 96), weight)
