from __future__ import annotations

import pytest

from danube_ray.serve import limits
from danube_ray.serve.limits import Allowance, RateLimit


class Clock:
    now_s = 1e7 + 1 / 3  # a machine that has been up for months

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("per_minute", [1, 2, 7, 60, 61, 997])
def test_a_minutes_requests_at_once_then_evenly(clock: Clock, per_minute: int):
    rate = RateLimit(clock)
    left = [rate.take("alice", per_minute) for _ in range(per_minute)]
    assert [one.remaining for one in left] == list(range(per_minute))[::-1]
    assert not any(one.retry_after_s for one in left)
    assert [one.reset_s for one in left] == pytest.approx([60 * (n + 1) / per_minute for n in range(per_minute)])
    refused = rate.take("alice", per_minute)
    assert refused.retry_after_s == -(-60 // per_minute) and refused.remaining == 0
    passed = 0
    for _ in range(600):  # ten minutes, asked ten times as often as allowed or more
        clock.now_s += 1
        passed += sum(not rate.take("alice", per_minute).retry_after_s for _ in range(1 + 10 * per_minute // 60))
    assert 10 * per_minute - 1 <= passed <= 10 * per_minute


@pytest.mark.parametrize("per_minute", [1, 7, 60, 997])
def test_who_waits_as_told_passes_and_who_does_not_waits_no_longer(clock: Clock, per_minute: int):
    rate = RateLimit(clock)
    for _ in range(per_minute):
        rate.take("alice", per_minute)
    wait_s = rate.take("alice", per_minute).retry_after_s
    clock.now_s += wait_s - 1
    if wait_s > 1:
        assert rate.take("alice", per_minute).retry_after_s == 1
    clock.now_s += 1
    assert rate.take("alice", per_minute).retry_after_s == 0


def test_callers_do_not_share(clock: Clock):
    rate = RateLimit(clock)
    assert rate.take("alice", 1).retry_after_s == 0
    assert rate.take("bob", 1).retry_after_s == 0
    assert rate.take("alice", 1).retry_after_s == 60


def test_headers_tell_what_is_left_as_openai_does():
    assert Allowance(limit=60, remaining=58, reset_s=2.0, retry_after_s=0).headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "58",
        "x-ratelimit-reset-requests": "2.000s",
    }


def test_memory_is_bounded_by_time_and_by_number(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    rate = RateLimit(clock)
    for address in range(1000):
        rate.take(f"10.0.0.{address}", 60)
    assert len(rate) == 1000
    clock.now_s += 60
    rate.take("alice", 60)
    assert len(rate) == 1
    monkeypatch.setattr(limits, "MAX_CALLERS", 10)
    for address in range(1000):
        rate.take(f"10.0.0.{address}", 60)
        assert rate.take("busy", 1).retry_after_s == (60 if address else 0), "who goes on calling is not forgotten"
    assert len(rate) == 10
