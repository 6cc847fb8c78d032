"""The CUDA kernels against the formula in float64, forward and backward, in bf16 as training runs them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from danube_ray.config import AttentionBackend, ModelConfig
from danube_ray.model.attention import Attend, Need, Visibility, machine_of, refusal
from danube_ray.model.attention.kernels import KERNELS
from danube_ray.model.precision import autocast
from danube_ray.model.transformer import Transformer
from tests.model.attention_reference import distance, inputs, packed_ids, reference, run

pytestmark = pytest.mark.gpu

# Relative L2 against float64 on the same bf16 inputs. Rounding the heads to bf16 alone makes 0.0017; a window of 100
# that is one too short makes 0.1.
FORWARD, BACKWARD = 0.01, 0.02
HEAD_DIMS = (80, 96, 120, 128)
LENGTH = 600  # not a multiple of any tile
PACKED = [[250, 1, 300, 49], [600], [3, 596, 1], [128, 128, 128, 128, 88]]
SEEN = {
    "causal": (None, None),
    "window": (100, None),
    "documents": (None, PACKED),
    "both": (100, PACKED),
    "many short documents": (None, [[7] * 85 + [5]] * 4),
}
KERNEL_NAMES: tuple[AttentionBackend, ...] = ("flash", "te", "varlen", "sdpa")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def kernel(name: AttentionBackend, seen: Visibility, head_dim: int) -> Attend:
    """The kernel made ready; skips where this machine lacks it."""
    need = Need(dtype=torch.bfloat16, head_dim=head_dim, training=True, masked=seen.masked, deterministic=False)
    refused = refusal(name, need, machine_of(seen.device))
    if refused:
        pytest.skip(f"{name} needs {refused.allowed}")
    return KERNELS[name].prepare(seen)


def check(name: AttentionBackend, batch: tuple[int, int], heads: tuple[int, int], head_dim: int, window, rows) -> None:
    device = torch.device("cuda", 0)
    ids = packed_ids(rows[: batch[0]], "cuda") if rows else None
    attend = kernel(name, Visibility.of(*batch, window, ids, device), head_dim)
    qkv, upstream = inputs(*batch, heads, head_dim, torch.bfloat16, "cuda")
    expected = run(lambda q, k, v: reference(q, k, v, window, ids), qkv, upstream)
    found = run(attend, qkv, upstream)
    assert found.heads.shape == qkv[0].shape and found.heads.dtype == torch.bfloat16
    assert distance(found.heads, expected.heads) < FORWARD
    for part, gradient, exact in zip("qkv", found.gradients, expected.gradients, strict=True):
        assert gradient.shape == exact.shape
        assert distance(gradient, exact) < BACKWARD, f"gradient of {part}"


@pytest.mark.parametrize(("window", "rows"), SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_kernel_equals_the_formula(name: AttentionBackend, head_dim: int, window, rows):
    check(name, (4, LENGTH), (8, 2), head_dim, window, rows)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (32, 8)], ids=["equal", "one kv head", "danube"])
@pytest.mark.parametrize("rows", [None, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_heads_are_grouped_as_in_the_formula(name: AttentionBackend, rows, heads: tuple[int, int]):
    check(name, (4, LENGTH), heads, 80, None, rows)


@pytest.mark.parametrize("rows", [None, [[1_000, 1_048]]], ids=["dense", "packed"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_small_batch_equals_the_formula(name: AttentionBackend, head_dim: int, rows):
    """Too few rows and heads to fill the GPU: flash-attn splits the keys among thread blocks."""
    check(name, (1, 2_048), (2, 1), head_dim, None, rows)


# Each case is compiled, forward and backward: minutes for all of them.
@pytest.mark.parametrize(
    ("head_dim", "window", "rows"), [(80, None, None), (80, 100, PACKED), (120, None, PACKED), (128, 100, None)]
)
def test_flex_equals_the_formula(head_dim: int, window, rows):
    check("flex", (4, LENGTH), (8, 2), head_dim, window, rows)


@pytest.mark.parametrize("name", ("flash", "te", "varlen"))
def test_ids_on_the_cpu_make_nothing_wait(name: AttentionBackend):
    device, ids = torch.device("cuda", 0), packed_ids(PACKED)
    waiting = Visibility.of(4, LENGTH, 100, ids.cuda(), device)
    kernel(name, waiting, 80)
    qkv, _ = inputs(4, LENGTH, (8, 2), 80, torch.bfloat16, "cuda")
    expected = KERNELS[name].prepare(waiting)(*qkv)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend = KERNELS[name].prepare(Visibility.of(4, LENGTH, 100, ids, device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(attend(*qkv), expected)


@pytest.mark.parametrize(("name", "most_gib"), [("flash", 1.0), ("varlen", 1.0), ("te", 2.0), ("sdpa", 2.0)])
def test_masks_need_no_scores_in_memory(name: AttentionBackend, most_gib: float):
    """All scores of two rows of 8,192 in 32 heads would be 8 GiB in bf16."""
    device, length = torch.device("cuda", 0), 8_192
    ids = packed_ids([[500] * 16 + [192]] * 2, "cuda")
    seen = Visibility.of(2, length, 4_096, ids, device)
    qkv, upstream = inputs(2, length, (32, 8), 80, torch.bfloat16, "cuda")
    kernel(name, seen, 80)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(KERNELS[name].prepare(seen), qkv, upstream)
    assert (torch.cuda.max_memory_allocated() - before) / 2**30 < most_gib


MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=320,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=80,
    context_length=LENGTH,
    sliding_window=100,
    initializer_range=0.1,
)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "layers compiled"])
@pytest.mark.parametrize("name", ("flash", "te", "varlen", "flex"))
def test_a_model_trains_the_same_with_each_backend(name: AttentionBackend, compiled: bool):
    device = torch.device("cuda", 0)
    kernel(name, Visibility.of(4, LENGTH, 100, None, device), 80)
    text = torch.randint(0, 512, (4, LENGTH), device=device, generator=torch.Generator(device).manual_seed(0))
    batches = [packed_ids(PACKED, "cuda"), packed_ids(PACKED[::-1], "cuda"), packed_ids([[300, 300]] * 4, "cuda")]

    def losses_and_gradient(backend: AttentionBackend, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = Transformer(MODEL, attention=backend).to(device)
        if compiled:
            for layer in model.model.layers:
                layer.compile()
        with autocast("bf16", device):
            losses = [
                torch.nn.functional.cross_entropy(model(text, ids).flatten(0, 1), text.flatten()) for ids in batches
            ]
        torch.stack(losses).mean().backward()
        return torch.stack(losses).detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])

    expected_losses, expected = losses_and_gradient("sdpa", False)
    losses, gradient = losses_and_gradient(name, compiled)
    torch.testing.assert_close(losses, expected_losses, atol=0.01, rtol=0.002)
    assert distance(gradient, expected.double()) < 0.05


def test_a_model_attends_to_plain_text_in_the_fastest_way_that_torch_knows():
    """Nothing but causal order: no kernel is asked for that needs a package, and no mask is made."""
    device = torch.device("cuda", 0)
    model = Transformer(dataclasses.replace(MODEL, sliding_window=None)).to(device)
    text = torch.randint(0, 512, (2, LENGTH), device=device)
    with autocast("bf16", device), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(text).float().logsumexp(-1).sum().backward()
    called = {event.name for event in profile.events() or ()}
    assert "aten::scaled_dot_product_attention" in called
    assert not called & {"aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_efficient_attention"}
