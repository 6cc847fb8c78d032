"""The plan's law: shares to within one window, nothing twice in an epoch, no gap between stages."""

from __future__ import annotations

import pickle
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from danube_ray.config import ConfigError, LoopConfig, ModelConfig, RunConfig, StageConfig
from danube_ray.data.plan import BalancedPeriod, MixturePlan, Window

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    context_length=64,
)
SIZES = {
    "web": {"q0": 4_100, "q1": 2_222, "q2": 1_500, "q3": 700},
    "wiki": {"unscored": 3_000},
    "code": {"q3": 1_290, "unscored": 70, "q1": 30},
}


def stage(name: str, tokens: int, length: int, shares: dict[str, int], **more: dict[str, float]) -> StageConfig:
    return StageConfig(name=name, tokens=tokens, sequence_length=length, micro_batch_size=1, shares=shares, **more)


def make_run(*stages: StageConfig, batch: int = 192, seed: int = 1, max_epochs: float = 4.0) -> RunConfig:
    return RunConfig(
        name="plan",
        model=MODEL,
        stages=stages,
        global_batch_tokens=batch,
        loop=LoopConfig(seed=seed),
        max_epochs=max_epochs,
    )


STAGES = (
    stage("short", 7_777, 16, {"web": 7, "wiki": 3}),
    stage("middle", 6_000, 32, {"web": 50, "wiki": 30, "code": 20}, min_quality={"web": 0.5}),
    stage("long", 9_000, 64, {"web": 1, "wiki": 1, "code": 1}),
)


def windows(plan: MixturePlan) -> list[Window]:
    return [plan.window(step, slot) for step in range(plan.num_steps) for slot in range(plan.windows_per_step(step))]


@pytest.mark.parametrize("weights", [(1,), (1, 1), (906, 64, 30), (5, 3, 2, 1), (97, 1, 1, 1), (1,) * 7, (499, 500)])
def test_every_prefix_keeps_each_source_within_one_slot_of_its_share(weights: tuple[int, ...]) -> None:
    deal, period = BalancedPeriod(weights), sum(weights)
    counts = [0] * len(weights)
    for slot in range(2 * period + 3):
        assert deal.counts(slot) == counts
        source, ordinal = deal.at(slot)
        assert ordinal == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (slot + 1) * weight / period) < 1


def test_random_shares_stay_within_one_slot_too() -> None:
    generator = random.Random(7)
    for _ in range(150):
        weights = tuple(generator.randint(1, 60) for _ in range(generator.randint(2, 9)))
        deal, counts = BalancedPeriod(weights), Counter[int]()
        for slot in range(sum(weights)):
            counts[deal.at(slot)[0]] += 1
            assert all(abs(counts[i] - (slot + 1) * w / sum(weights)) < 1 for i, w in enumerate(weights))


def test_every_source_is_within_one_window_of_its_share_at_every_step() -> None:
    run = make_run(*STAGES)
    plan = MixturePlan(run, SIZES)
    for config, begin, end in zip(run.stages, (0, *run.stage_ends), run.stage_ends, strict=False):
        counts, seen = Counter[str](), 0
        for step in range(begin, end):
            assert plan.sequence_length(step) == config.sequence_length
            assert plan.windows_per_step(step) * config.sequence_length == run.global_batch_tokens
            batch = [plan.window(step, slot) for slot in range(plan.windows_per_step(step))]
            assert {window.length for window in batch} == {config.sequence_length}
            counts.update(window.source for window in batch)
            seen += len(batch)
            for source, share in config.shares.items():
                assert abs(counts[source] - seen * share / sum(config.shares.values())) < 1
    trained = {s: sum(tokens.get(s, 0) for tokens in plan.stage_tokens) for s in SIZES}
    assert trained == {s: sum(w.length for w in windows(plan) if w.source == s) for s in SIZES}
    assert plan.tokens_at(plan.num_steps) == sum(trained.values())


@pytest.mark.parametrize("seed", range(5))
def test_no_token_is_trained_twice_before_its_epoch_ends(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.choice([8, 16, 32, 64]) for _ in range(4)]
    stages = tuple(
        stage(f"s{i}", generator.randint(2_000, 9_000), length, {s: generator.randint(1, 9) for s in SIZES})
        for i, length in enumerate(lengths)
    )
    plan = MixturePlan(make_run(*stages, seed=seed, max_epochs=99), SIZES)
    seen = defaultdict[tuple[str, str, int], Counter[int]](Counter)
    last = Counter[tuple[str, str]]()
    for window in windows(plan):
        bucket, size = (window.source, window.bucket), SIZES[window.source][window.bucket]
        assert window.start_token + window.length + 1 <= size
        assert window.start_token == window.chunk * plan.chunk_tokens + window.window_index * window.length
        assert window.epoch >= last[bucket]  # an epoch is over for good once the next one began
        last[bucket] = window.epoch
        seen[*bucket, window.epoch].update(range(window.start_token, window.start_token + window.length))
    assert max(last.values()) >= 1, "the test must cross an epoch"
    for counts in seen.values():
        assert set(counts.values()) == {1}
    for (source, bucket, epoch), counts in seen.items():
        if epoch < last[source, bucket]:  # a finished epoch saw every chunk, but for what a longer stage skipped
            whole = (SIZES[source][bucket] - 1) // plan.chunk_tokens * plan.chunk_tokens
            assert whole - len(counts) <= 64 * len(stages)


def test_a_stage_of_another_length_goes_on_behind_the_last_one() -> None:
    sizes = {"web": {"unscored": 64 * 40 + 1}}
    one = make_run(stage("a", 64 * 40, 64, {"web": 1}), batch=64)
    split = make_run(stage("a", 64 * 10, 16, {"web": 1}), stage("b", 64 * 30, 64, {"web": 1}), batch=64)
    chunks = [window.chunk for window in windows(MixturePlan(one, sizes))]
    halves = [window.chunk for window in windows(MixturePlan(split, sizes))]
    assert sorted(chunks) == list(range(40))
    assert chunks != sorted(chunks)
    assert halves == [chunk for chunk in chunks[:10] for _ in range(4)] + chunks[10:]
    # Three windows of 16 tokens each end within one of 32, whose rest nobody reads; three of 32 end within none.
    longer = [stage(name, 96, length, {"web": 1, "wiki": 1}) for name, length in (("a", 16), ("b", 32), ("c", 32))]
    plan = MixturePlan(make_run(*longer, batch=96), {"web": {"unscored": 999}, "wiki": {"unscored": 999}})
    assert plan.skipped_tokens == {"web": 16, "wiki": 16}


def test_buckets_share_a_source_by_size_and_min_quality_leaves_the_low_ones_out() -> None:
    run = make_run(*STAGES)
    plan = MixturePlan(run, SIZES)
    first = Counter(plan.window(s, i).bucket for s in range(run.stage_ends[0]) for i in range(12)
                    if plan.window(s, i).source == "web")  # fmt: skip
    chunks = {bucket: (size - 1) // 64 for bucket, size in SIZES["web"].items()}
    for bucket, count in chunks.items():
        assert abs(first[bucket] - first.total() * count / sum(chunks.values())) < 3
    middle = {plan.window(s, i).bucket for s in range(*run.stage_ends[:2]) for i in range(6)
              if plan.window(s, i).source == "web"}  # fmt: skip
    assert middle == {"q2", "q3"}
    assert {w.bucket for w in windows(plan) if w.source == "code"} == {"q3", "unscored"}, "30 tokens make no chunk"


def test_epochs_and_tails_are_counted_and_epochs_capped() -> None:
    run = make_run(stage("a", 192 * 40, 64, {"wiki": 1}))
    plan = MixturePlan(run, SIZES)
    assert plan.epochs() == {"wiki": pytest.approx(192 * 40 / (46 * 64))}
    assert max(window.epoch for window in windows(plan)) == 2
    assert plan.tail_tokens() == {"web": 3 + 45 + 27 + 59, "wiki": 55, "code": 9 + 5 + 30}
    plan.check()
    with pytest.raises(
        ConfigError, match=r"epochs of source 'wiki' is 2\.61, allowed is at most max_epochs=2\.5; .*7,680"
    ):
        MixturePlan(replace(run, max_epochs=2.5), SIZES).check()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (stage("a", 999, 64, {"books": 1}), "source 'books' of stage 'a'.*code, web, wiki"),
        (stage("a", 999, 64, {"wiki": 1}, min_quality={"wiki": 0.5}), "min_quality of source 'wiki'.*unscored"),
        (stage("a", 999, 64, {"low": 1}, min_quality={"low": 0.5}), "min_quality of source 'low'.*documents reach"),
        (stage("a", 999, 64, {"web": 100_003, "wiki": 7}), "shares of stage 'a' is 100010"),
        (
            stage("a", 999, 64, {"tiny": 1}),
            "tokens of source 'tiny' of stage 'a' is 64, allowed is at least 65 .*more text",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(config: StageConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        more = {"tiny": {"q1": 64, "q2": 20}, "low": {"q0": 900, "q1": 900}}
        MixturePlan(make_run(config), {**SIZES, **{name: more[name] for name in more if name in config.shares}})


def test_the_hash_follows_what_changes_the_order_and_nothing_else() -> None:
    run = make_run(*STAGES)
    plan = MixturePlan(run, SIZES)
    same = [
        replace(run, name="other", loop=LoopConfig(seed=1, num_workers=4)),
        replace(run, stages=(replace(STAGES[0], micro_batch_size=3, shares={"wiki": 3, "web": 7}), *STAGES[1:])),
    ]
    for other in same:
        assert MixturePlan(other, SIZES).hash == plan.hash
        assert windows(MixturePlan(other, SIZES)) == windows(plan)
    assert MixturePlan(run, {**SIZES, "unused": {"q0": 5}}).hash == plan.hash
    changed = [
        replace(run, loop=LoopConfig(seed=2)),
        replace(run, stages=run.stages[:2]),
        replace(run, global_batch_tokens=384),
    ]
    hashes = {MixturePlan(other, SIZES).hash for other in changed} | {
        MixturePlan(run, {**SIZES, "wiki": {"q0": 2_999}}).hash
    }
    assert len(hashes | {plan.hash}) == 5


def test_a_plan_is_a_small_pure_function_even_at_trillions_of_tokens() -> None:
    sizes = {"web": {f"q{k}": 10**12 + k for k in range(4)}, "wiki": {"unscored": 10**10}}
    run = make_run(
        stage("a", 3 * 10**12, 32, {"web": 99, "wiki": 1}), stage("b", 10**12, 64, {"web": 99, "wiki": 1}), batch=2**20
    )
    plan = MixturePlan(run, sizes)
    data = pickle.dumps(plan)
    assert len(data) < 3_000
    again = pickle.loads(data)
    for step in (0, 1, run.stage_ends[0] - 1, run.stage_ends[0], run.num_steps - 1):
        for slot in (0, 7, plan.windows_per_step(step) - 1):
            window = plan.window(step, slot)
            assert again.window(step, slot) == window
            tokens = window.start_token + 1, window.start_token + window.length
            assert plan.slots_of(window.source, window.bucket, *tokens) == [(step, slot)]
            assert window.start_token + window.length < sizes[window.source][window.bucket]
    for step, slot in ((run.num_steps, 0), (-1, 0), (0, plan.windows_per_step(0))):
        with pytest.raises(IndexError):
            plan.window(step, slot)
