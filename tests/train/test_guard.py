"""The guard against what FP8 may cost: same batches, both precisions, and what follows from the gap."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from danube_ray.config import LoopConfig
from danube_ray.model.precision import autocast, convert, products
from danube_ray.train.context import LocalContext
from danube_ray.train.guard import Gap, Guard
from danube_ray.train.protocol import Strategy
from danube_ray.train.step import accumulate, validate
from danube_ray.train.strategy import build_strategy
from tests.train.counting import OPTIMIZER, CountingTask

SETTINGS = LoopConfig(precision="fp8-emulated", fp8_guard_every_steps=4, fp8_guard_max_gap=0.02)
TASK, CONTEXT = CountingTask(), LocalContext()
CONTEXT.device = torch.device("cpu")
TEXT = torch.arange(32).view(2, 16)


@pytest.fixture(scope="module")
def trained() -> Strategy:
    """A model that has begun to learn: of one that knows nothing, nothing can be lost."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    strategy = build_strategy(convert(TASK.build_model(), "fp8-emulated"), OPTIMIZER, SETTINGS, CONTEXT)
    for step in range(30):
        accumulate(TASK, strategy, TASK.reader(step, 0, 1), step, SETTINGS, CONTEXT)
        strategy.step(learning_rate=1e-2)
    return strategy


@pytest.fixture
def strategy(trained: Strategy) -> Strategy:
    return copy.deepcopy(trained)


def measure(guard: Guard, strategy: Strategy) -> Gap:
    return guard.measure(TASK, strategy, TASK.validation(0), CONTEXT, micro_batch_size=2)


def break_fp8(strategy: Strategy, factor: float) -> None:
    """Let every FP8 product come out `factor` times too large."""
    for _, holder in products(strategy.module):
        product = holder.product
        holder.product = lambda x, weight, product=product: product(x, weight) * factor


def test_both_losses_are_those_of_the_same_batches(strategy: Strategy):
    in_bf16 = dataclasses.replace(SETTINGS, precision="bf16", fp8_guard_every_steps=0)
    bf16_model = CountingTask().build_model()
    bf16_model.load_state_dict(strategy.module.state_dict())
    bf16_strategy = build_strategy(bf16_model, OPTIMIZER, in_bf16, CONTEXT)
    guard = Guard(SETTINGS)
    gap = measure(guard, strategy)
    ((bf16_sum, count),) = validate(TASK, bf16_strategy, TASK.validation(0), in_bf16, CONTEXT, 2).values()
    ((fp8_sum, _),) = validate(TASK, strategy, TASK.validation(0), SETTINGS, CONTEXT, 2).values()
    assert count == 2 * 6 * 16
    assert gap.bf16_loss == pytest.approx(bf16_sum / count, rel=1e-4)
    assert gap.fp8_loss == fp8_sum / count != gap.bf16_loss
    assert gap.relative == pytest.approx(gap.fp8_loss / gap.bf16_loss - 1)
    assert abs(gap.relative) < 0.02 and guard.judge(gap) == "good"


def test_measuring_changes_nothing(strategy: Strategy):
    before = copy.deepcopy(strategy.module.state_dict())
    with autocast("fp8-emulated", CONTEXT.device):
        logits = strategy.module(TEXT)
    measure(Guard(SETTINGS), strategy)
    assert strategy.module.training
    assert all(torch.equal(weight, before[name]) for name, weight in strategy.module.state_dict().items())
    with autocast("fp8-emulated", CONTEXT.device):
        assert torch.equal(strategy.module(TEXT), logits)


@pytest.mark.parametrize(
    ("fp8_loss", "bf16_loss", "bad"),
    [
        (2.03, 2.0, False),
        (2.05, 2.0, True),
        (1.5, 2.0, False),  # FP8 ahead is no harm
        (math.nan, 2.0, True),
        (math.inf, 2.0, True),
        (math.nan, math.nan, False),  # not FP8's doing, or nothing held out
        (2.0, math.inf, False),
    ],
)
@pytest.mark.parametrize("action", ["warn", "bf16"])
def test_a_gap_above_the_bound_is_answered_as_set(fp8_loss: float, bf16_loss: float, bad: bool, action):
    guard = Guard(dataclasses.replace(SETTINGS, fp8_guard_action=action))
    assert guard.judge(Gap(fp8_loss, bf16_loss)) == (action if bad else "good")


def test_it_is_due_every_so_many_steps():
    assert [step for step in range(1, 10) if Guard(SETTINGS).due(step)] == [4, 8]
    assert not Guard(dataclasses.replace(SETTINGS, fp8_guard_every_steps=0)).due(4)


@pytest.mark.parametrize("factor", [3.0, math.nan])
def test_broken_fp8_is_seen_and_left_for_bf16(strategy: Strategy, factor: float):
    guard = Guard(dataclasses.replace(SETTINGS, fp8_guard_action="bf16"))
    sound = measure(guard, strategy)
    break_fp8(strategy, factor)
    gap = measure(guard, strategy)
    assert guard.judge(sound) == "good" and guard.judge(gap) == "bf16"
    assert gap.bf16_loss == sound.bf16_loss
    guard.fall_back(strategy)
    assert guard.settings.precision == "bf16" and not guard.due(4)
    gradient = accumulate(TASK, strategy, TASK.reader(0, 0, 1), 0, guard.settings, CONTEXT)
    assert math.isfinite(gradient.loss) and gradient.norm > 0
    ((loss_sum, count),) = validate(TASK, strategy, TASK.validation(0), guard.settings, CONTEXT, 2).values()
    assert loss_sum / count == sound.bf16_loss


def test_without_held_out_data_there_is_no_verdict(strategy: Strategy):
    guard = Guard(SETTINGS)
    gap = guard.measure(TASK, strategy, {}, CONTEXT, micro_batch_size=2)
    assert math.isnan(gap.relative) and guard.judge(gap) == "good"
