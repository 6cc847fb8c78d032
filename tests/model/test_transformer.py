"""The transformer against what must be true of it: shapes, causality, windows, packing, initialisation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from danube_ray.config import ConfigError
from danube_ray.model.functional import rotate
from danube_ray.model.precision import autocast, check_precision, convert
from danube_ray.model.transformer import RMSNorm, Transformer, rotation
from tests.models import SMALL

CPU = torch.device("cpu")
MODEL = dataclasses.replace(SMALL, num_layers=3, initializer_range=0.3)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, MODEL.vocab_size, shape)


def test_a_token_changes_no_earlier_logits():
    model, text = Transformer(MODEL), tokens(1, 20)
    changed = text.clone()
    changed[0, 11] = (text[0, 11] + 1) % MODEL.vocab_size
    difference = (model(text) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:11].max() == 0
    assert difference[11:].min() > 1e-3


@torch.no_grad()
def test_a_window_hides_what_lies_further_back():
    # One layer: with more, what the window hides still travels through the layers between.
    config = dataclasses.replace(MODEL, num_layers=1, sliding_window=5)
    model, text = Transformer(config), tokens(1, 20)
    changed = text.clone()
    changed[0, 3] = (text[0, 3] + 1) % MODEL.vocab_size
    difference = (model(text) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[3:8].min() > 1e-4  # positions 3 to 7 see position 3: itself and four back
    assert difference[8:].max() == 0


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
def test_packed_documents_equal_documents_alone(window: int | None):
    model = Transformer(dataclasses.replace(MODEL, sliding_window=window))
    parts = [tokens(1, length) for length in (9, 1, 14)]
    ids = torch.cat([torch.full((1, part.shape[1]), index) for index, part in enumerate(parts)], dim=1)
    packed = model(torch.cat(parts, dim=1), ids)
    alone = torch.cat([model(part) for part in parts], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_document_is_no_mask():
    model, text = Transformer(MODEL), tokens(2, 16)
    torch.testing.assert_close(model(text, torch.zeros(2, 16, dtype=torch.int64)), model(text), atol=1e-5, rtol=1e-5)


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(8), torch.randn(8)
    by = rotation(40, 8, 10_000.0, CPU)
    rotated_q = rotate(q.expand(1, 40, 1, 8), by)[0, :, 0]
    rotated_k = rotate(k.expand(1, 40, 1, 8), by)[0, :, 0]
    near, far = rotated_q[7] @ rotated_k[3], rotated_q[31] @ rotated_k[27]
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-4)
    assert (near - rotated_q[8] @ rotated_k[3]).abs() > 1e-3


def test_norm_is_computed_in_fp32():
    norm = RMSNorm(32, 1e-5).to(torch.bfloat16)
    x = torch.randn(4, 32).to(torch.bfloat16)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), exact.to(torch.bfloat16), atol=0, rtol=0.004)  # half a unit in the last place


def test_initialisation_scales_what_writes_into_the_residual_stream():
    config = dataclasses.replace(MODEL, hidden_size=256, intermediate_size=512, initializer_range=0.02, num_layers=8)
    state = Transformer(config).state_dict()
    assert state["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["model.layers.3.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert state[f"model.layers.3.{name}.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert torch.equal(state["model.norm.weight"], torch.ones(256))


def test_bf16_autocast_stays_near_fp32():
    model, text = Transformer(MODEL), tokens(2, 32)
    exact = model(text)
    with autocast("bf16", CPU):
        rounded = model(text)
    assert rounded.dtype == torch.bfloat16
    difference = (rounded.float() - exact).std() / exact.std()
    assert 1e-4 < difference < 0.05
    with torch.autocast("cpu", torch.bfloat16), autocast("fp32", CPU):
        assert torch.equal(model(text), exact)


def test_the_loss_of_labels_is_the_cross_entropy_of_the_logits():
    model, text, ids = Transformer(MODEL), tokens(2, 17), torch.arange(16).expand(2, 16) // 5
    labels = text[:, 1:].masked_fill(ids == 2, -100)
    loss = model(text[:, :-1], ids, labels)
    expected = F.cross_entropy(model(text[:, :-1], ids).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    weights = list(model.parameters())
    found, wanted = torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_weight():
    model = Transformer(MODEL)
    model(tokens(2, 8), torch.zeros(2, 8, dtype=torch.int64)).logsumexp(-1).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.parameters())


def test_what_cannot_run_is_refused_before_it_starts():
    model = Transformer(MODEL)
    with pytest.raises(ConfigError, match=r"sequence length is 65, allowed is at most .*64"):
        model(tokens(1, 65))
    with pytest.raises(ConfigError, match="attention is 'flush', allowed is auto, flash"):
        Transformer(MODEL, attention="flush")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision is 'fp8-te on cpu', allowed is a GPU of Hopper or later"):
        convert(model, "fp8-te")
    with pytest.raises(ConfigError, match="precision is 'fp4'"):
        check_precision("fp4", CPU)  # type: ignore[arg-type]
    assert convert(model, "bf16") is model
