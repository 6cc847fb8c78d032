from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from danube_ray.quantize.divergence import BLOCK_ROWS, score, summarize


def test_a_model_has_no_divergence_from_itself():
    logits = np.random.default_rng(0).normal(size=(3, 20, 50)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 50, (3, 20))
    found = summarize([score(window, window, row) for window, row in zip(logits, labels, strict=True)])
    assert (found.positions, found.kld_mean, found.kld_p99, found.same_top) == (60, 0, 0, 1)
    assert found.perplexity == found.reference_perplexity


def test_divergence_from_a_uniform_model_in_closed_form():
    uniform, skewed = np.zeros((1, 4), np.float32), np.log([[2.0, 1.0, 1.0, 1.0]]).astype(np.float32)
    found = summarize([score(uniform, skewed, np.array([0]))])
    assert found.kld_mean == pytest.approx(0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.25 / 0.2))
    assert found.perplexity == pytest.approx(1 / 0.4)
    assert found.reference_perplexity == pytest.approx(4)


def test_blocks_and_windows_of_any_length_give_what_torch_gives_at_once():
    random = np.random.default_rng(0)
    lengths = (BLOCK_ROWS + 9, 2, 2 * BLOCK_ROWS + 1)
    pairs = []
    for length in lengths:
        logits = random.normal(size=(length, 100)).astype(np.float32)
        pairs.append((logits, logits + random.normal(0, 0.3, (length, 100)).astype(np.float32), None))
    pairs = [(wanted, got, random.integers(0, 100, len(wanted))) for wanted, got, _ in pairs]
    wanted, got = (torch.tensor(np.concatenate([pair[side] for pair in pairs])).double() for side in (0, 1))
    labels = torch.tensor(np.concatenate([pair[2] for pair in pairs]))
    kld = torch.nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True)
    found = summarize([score(*pair) for pair in pairs])
    assert found.positions == sum(lengths)
    assert found.kld_mean == pytest.approx(kld.sum(-1).mean().item(), rel=1e-9)
    assert found.kld_p99 == pytest.approx(kld.sum(-1).quantile(0.99).item(), rel=1e-5)
    assert found.same_top == pytest.approx((wanted.argmax(-1) == got.argmax(-1)).double().mean().item())
    assert found.perplexity == pytest.approx(torch.nn.functional.cross_entropy(got, labels).exp().item(), rel=1e-9)
    assert found.kld_error > 0
    assert found.perplexity_error > 0


def test_chosen_positions_are_those_of_a_window_scored_alone():
    random = np.random.default_rng(0)
    wanted, got = random.normal(size=(2, 30, 50)).astype(np.float32)
    labels = random.integers(0, 50, 30)
    chosen = np.arange(30) % 3 == 1
    part = score(wanted, got, labels).at(chosen)
    assert summarize([part]).kld_mean == pytest.approx(
        summarize([score(wanted[chosen], got[chosen], labels[chosen])]).kld_mean
    )
    assert summarize([part]).positions == 10
