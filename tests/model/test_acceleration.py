"""Recomputed layers and compiled ones train as plain ones do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from danube_ray.config import LoraConfig
from danube_ray.model import acceleration
from danube_ray.model.acceleration import checkpoint_activations, compile_blocks, compile_elementwise
from danube_ray.model.precision import autocast, convert
from danube_ray.model.transformer import Layer, Transformer
from danube_ray.posttrain.lora import add_adapters
from tests.models import SMALL

CPU = torch.device("cpu")
MODEL = dataclasses.replace(SMALL, num_layers=3)


@pytest.fixture
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that torch.compile does but for generating code, which takes longest: see `test_generated_code`."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(acceleration, "compile_options", lambda: {"dynamic": False, "backend": "aot_eager"})
    yield
    torch._dynamo.reset()


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(MODEL)


def batch(length: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the documents they belong to, and labels, (2, length) each."""
    tokens = torch.randint(0, MODEL.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(length) // 11).expand(2, length)
    labels = tokens[:, 1:].masked_fill(documents == 1, -100)
    return tokens[:, :-1], documents, labels


def gradient(model: nn.Module, length: int = 32, precision: str = "fp32") -> Tensor:
    """Of the loss by all trainable weights, end to end."""
    model.zero_grad()
    with autocast(precision, CPU):  # type: ignore[arg-type]
        loss = model(*batch(length))
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8-emulated"])
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_recomputed_layers_have_the_same_gradient_to_the_bit(precision: str, adapters: bool):
    passes: list[int] = []

    def trained() -> nn.Module:
        bare = convert(model(), precision)  # type: ignore[arg-type]
        made = add_adapters(bare, LoraConfig(rank=2, dropout=0.3)) if adapters else bare
        layers = [module for module in made.modules() if isinstance(module, Layer)]
        layers[1].register_forward_pre_hook(lambda *_: passes.append(1))
        return made

    plain, recomputing = trained(), trained()
    recomputing.load_state_dict(plain.state_dict())
    checkpoint_activations(recomputing)
    torch.manual_seed(2)  # of the adapters' dropout
    expected = gradient(plain, precision=precision)
    assert len(passes) == 1
    torch.manual_seed(2)
    assert torch.equal(gradient(recomputing, precision=precision), expected)
    assert len(passes) == 3
    with torch.no_grad():
        recomputing(*batch())
    assert len(passes) == 4


@pytest.mark.usefixtures("_fresh_compiler")
def test_layers_are_compiled_once_for_all_and_once_a_length():
    plain, compiled = model(), model()
    compile_blocks(compiled)
    for round_ in range(2):
        for length, expected_graphs in ((32, 2), (16, 4)):
            assert distance(gradient(compiled, length), gradient(plain, length)) < 1e-5
            assert graphs() == (expected_graphs if round_ == 0 else 4)  # one of the layers, one of the loss
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.usefixtures("_fresh_compiler")
def test_what_lies_between_products_is_compiled_by_itself():
    plain, compiled = model(), model()
    compile_elementwise(compiled)
    assert distance(gradient(compiled), gradient(plain)) < 1e-5
    # A norm, the rotations of queries and of keys, SwiGLU, the loss; for all layers together.
    assert graphs() == 5
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("precision", ["bf16", "fp8-torchao"])
def test_compiled_layers_are_recomputed_and_follow_a_stage(precision: str):
    exact, plain, compiled = model(), *(convert(model(), precision) for _ in range(2))  # type: ignore[arg-type]
    compile_blocks(compiled)
    checkpoint_activations(compiled)
    for window, theta in ((None, 10_000.0), (7, 10_000.0), (7, 500.0)):
        for one in (exact, plain, compiled):
            one.model.config = dataclasses.replace(MODEL, sliding_window=window, rope_theta=theta)
        expected = gradient(plain, precision=precision)
        rounding = distance(expected, gradient(exact))
        assert distance(gradient(compiled, precision=precision), expected) < 0.5 * rounding
    assert graphs() == 2  # a window is a mask and a base an angle: neither compiles anew


@pytest.mark.slow  # a C++ compiler at work
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8-torchao"])
def test_generated_code(precision: str):
    torch._dynamo.reset()
    plain, *compiled = (convert(model(), precision) for _ in range(3))  # type: ignore[arg-type]
    compile_blocks(compiled[0])
    compile_elementwise(compiled[1])
    exact = gradient(model())
    rounding = distance(gradient(plain, precision=precision), exact)
    for one in compiled:  # they round elsewhere, not more
        assert distance(gradient(one, precision=precision), exact) < 1.2 * rounding + 1e-5
