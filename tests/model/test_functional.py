"""The functions with gradients written by hand against what torch makes of their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from danube_ray.model import functional
from danube_ray.model.functional import RmsNormOnCpu, Rotate, cross_entropy_sum, rms_norm, rotate, swiglu
from danube_ray.model.transformer import rotation

B, T, E, V = 3, 7, 16, 50


def gradients(result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result, inputs)


def test_the_norm_is_its_formula_and_so_is_its_gradient():
    x = torch.randn(B, T, E, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(E, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 0.1), F.rms_norm(x, (E,), weight, 0.1))
    assert torch.autograd.gradcheck(lambda x, w: RmsNormOnCpu.apply(x, w, 0.1), (x, weight))


def test_a_rotation_is_its_formula_and_so_is_its_gradient():
    x, (cosine, sine) = torch.randn(B, T, 2, 8, requires_grad=True), rotation(T, 8, 100.0, torch.device("cpu"))
    first, second = x.chunk(2, dim=-1)
    c, s = cosine[..., :4], sine[..., 4:]
    expected = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    torch.testing.assert_close(rotate(x, (cosine, sine)), expected)
    inputs = x.double().detach().requires_grad_(), cosine.double(), sine.double()
    assert torch.autograd.gradcheck(Rotate.apply, inputs)
    assert rotate(x.to(torch.bfloat16), (cosine, sine)).dtype == torch.float32


def test_swiglu_is_its_formula_and_so_is_its_gradient():
    gate, up = (torch.randn(B, T, E, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def head_case() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head far from zero, and labels of which a third is ignored, one chunk's altogether."""
    hidden, weight = torch.randn(B, T, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    labels = torch.randint(0, V, (B, T)).masked_fill(torch.rand(B, T) < 0.2, -100)
    labels[1, 1:] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("tokens", [1, 5, 7, B * T, 1000], ids=lambda tokens: f"chunks of {tokens}")
def test_the_loss_in_chunks_is_the_plain_loss(tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(functional.CHUNK_LOGITS, "cpu", tokens * V)
    hidden, weight, labels = head_case()
    found, expected = cross_entropy_sum(hidden, weight, labels), plain(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    scaled = gradients(found * 0.3, hidden, weight), gradients(expected * 0.3, hidden, weight)
    torch.testing.assert_close(*scaled, atol=1e-6, rtol=1e-5)
    assert scaled[0][0][labels == -100].abs().max() == 0


def test_nothing_trained_is_a_loss_and_a_gradient_of_zero():
    hidden, weight, labels = head_case()
    loss = cross_entropy_sum(hidden, weight, torch.full_like(labels, -100))
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(loss, hidden, weight))


def test_a_sure_and_right_prediction_keeps_the_digits_of_its_small_gradient():
    """p rounds to 1 in bf16, and p - 1 to a number that training needs."""
    weight = torch.tensor([[3.0], [-3.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy_sum(torch.ones(1, 1, 1), weight, torch.zeros(1, 1, dtype=torch.int64))
    wrong = 1 / (1 + math.exp(6))  # probability of the other piece
    torch.testing.assert_close(gradients(loss, weight)[0], torch.tensor([[-wrong], [wrong]]), rtol=0.004, atol=0)


def test_in_bf16_the_loss_is_as_near_the_exact_one_as_the_plain_loss_is():
    hidden, weight, labels = head_case()
    exact = gradients(plain(hidden, weight, labels), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = cross_entropy_sum(hidden, weight, labels), plain(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rounded, rtol=1e-5, atol=0)
    for ours, theirs, truth in zip(
        gradients(found, hidden, weight), gradients(rounded, hidden, weight), exact, strict=True
    ):
        assert ours.dtype == torch.float32
        assert 1e-4 < (theirs - truth).norm() / truth.norm() < 0.01
        assert (ours - truth).norm() < 1.1 * (theirs - truth).norm()


def test_bf16_weights_get_bf16_gradients_summed_in_fp32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(functional.CHUNK_LOGITS, "cpu", V)
    hidden, weight, labels = (part.to(torch.bfloat16) if part.is_floating_point() else part for part in head_case())
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    found = gradients(cross_entropy_sum(hidden, weight, labels), hidden, weight)
    exact = gradients(plain(hidden.float(), weight.float(), labels), hidden, weight)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)


class Sizes(TorchDispatchMode):
    """Notes the most elements that any result had, and how many matrix products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.largest = max(self.largest, result.numel() if isinstance(result, Tensor) else 0)
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return result


def test_no_more_logits_exist_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(functional.CHUNK_LOGITS, "cpu", 4 * V)
    hidden, weight = torch.randn(B, 40, 2, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    with Sizes() as whole:
        plain(hidden, weight, torch.zeros(B, 40, dtype=torch.int64)).backward()
    with Sizes() as sizes:
        cross_entropy_sum(hidden, weight, torch.zeros(B, 40, dtype=torch.int64)).backward()
    assert whole.largest == B * 40 * V
    assert sizes.largest == hidden.numel()


def test_gradients_that_nobody_asks_for_are_not_computed():
    hidden, weight, labels = head_case()
    counts = []
    for with_gradient, trained_head in ((True, True), (True, False), (False, True)):
        weight.requires_grad_(trained_head)
        with torch.set_grad_enabled(with_gradient), Sizes() as sizes:
            loss = cross_entropy_sum(hidden, weight, labels)
        counts.append(sizes.products)
        assert loss.requires_grad == with_gradient
        torch.testing.assert_close(loss, plain(hidden, weight, labels))
    assert counts == [3, 2, 1]
    weight.requires_grad_(False)
    torch.testing.assert_close(
        gradients(cross_entropy_sum(hidden, weight, labels), hidden), gradients(plain(hidden, weight, labels), hidden)
    )
